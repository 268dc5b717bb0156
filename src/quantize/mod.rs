//! The `quantize` family: fewer bits a number.
//!
//! A codec has a method for keys and one for values. A method seals tokens into pages and says when: how many of the oldest
//! unpacked tokens are due. A page holds the keys or the values of consecutive tokens of one KV head; it is shared behind an
//! `Arc` and copied before a change. To add a method: one file, a variant of [`Method`], and if no page fits a page type.

#![forbid(unsafe_code)]

mod block;
mod channels;
mod exact;
mod feedback;
mod graded;
mod kivi;
mod kvarn;
mod kvquant;
mod levels;
mod moved;
mod outliers;
mod pages;
mod plan;
mod rotated;
mod tokens;
mod unrotated;

pub use block::Block;
pub use channels::{Band, ChannelKeys};
pub(crate) use feedback::SAMPLES;
pub use feedback::{Factor, Gptq};
pub use graded::Graded;
pub use kivi::Kivi;
pub use kvarn::Kvarn;
pub use kvquant::{KvQuant, StaticKeys};
pub use moved::Moved;
pub use pages::{KeyPage, Page, PageBytes, ValuePage};
pub use plan::Plan;
pub(crate) use plan::SHORT;
pub use rotated::{Rotated, Spacing};
pub use tokens::{TokenKeys, TokenValues};
pub use unrotated::UnrotatedKeys;

use std::sync::Arc;

use half::f16;
use half::slice::HalfBitsSliceExt;

use crate::attend::CHUNK;
use crate::attend::codes::LANES;
use crate::error::{Error, Result};
use crate::tensor::{Limit, Slice, f16_below};

/// How keys and values that have left the exact tail are stored.
#[derive(Clone, Debug, PartialEq)]
pub struct Codec {
    /// Keys.
    pub keys: Method,
    /// Values.
    pub values: Method,
}

/// A way of storing keys, or values.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// The model's own dtype, lossless.
    Exact,
    /// KIVI (arXiv 2402.02750): per channel, or per token.
    Kivi(Kivi),
    /// Blocks of 32 channels as llama.cpp's `q8_0` and `q4_0`.
    Block(Block),
    /// A random rotation and one scale a token (`TurboQuant`-MSE, arXiv 2504.19874, on a uniform grid).
    Rotated(Rotated),
    /// Per channel as KIVI's keys, with bits by what a channel's error costs. Keys only.
    Graded(Graded),
    /// `KVarN` (arXiv 2606.03458): blocks whose tokens and channels are normalised.
    Kvarn(Kvarn),
    /// KVQuant (arXiv 2401.18079): un-rotated keys, levels that are not evenly spaced, outliers apart.
    KvQuant(Arc<KvQuant>),
}

impl Codec {
    /// Everything in the model's own dtype.
    pub const EXACT: Self = Self { keys: Method::Exact, values: Method::Exact };

    /// KIVI for keys and values.
    pub fn kivi(kivi: Kivi) -> Self {
        Self { keys: Method::Kivi(kivi.clone()), values: Method::Kivi(kivi) }
    }

    /// Keys by one method, values by another.
    ///
    /// # Errors
    /// [`Error::Option`] when the method for values is one for keys only.
    pub fn new(keys: Method, values: Method) -> Result<Self> {
        if values.feedback().is_some_and(|gptq| gptq.wants_queries()) {
            return refuse("feedback", "GPTQ without metrics", "GPTQ with metrics, for values");
        }
        if let Method::Graded(_) = values {
            return refuse("values", "graded", "exact, kivi, block, rotated, kvarn, kvquant");
        }
        if let Method::KvQuant(kvquant) = &keys
            && kvquant.keys.is_none()
        {
            return refuse("keys", "kvquant without the ranges of channels", "a calibration of KVQuant");
        }
        Ok(Self { keys, values })
    }

