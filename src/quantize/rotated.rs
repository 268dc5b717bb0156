//! A random rotation, then one scale a token and a uniform grid (`TurboQuant`-MSE, Zandieh et al. 2025, arXiv 2504.19874).
//!
//! After a randomised Hadamard transform the numbers of any vector are nearly normal, so the same grid fits all:
//!
//! ```text
//! y = H D x / sqrt(d)    code = round(y / step + m), clamped    m = (2^bits - 1) / 2    x' = D H (scale (code - m)) / sqrt(d)
//! step = best step of a uniform grid for normal numbers * rms(y), or max |y| / m where that errs less
//! scale = sum y^2 / sum y (code - m)
//! ```
//!
//! The scale that is stored is not `step`: a quantiser that errs least also shrinks, by about the share of its error, and
//! attention averages the error of many tokens away but not what they all lack. With this scale `x' . x = x . x`.
//! The paper's levels are Lloyd and Max's; a uniform grid errs 1 % (2 bits) to 20 % (4 bits) more. The paper's second stage
//! (QJL) is left out: what it adds to the variance harms attention more than the bias that it removes.

use half::f16;

use super::{levels, refuse, round};
use crate::attend::codes::MOST_OUTER;
use crate::error::Result;

/// The parameters of rotated tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rotated {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Numbers that share a scale, after the rotation; 0: all.
    pub group: usize,
    /// The newest tokens, which stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// Of the random signs.
    pub seed: u64,
}

impl Rotated {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: u8, group: usize, window: usize, sinks: usize, seed: u64) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return refuse("bits", bits, "2, 3, 4, 8");
        }
        if !group.is_multiple_of(MOST_OUTER) || group > 256 {
            return refuse("group", group, "0 for the whole head dim, or multiples of 16 up to 256");
        }
        Ok(Self { bits, group, window, sinks, seed })
    }

    /// The best step of a uniform grid for numbers with variance 1 (Max 1960).
    fn best_step(&self) -> f32 {
        match self.bits {
            2 => 0.9957,
            3 => 0.5860,
            4 => 0.3352,
            _ => 0.0308,
        }
    }

    /// The codes of rotated numbers, and their scale.
    pub(super) fn encode(&self, y: &[f32], codes: &mut [u8]) -> f16 {
        let middle = levels(self.bits) / 2.0;
        let square: f32 = y.iter().map(|y| y * y).sum();
        let rms = (square / y.len() as f32).sqrt();
        let largest = y.iter().fold(0.0f32, |largest, y| largest.max(y.abs()));
        if square == 0.0 {
            codes.fill(0);
            return f16::ZERO;
        }
        let [normal, whole] = [self.best_step() * rms, largest / middle];
        let step = if self.error(y, whole) < self.error(y, normal) { whole } else { normal };
        let mut product = 0.0;
        for (code, &y) in codes.iter_mut().zip(y) {
            *code = self.code(y / step);
            product += y * (f32::from(*code) - middle);
        }
        f16::from_f32(square / product)
    }

    fn code(&self, y: f32) -> u8 {
        round(y + levels(self.bits) / 2.0, levels(self.bits))
    }

    fn error(&self, y: &[f32], step: f32) -> f32 {
        let (inverse, middle) = (1.0 / step, levels(self.bits) / 2.0);
        y.iter().map(|&y| (y - step * (f32::from(self.code(y * inverse)) - middle)).powi(2)).sum()
    }
}
