//! Packed numbers as the inner loops see them: parts of codes, each with a grid.

#![forbid(unsafe_code)]

use std::ops::Range;

use half::f16;
use half::slice::HalfBitsSliceExt;

use super::codes::{Codes, Levels, blocks, padded_outer};
use super::folded::middle;

/// Parts of packed numbers `x_i[o, l] = lane_scale[l] (scale_i[o] code_i[o, l] + zero_i[o])`: a grid a part and outer row,
/// and where there are any a factor a lane, and levels for which codes stand.
///
/// Part `i` of keys is a group of tokens (outer = channels, lanes = tokens), part `i` of values a group of channels
/// (outer = tokens, lanes = channels). Either lie in one run of words.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    /// All parts' codes and grids.
    pub words: &'a [u16],
    /// Bits of a code.
    pub bits: u8,
    /// What the codes stand for, if not for themselves.
    pub levels: Option<&'a Levels>,
    /// Outer rows in use.
    pub outer: usize,
    /// Outer rows of codes before the ones in use; those, and ones behind, are not read.
    pub lead: usize,
    /// Parts.
    pub parts: usize,
    /// Lanes of a part; the last one may have fewer.
    pub width: usize,
    /// Lanes of a row of codes.
    pub lanes: usize,
    /// Distance of the parts' codes in `words`; 0 where they share their rows.
    pub codes_step: usize,
    /// The parts' grids.
    pub grids: Grids,
    /// Where the factors of the columns begin in `words`, if there are any.
    pub lane_scales_at: Option<usize>,
    /// The error (root mean square) that rounding to integers may add to a sum; where it would be more, rounding is finer.
    pub tolerance: f32,
}

/// How codes become numbers, and where in the words the scales and zero-points of part `i` are: `i step` further than those of
/// the first part.
#[derive(Clone, Copy)]
pub enum Grids {
    /// `x = scale code + zero`.
    Affine {
        /// Where scales begin.
        scales_at: usize,
        /// Where zero-points begin.
        zeros_at: usize,
        /// Distance of the parts' grids.
        step: usize,
    },
    /// `x = scale (code - origin)`.
    Scaled {
        /// Where scales begin.
        scales_at: usize,
        /// The code that stands for 0.
        origin: f32,
        /// Distance of the parts' scales.
        step: usize,
    },
    /// `x = code - origin`.
    Plain {
        /// The code that stands for 0.
        origin: f32,
    },
}

/// The grid of a part, for the outer rows in use.
#[derive(Clone, Copy)]
pub enum Grid<'a> {
    /// Scales and zero-points.
    Affine(&'a [f16], &'a [f16]),
    /// Scales; the code that stands for 0.
    Scaled(&'a [f16], f32),
    /// The code that stands for 0.
    Plain(f32),
}

impl Grid<'_> {
    /// The code from which outer row `o` counts, and what that stands for.
    fn start(&self, o: usize) -> (f32, f32) {
        match self {
            Self::Affine(_, zero) => (0.0, zero[o].to_f32()),
            Self::Scaled(_, origin) | Self::Plain(origin) => (*origin, 0.0),
        }
    }

    /// Turns codes of outer row `o` into the numbers that they stand for.
    pub fn decode(&self, o: usize, codes: &mut [f32]) {
        let (scale, (origin, first)) = (self.scale(o), self.start(o));
        for x in codes {
            *x = (*x - origin) * scale + first;
        }
    }

    /// The factor of codes in outer row `o`.
    #[inline]
    pub fn scale(&self, o: usize) -> f32 {
        match self {
            Self::Affine(scale, _) | Self::Scaled(scale, _) => scale[o].to_f32(),
            Self::Plain(_) => 1.0,
        }
    }

    /// What code 0 stands for in outer row `o`.
    #[inline]
    pub fn zero(&self, o: usize) -> f32 {
        match self {
            Self::Affine(_, zero) => zero[o].to_f32(),
            Self::Scaled(_, origin) | Self::Plain(origin) => -origin * self.scale(o),
        }
    }
}

impl<'a> Packed<'a> {
    /// Codes of part `i`, and which of their lanes are its.
    #[inline]
    pub fn codes(&self, i: usize) -> (Codes<'a>, Range<usize>) {
        let blocks = blocks(self.bits, self.lead + self.outer);
        let codes = Codes::new(self.bits, self.lanes, blocks, &self.words[i * self.codes_step..]);
        let codes = codes.with_levels(self.levels);
        let first = if self.codes_step == 0 { i * self.width } else { 0 };
        (codes, first..(first + self.width).min(self.lanes))
    }

    /// The grid of part `i`.
    #[inline]
    pub fn grid(&self, i: usize) -> Grid<'a> {
        match self.grids {
            Grids::Affine { scales_at, zeros_at, step } => Grid::Affine(
                self.numbers(scales_at + i * step, self.outer),
                self.numbers(zeros_at + i * step, self.outer),
            ),
            Grids::Scaled { scales_at, origin, step } => {
                Grid::Scaled(self.numbers(scales_at + i * step, self.outer), origin)
            }
            Grids::Plain { origin } => Grid::Plain(origin),
        }
    }

    /// The factors of `n` lanes of part `i`.
    #[inline]
    pub fn lane_scales(&self, i: usize, n: usize) -> Option<&'a [f16]> {
        self.lane_scales_at.map(|at| self.numbers(at + i * self.width, n))
    }

    fn numbers(&self, at: usize, n: usize) -> &'a [f16] {
        self.words[at..][..n].reinterpret_cast()
    }

    /// The largest code, or what it stands for.
    pub fn largest(&self) -> u8 {
        if self.levels.is_some() { u8::MAX } else { u8::MAX >> (8 - self.bits) }
    }

    /// The code from which codes are counted when they are multiplied: the one that stands for 0, or the middle one.
    pub fn center(&self) -> f32 {
        match self.grids {
            Grids::Affine { .. } => middle(self.largest()),
            Grids::Scaled { origin, .. } | Grids::Plain { origin } => origin,
        }
    }

    /// Outer rows of the codes: whole blocks around the ones in use.
    pub fn padded_outer(&self) -> usize {
        padded_outer(self.bits, self.lead + self.outer)
    }

    /// Columns of all parts side by side.
    pub fn columns(&self) -> usize {
        if self.codes_step == 0 { self.lanes } else { self.parts * self.width }
    }
}