    /// Tokens of one forward up to which packing waits for the next forward, so that they can be cropped.
    pub fn window(&self) -> usize {
        match self.keys.window().max(self.values.window()) {
            0 => exact::PAGE,
            window => window,
        }
    }

    /// Bytes of what a calibration found; and a number and bytes of the angles that all layers with the same rotary embedding
    /// share.
    pub fn tables(&self) -> (usize, Option<(usize, usize)>) {
        let metrics =
            [&self.keys, &self.values].into_iter().filter_map(Method::feedback).map(|gptq| gptq.bytes()).sum();
        let Method::KvQuant(kvquant) = &self.keys else { return (metrics, None) };
        let angles = |keys: &StaticKeys| (Arc::as_ptr(&keys.rope) as usize, keys.rope.bytes());
        (metrics + kvquant.keys.as_ref().map_or(0, |keys| keys.bytes()), kvquant.keys.as_deref().map(angles))
    }

    /// Checks that the parameters fit keys of `key_dim` numbers and values of `value_dim`, of `heads` KV heads if it is known
    /// how many there are.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when they do not.
    pub fn check_dims(&self, heads: Option<usize>, key_dim: usize, value_dim: usize) -> Result<()> {
        if let Method::Kivi(kivi) = &self.values {
            kivi.check_dims(value_dim)?;
        }
        if let Method::Graded(_) = self.keys {
            graded::check_dim(key_dim)?;
        }
        if let Method::KvQuant(kvquant) = &self.keys {
            kvquant.check_keys(heads, key_dim)?;
        }
        if let Method::KvQuant(_) = self.values {
            kvquant::check_dim(value_dim)?;
        }
        for (method, dim) in [(&self.keys, key_dim), (&self.values, value_dim)] {
            method.feedback().map_or(Ok(()), |gptq| gptq.check_dims(heads, dim))?;
        }
        Ok(())
    }
}

impl Method {
    /// Tokens at the beginning of a sequence that stay exact.
    pub fn sinks(&self) -> usize {
        match self {
            Self::Exact => 0,
            Self::Kivi(Kivi { sinks, .. })
            | Self::Block(Block { sinks, .. })
            | Self::Rotated(Rotated { sinks, .. })
            | Self::Kvarn(Kvarn { sinks, .. })
            | Self::Graded(Graded { sinks, .. }) => *sinks,
            Self::KvQuant(kvquant) => kvquant.sinks,
        }
    }

    fn window(&self) -> usize {
        match self {
            Self::Exact => exact::PAGE,
            Self::Kivi(Kivi { window, .. })
            | Self::Block(Block { window, .. })
            | Self::Rotated(Rotated { window, .. })
            | Self::Graded(Graded { window, .. }) => *window,
            Self::Kvarn(_) => kvarn::BLOCK,
            Self::KvQuant(kvquant) => kvquant.window,
        }
    }

    /// The largest numbers and vectors that can be stored.
    pub fn limit(&self) -> Limit {
        let most = f16::MAX.to_f32();
        match self {
            Self::Exact => Limit::of_numbers(f32::MAX),
            // Half of what float16 holds: what is put together from rotated numbers may be larger than what was taken apart.
            Self::Rotated(rotated) => Limit { number: most / 2.0, norm: rotated.longest() },
            // The errors of 2 bits spread over all numbers of a block.
            Self::Kvarn(_) => Limit::of_numbers(most / 4.0),
            Self::KvQuant(kvquant) => Limit::of_numbers(most / kvquant.reach()),
            Self::Kivi(_) | Self::Block(_) | Self::Graded(_) => Limit::of_numbers(most),
        }
    }

    /// Whether what queries are like decides something.
    pub fn wants_queries(&self) -> bool {
        self.wants_squares() || self.wants_moment()
    }

    /// Whether the mean squares of queries are wanted, channel by channel.
    pub fn wants_squares(&self) -> bool {
        matches!(self, Self::Graded(_))
    }

