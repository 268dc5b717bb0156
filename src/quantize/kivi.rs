//! KIVI: asymmetric 2 to 8 bits, tuning-free (Liu et al. 2024, arXiv 2402.02750).
//!
//! Keys have channels that are large for all tokens, values have not. So keys are quantised per channel, over
//! groups of `group` tokens, and values per token, over groups of `group` channels:
//!
//! ```text
//! zero = min(x)    scale = (max(x) - min(x)) / (2^bits - 1)    code = round((x - zero) / scale)
//! x' = scale * code + zero
//! ```
//!
//! scale and zero are stored as f16, and codes are computed from the stored ones. The flush rule of the paper: keys
//! wait until `window` of them can be packed together (a group needs all its tokens), values leave one by one as
//! soon as `window` newer ones are held. The first `sinks` tokens stay exact (not in the paper; 0 gives it).
//!
//! The scales never meet the codes: `q . k'_t = sum_c (q_c scale_c) code_tc + sum_c q_c zero_c` folds a channel's scale
//! into the query, `sum_t w_t v'_t = sum_t (w_t scale_t) code_t + sum_t w_t zero_t` a token's into its weight. What is
//! folded becomes integers ([`crate::attend::folded`]).

use std::sync::Arc;

use half::f16;

use super::{Gptq, check_groups, levels, refuse, round, stored_scale};
use crate::error::Result;
use crate::tensor::f16_below;

/// KIVI's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Kivi {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Numbers that share a scale and a zero-point.
    pub group: usize,
    /// The paper's residual length R: keys are packed in blocks of it, the newest values stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// Whether at least the newest `window` keys stay exact; else fewer than `window` do.
    pub full_window: bool,
    /// How roundings are made up for, if they are.
    pub feedback: Option<Arc<Gptq>>,
}

impl Kivi {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`] for the first that does not fit.
    pub fn new(bits: u8, group: usize, window: usize, sinks: usize) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return refuse("bits", bits, "2, 3, 4, 8");
        }
        check_groups(group, window)?;
        Ok(Self { bits, group, window, sinks, full_window: false, feedback: None })
    }

    pub(super) fn check_dims(&self, dim: usize) -> Result<()> {
        if self.group <= dim {
            return Ok(());
        }
        refuse("group", self.group, format!("multiples of 8 up to this model's head_dim, {dim}"))
    }

    /// The grid of a group.
    pub(super) fn grid(&self, x: &[f32]) -> MinMax {
        let (min, max) = range(x);
        MinMax::new(self.bits, min, max)
    }

    /// The codes of a group, its scale and its zero-point.
    pub(super) fn encode(&self, x: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let grid = self.grid(x);
        let (first, divisor, levels) = (grid.first(), grid.divisor(), levels(self.bits));
        for (code, &x) in codes.iter_mut().zip(x) {
            *code = round((x - first) / divisor, levels);
        }
        (grid.scale, grid.zero)
    }
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
