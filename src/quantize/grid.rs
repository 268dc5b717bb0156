//! Grids: from numbers to codes and back.
//!
//! An asymmetric grid has a scale and a zero-point, both stored as halves, and codes are computed from the stored ones:
//!
//! ```text
//! zero = min(x)    scale = (max(x) - min(x)) / (2^bits - 1)    code = round((x - zero) / scale)
//! x' = scale * code + zero
//! ```

#![forbid(unsafe_code)]

use half::f16;

use super::compensation::Compensated;
use super::tokens::TokenCoding;
use crate::tensor::f16_below;

/// A scale, a half, at whose size halves are so coarse that codes go by the scale as it is stored.
pub(super) const SMALL: f32 = 1.0 / 65536.0;

/// The half next to `scale` with which codes up to `largest` stand for numbers that halves hold; below [`SMALL`] the next one
/// away from 0, so that codes reach what they stand for.
pub(super) fn stored_scale(scale: f32, largest: f32) -> f16 {
    let magnitude = scale.abs();
    let mut stored = f16::from_f32(magnitude.min(f16::MAX.to_f32()));
    if magnitude < SMALL && stored.to_f32() < magnitude {
        stored = f16::from_bits(stored.to_bits() + 1);
    }
    if stored.to_f32() * largest > f16::MAX.to_f32() {
        stored = f16_below(f16::MAX.to_f32() / largest);
    }
    if scale < 0.0 { -stored } else { stored }
}

/// The code next to `x`, half to even, from 0 to `levels`.
pub(super) fn round(x: f32, levels: f32) -> u8 {
    // Adding 1.5 * 2^23 leaves the number, rounded, in the lowest bits: no call, and it vectorises.
    (x.clamp(0.0, levels) + 12_582_912.0).to_bits() as u8
}

/// The largest code.
pub(super) fn levels(bits: u8) -> f32 {
    f32::from(u8::MAX >> (8 - bits))
}

/// The grid of numbers between two, as it is stored.
#[derive(Clone, Copy)]
pub(super) struct MinMax {
    pub(super) scale: f16,
    pub(super) zero: f16,
}

impl MinMax {
    /// For codes of `bits` bits.
    pub(super) fn new(bits: u8, min: f32, max: f32) -> Self {
        let (levels, zero) = (levels(bits), f16::from_f32(min));
        let exact = (max - min) / levels;
        let mut scale = f16::from_f32(exact);
        // Halves that are not normal are coarse: where codes would end a step short of the largest number, the scale is rounded up.
        if exact < f16::MIN_POSITIVE.to_f32() && max - min - scale.to_f32() * levels > scale.to_f32() {
            scale = stored_scale(exact, levels);
        }
        // Nor may what they stand for be more than halves hold: it is larger than `max` by less than 100.
        if max > f16::MAX.to_f32() - 100.0 && zero.to_f32() + scale.to_f32() * levels > f16::MAX.to_f32() {
            scale = f16_below((f16::MAX.to_f32() - zero.to_f32()) / levels);
        }
        Self { scale, zero }
    }

    /// What code 0 stands for: `code = round((x - first) / divisor)`.
    pub(super) fn first(self) -> f32 {
        self.zero.to_f32()
    }

    /// The code of a number of `bits` bits.
    pub(super) fn code(self, bits: u8, x: f32) -> u8 {
        round((x - self.first()) / self.divisor(), levels(bits))
    }

    /// What a code stands for.
    pub(super) fn decode(self, code: u8) -> f32 {
        self.zero.to_f32() + self.scale.to_f32() * f32::from(code)
    }

    /// The distance of codes. A group of equal numbers has scale 0, and all its codes are 0.
    pub(super) fn divisor(self) -> f32 {
        if self.scale == f16::ZERO { f32::INFINITY } else { self.scale.to_f32() }
    }
}

/// Smallest and largest number.
pub(super) fn range(x: &[f32]) -> (f32, f32) {
    let (mut min, mut max) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
    for x in x.chunks(8) {
        for (i, &x) in x.iter().enumerate() {
            min[i] = min[i].min(x);
            max[i] = max[i].max(x);
        }
    }
    (min.into_iter().fold(f32::INFINITY, f32::min), max.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// Groups of channels of a token, each between its least and its largest number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asymmetric {
    /// Bits of a code.
    pub(super) bits: u8,
    /// Channels that share a grid; 0: all.
    pub(super) group: usize,
}

impl Asymmetric {
    fn grid(self, x: &[f32]) -> MinMax {
        let (min, max) = range(x);
        MinMax::new(self.bits, min, max)
    }
}

impl TokenCoding for Asymmetric {
    fn bits(&self) -> u8 {
        self.bits
    }

    fn group(&self) -> usize {
        self.group
    }

    fn encode(&self, x: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let grid = self.grid(x);
        let (first, divisor, levels) = (grid.first(), grid.divisor(), levels(self.bits));
        for (code, &x) in codes.iter_mut().zip(x) {
            *code = round((x - first) / divisor, levels);
        }
        (grid.scale, grid.zero)
    }

    fn encode_compensated(&self, group: Compensated<'_>) -> (f16, f16) {
        let grid = self.grid(group.numbers());
        group.encode(|x| grid.code(self.bits, x), |code| grid.decode(code));
        (grid.scale, grid.zero)
    }
}