    /// Whether the second moment of a prompt's queries is wanted.
    pub fn wants_moment(&self) -> bool {
        self.feedback().is_some_and(|gptq| gptq.wants_queries())
    }

    /// How roundings are made up for, if they are.
    pub fn feedback(&self) -> Option<&Arc<Gptq>> {
        match self {
            Self::Kivi(Kivi { feedback, .. })
            | Self::Block(Block { feedback, .. })
            | Self::Rotated(Rotated { feedback, .. })
            | Self::Graded(Graded { feedback, .. }) => feedback.as_ref(),
            Self::Exact | Self::Kvarn(_) | Self::KvQuant(_) => None,
        }
    }

    /// The same method with at least the newest `window` tokens exact, where the published rule packs whole windows at once.
    ///
    /// # Errors
    /// [`Error::Option`] when it is none of those with such a rule.
    pub fn with_full_window(mut self) -> Result<Self> {
        let (Self::Kivi(Kivi { full_window, .. })
        | Self::Graded(Graded { full_window, .. })
        | Self::Kvarn(Kvarn { full_window, .. })) = &mut self
        else {
            return refuse("full_window", "true", "false with this method; true with KIVI, Graded, KVarN");
        };
        *full_window = true;
        Ok(self)
    }

    /// The same method with feedback.
    ///
    /// # Errors
    /// [`Error::Option`] when it is none of those that can have it.
    pub fn with_feedback(mut self, gptq: Gptq) -> Result<Self> {
        let (Self::Kivi(Kivi { feedback, .. })
        | Self::Block(Block { feedback, .. })
        | Self::Rotated(Rotated { feedback, .. })
        | Self::Graded(Graded { feedback, .. })) = &mut self
        else {
            return refuse("feedback", "GPTQ", "None with this method; GPTQ with KIVI, Q8, Q4, Rotated, Graded");
        };
        *feedback = Some(Arc::new(gptq));
        Ok(self)
    }
}

/// A scale, a half, at whose size halves are so coarse that codes go by the scale as it is stored.
const SMALL: f32 = 1.0 / 65536.0;

