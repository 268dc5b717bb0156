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

mod keys;
mod values;

pub use keys::PackedKeys;
pub(super) use keys::pack_group;
pub use values::PackedValues;

use half::f16;
use half::slice::HalfBitsSliceExt;

use crate::attend::CHUNK;
use crate::attend::codes::LANES;
use crate::error::{Error, Result};
use crate::tensor::Slice;

/// KIVI's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kivi {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Numbers that share a scale and a zero-point.
    pub group: usize,
    /// The paper's residual length R: keys are packed in blocks of it, the newest values stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
}

impl Kivi {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`] for the first that does not fit.
    pub fn new(bits: u8, group: usize, window: usize, sinks: usize) -> Result<Self> {
        let refuse = |name, given: usize, accepted: &str| {
            Err(Error::Option { name, given: given.to_string(), accepted: accepted.into() })
        };
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return refuse("bits", bits.into(), "2, 3, 4, 8");
        }
        if group == 0 || !group.is_multiple_of(LANES) || group > CHUNK {
            return refuse("group", group, "multiples of 8 from 8 to 256");
        }
        if window == 0 || !window.is_multiple_of(group) {
            return refuse("window", window, &format!("positive multiples of group={group}"));
        }
        Ok(Self { bits, group, window, sinks })
    }

    pub(super) fn check_dims(&self, dim: usize) -> Result<()> {
        if self.group <= dim {
            return Ok(());
        }
        let accepted = format!("multiples of 8 up to this model's value head dim, {dim}");
        Err(Error::Option { name: "group", given: self.group.to_string(), accepted })
    }

    pub(super) fn keys_due(&self, n: usize) -> usize {
        n / self.window * self.window
    }

    pub(super) fn values_due(&self, n: usize) -> usize {
        n.saturating_sub(self.window)
    }

    fn levels(&self) -> f32 {
        super::levels(self.bits)
    }

    /// Scale and zero-point of numbers between `min` and `max`.
    fn grid(&self, min: f32, max: f32) -> (f16, f16) {
        (f16::from_f32((max - min) / self.levels()), f16::from_f32(min))
    }
}

/// The divisor for a stored scale: a group of equal numbers has scale 0, and all its codes are 0.
fn divisor(scale: f16) -> f32 {
    if scale == f16::ZERO { f32::INFINITY } else { scale.to_f32() }
}

/// The code of `x` on a stored grid.
fn code(x: f32, divisor: f32, zero: f32, levels: f32) -> u8 {
    // Adding 1.5 * 2^23 leaves the number, rounded half to even, in the lowest bits: no call, and it vectorises.
    let code = ((x - zero) / divisor).clamp(0.0, levels);
    (code + 12_582_912.0).to_bits() as u8
}

/// The memory of words.
pub(super) fn bytes_of(words: &[u16]) -> &[u8] {
    Slice::F16(as_f16(words)).bytes()
}

/// Words that hold scales or zero-points.
fn as_f16(words: &[u16]) -> &[f16] {
    words.reinterpret_cast()
}

/// As [`as_f16`], to be written.
fn as_f16_mut(words: &mut [u16]) -> &mut [f16] {
    words.reinterpret_cast_mut()
}
