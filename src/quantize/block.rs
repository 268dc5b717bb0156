//! Blocks of 32 channels with one scale, as llama.cpp's `q8_0` and `q4_0` define them: per token, no calibration.
//!
//! ```text
//! 8 bits: scale = max |x| / 127         code = round(x / scale)                   x' = scale code
//! 4 bits: scale = x_of_max_|x| / -8     code = min(15, floor(x / scale + 8.5))    x' = scale (code - 8)
//! ```
//!
//! The scale is stored as f16, codes are computed from the unrounded one, as there, but for blocks so small that halves are
//! coarse: of those from the stored one. Codes of 8 bits are stored 128 higher.

#![forbid(unsafe_code)]

use std::sync::Arc;

use half::f16;

use super::compensation::Compensated;
use super::grid::{SMALL, stored_scale};
use super::pages::{KeyPage, TokenKeys, TokenValues, ValuePage};
use super::tokens::{Format, ScaledCoding, TokenCoding};
use super::{Codec, Gptq, Method, Plan, f16_limit};
use crate::error::{Result, refuse};
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// Channels that share a scale.
const SIZE: usize = 32;

/// The parameters of a block format.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// The newest tokens, which stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// How roundings are made up for, if they are.
    pub compensation: Option<Arc<Gptq>>,
    blocks: Arc<Blocks>,
}

/// Blocks with codes of so many bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) bits: u8,
}

impl Block {
    /// Checks the parameters: bits of a code are 4 or 8.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: u8, window: usize, sinks: usize) -> Result<Self> {
        if !matches!(bits, 4 | 8) {
            return refuse("bits", bits, "4, 8");
        }
        Ok(Self { window, sinks, compensation: None, blocks: Arc::new(Blocks { bits }) })
    }

    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let block = Self::new(options.whole("bits")?, options.whole("window")?, options.whole("sinks")?)?;
        Ok(Self { compensation: Gptq::of(options)?, ..block })
    }
}

impl Method for Block {
    fn sinks(&self) -> usize {
        self.sinks
    }

    fn window(&self) -> usize {
        self.window
    }

    fn limit(&self) -> Limit {
        Limit::of_numbers(f16_limit())
    }

    fn compensation(&self) -> Option<&Arc<Gptq>> {
        self.compensation.as_ref()
    }
}

impl Codec<KeyPage> for Block {
    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(KeyPage, usize)> {
        Ok(TokenKeys::seal(self.blocks.clone(), None, plan.compensation(self.compensation()).as_deref(), rows, n))
    }
}

impl Codec<ValuePage> for Block {
    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(ValuePage, usize)> {
        let format = Format::new(self.blocks.clone(), None, rows.dim());
        Ok(TokenValues::seal(format, plan.compensation(self.compensation()).as_deref(), rows, n))
    }
}

impl Blocks {
    /// The code that stands for 0.
    pub(super) fn middle(self) -> f32 {
        if self.bits == 8 { 128.0 } else { 8.0 }
    }

    /// The scale of a block before it is rounded; where rounding would matter, as it is stored.
    fn scale(self, x: &[f32]) -> f32 {
        let largest = x.iter().fold(0.0f32, |largest, &x| if x.abs() > largest.abs() { x } else { largest });
        let (scale, most) = if self.bits == 8 { (largest.abs() / 127.0, 127.0) } else { (largest / -8.0, 8.0) };
        let stored = stored_scale(scale, most).to_f32();
        let ordinary = scale == 0.0 || scale.abs() >= SMALL && f16::from_f32(scale).to_f32() == stored;
        if ordinary { scale } else { stored }
    }

    /// The code of a number in units of the scale; one beyond the block's largest, which compensation can make, is clamped.
    fn code(self, x: f32) -> u8 {
        if self.bits == 8 { (x.round().clamp(-127.0, 127.0) + 128.0) as u8 } else { ((x + 8.5) as u8).min(15) }
    }
}

impl TokenCoding for Blocks {
    fn bits(&self) -> u8 {
        self.bits
    }

    fn group(&self) -> usize {
        SIZE
    }

    fn origin(&self) -> Option<f32> {
        Some(self.middle())
    }

    fn encode(&self, x: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let scale = self.scale(x);
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        for (code, &x) in codes.iter_mut().zip(x) {
            *code = self.code(x * inverse);
        }
        (f16::from_f32(scale), f16::ZERO)
    }

    fn encode_compensated(&self, group: Compensated<'_>) -> (f16, f16) {
        let scale = self.scale(group.numbers());
        let (stored, inverse) = (f16::from_f32(scale), if scale == 0.0 { 0.0 } else { 1.0 / scale });
        let decode = |code| stored.to_f32() * (f32::from(code) - self.middle());
        group.encode(|x| self.code(x * inverse), decode);
        (stored, f16::ZERO)
    }
}

impl ScaledCoding for Blocks {}