/// The half next to `scale` with which codes up to `largest` stand for numbers that halves hold; below [`SMALL`] the next one
/// away from 0, so that codes reach what they stand for.
fn stored_scale(scale: f32, largest: f32) -> f16 {
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

/// Checks a group of tokens that share a grid, and the window that is packed at a time.
fn check_groups(group: usize, window: usize) -> Result<()> {
    if group == 0 || !group.is_multiple_of(LANES) || group > CHUNK {
        return refuse("group", group, "multiples of 8 from 8 to 256");
    }
    if window == 0 || !window.is_multiple_of(group) {
        return refuse("window", window, format!("positive multiples of group={group}"));
    }
    Ok(())
}

/// How many of `n` tokens are packed when whole windows of them are packed at a time: the published rule leaves fewer than a window
/// exact, a full window leaves at least that.
fn whole_windows(n: usize, window: usize, full: bool) -> usize {
    n.saturating_sub(if full { window } else { 0 }) / window * window
}

/// Refuses an option.
fn refuse<T>(name: &'static str, given: impl std::fmt::Display, accepted: impl Into<String>) -> Result<T> {
    Err(Error::Option { name, given: given.to_string(), accepted: accepted.into() })
}

/// The code next to `x`, half to even, from 0 to `levels`.
fn round(x: f32, levels: f32) -> u8 {
    // Adding 1.5 * 2^23 leaves the number, rounded, in the lowest bits: no call, and it vectorises.
    (x.clamp(0.0, levels) + 12_582_912.0).to_bits() as u8
}

/// The memory of words.
fn bytes_of(words: &[u16]) -> &[u8] {
    Slice::F16(words.reinterpret_cast()).bytes()
}

/// The largest code.
fn levels(bits: u8) -> f32 {
    f32::from(u8::MAX >> (8 - bits))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of magnitudes from those of denormals to the largest half.
    fn magnitudes() -> impl Iterator<Item = f32> {
        (-140..=15).map(|e| (e as f32).exp2() * 1.37).chain([1e-45, 6e-8, 65504.0])
    }

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * i) as f32 * 0.37).sin()).collect()
    }

    fn square(x: &[f32]) -> f64 {
        x.iter().map(|x| f64::from(*x).powi(2)).sum()
    }

    /// That what is stored of `x` errs no more than zeros would.
    fn no_worse_than_zeros(what: &str, x: &[f32], stored: &[f32]) {
        assert!(stored.iter().all(|x| x.abs() <= f16::MAX.to_f32()), "{what}: {stored:?}");
        let error: Vec<f32> = x.iter().zip(stored).map(|(x, stored)| x - stored).collect();
        assert!(square(&error) <= square(x) * (1.0 + 1e-6), "{what} of {x:?}: {stored:?}");
    }

    #[test]
    fn scales_of_any_size() {
        for scale in magnitudes().chain([0.0]).flat_map(|m| [m, -m]) {
            for largest in [8.0, 127.0] {
                let stored = stored_scale(scale, largest).to_f32();
                assert!(stored.abs() * largest <= f16::MAX.to_f32() && stored * scale >= 0.0);
                assert!(scale.abs() >= SMALL || stored.abs() >= scale.abs(), "{scale}: {stored}");
                assert!(scale.abs() < SMALL || scale.abs() * largest > 65e3 || (stored / scale - 1.0).abs() < 1e-2);
            }
        }
    }

    #[test]
    fn groups_of_any_size() {
        let mut codes = [0; 32];
        for magnitude in magnitudes() {
            let x: Vec<f32> = wave(32).iter().map(|x| (x * magnitude).clamp(-65504.0, 65504.0)).collect();
            for bits in [2, 3, 4, 8] {
                let (scale, zero) = Kivi::new(bits, 32, 32, 0).unwrap().encode(&x, &mut codes);
                let stored: Vec<f32> = codes.iter().map(|&c| zero.to_f32() + scale.to_f32() * f32::from(c)).collect();
                no_worse_than_zeros("kivi", &x, &stored);
            }
            for bits in [4, 8] {
                let block = Block::new(bits, 0, 0).unwrap();
                let scale = block.encode(&x, &mut codes);
                let stored: Vec<f32> =
                    codes.iter().map(|&c| scale.to_f32() * (f32::from(c) - block.origin())).collect();
                no_worse_than_zeros("block", &x, &stored);
            }
        }
    }

    #[test]
    fn rotated_numbers_of_any_size() {
        let mut codes = [0; 32];
        for (bits, spacing) in [2, 3, 4]
            .into_iter()
            .flat_map(|bits| [(bits, Spacing::Uniform), (bits, Spacing::LloydMax)])
            .chain([(8, Spacing::Uniform)])
        {
            let rotated = Rotated::new(bits, spacing, 0, 0, 0, 0).unwrap();
            for magnitude in magnitudes().filter(|&m| m < 2e3) {
                let y: Vec<f32> = wave(32).iter().map(|y| y * magnitude).collect();
                let scale = rotated.encode(&y, &mut codes).to_f32();
                let stored: Vec<f32> = codes.iter().map(|&code| rotated.decode(code, scale)).collect();
                no_worse_than_zeros("rotated", &y, &stored);
            }
            // As long as can be, with all of it in one number, in some, or in all.
            for n in 1..=32 {
                let length = rotated.longest() / (n as f32).sqrt();
                let y: Vec<f32> = (0..32).map(|i| if i < n { length * 0.999 } else { 0.0 }).collect();
                let scale = rotated.encode(&y, &mut codes);
                assert!(scale < f16::MAX, "{bits} bits, {n} numbers of {length}");
            }
        }
    }
}
