//! Blocks of 32 channels with one scale, as llama.cpp's `q8_0` and `q4_0` define them: per token, no calibration.
//!
//! ```text
//! 8 bits: scale = max |x| / 127         code = round(x / scale)                   x' = scale code
//! 4 bits: scale = x_of_max_|x| / -8     code = min(15, floor(x / scale + 8.5))    x' = scale (code - 8)
//! ```
//!
//! The scale is stored as f16, codes are computed from the unrounded one, as there, but for blocks so small that halves are
//! coarse: of those from the stored one. Codes of 8 bits are stored 128 higher.

use std::sync::Arc;

use half::f16;

use super::{Gptq, SMALL, refuse, stored_scale};
use crate::error::Result;

/// Channels that share a scale.
pub(super) const SIZE: usize = 32;

/// The parameters of a block format.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// Bits of a code: 4 or 8.
    pub bits: u8,
    /// The newest tokens, which stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// How roundings are made up for, if they are.
    pub feedback: Option<Arc<Gptq>>,
}

impl Block {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: u8, window: usize, sinks: usize) -> Result<Self> {
        if !matches!(bits, 4 | 8) {
            return refuse("bits", bits, "4, 8");
        }
        Ok(Self { bits, window, sinks, feedback: None })
    }

    /// The code that stands for 0.
    pub(super) fn origin(&self) -> f32 {
        if self.bits == 8 { 128.0 } else { 8.0 }
    }

    /// The codes of a block, and its scale.
    pub(super) fn encode(&self, x: &[f32], codes: &mut [u8]) -> f16 {
        let scale = self.scale(x);
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (code, &x) in codes.iter_mut().zip(x) {
            *code = self.code(x * inverse);
        }
        f16::from_f32(scale)
    }

    /// The scale of a block before it is rounded; where rounding would matter, as it is stored.
    pub(super) fn scale(&self, x: &[f32]) -> f32 {
        let largest = x.iter().fold(0.0f32, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
        let (scale, most) = if self.bits == 8 { (largest.abs() / 127.0, 127.0) } else { (largest / -8.0, 8.0) };
        let stored = stored_scale(scale, most).to_f32();
        let ordinary = scale == 0.0 || scale.abs() >= SMALL && f16::from_f32(scale).to_f32() == stored;
        if ordinary { scale } else { stored }
    }

    /// The code of a number in units of the scale; one beyond the block's largest, which feedback can make, is clamped.
    pub(super) fn code(&self, x: f32) -> u8 {
        if self.bits == 8 { (x.round().clamp(-127.0, 127.0) + 128.0) as u8 } else { ((x + 8.5) as u8).min(15) }
    }
}
