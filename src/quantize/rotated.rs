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
//! It is at most what makes `|x'| = 2 |x|`: more than any that fits needs.
//! The paper's levels are Lloyd and Max's, which here are an option: then `code = the nearest of them`, and they take the place
//! of `code` and `m` the middle of theirs. A uniform grid errs 1 % (2 bits) to 20 % (4 bits) more. The paper's second stage
//! (QJL) is left out: what it adds to the variance harms attention more than the bias that it removes.

#![forbid(unsafe_code)]

use std::sync::Arc;

use half::f16;

use super::compensation::Compensated;
use super::grid::{SMALL, levels, round, stored_scale};
use super::levels::{TOP, Table, lloyd_max};
use super::pages::{KeyPage, TokenKeys, TokenValues, ValuePage};
use super::tokens::{Format, ScaledCoding, TokenCoding};
use super::{Codec, Gptq, Method, Plan, f16_limit};
use crate::error::{Result, refuse};
use crate::format::Levels;
use crate::format::codes::MOST_OUTER;
use crate::linalg::Map;
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// The parameters of rotated tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotated {
    /// The newest tokens, which stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// Of the random signs.
    pub seed: u64,
    /// How roundings are made up for, if they are.
    pub compensation: Option<Arc<Gptq>>,
    grids: Arc<Symmetric>,
}

/// Grids of numbers that are nearly normal.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Symmetric {
    /// Bits of a code: 2, 3, 4 or 8.
    bits: u8,
    /// Numbers that share a scale, after the rotation; 0: all.
    group: usize,
    /// Lloyd's and Max's levels; without them they are evenly spaced.
    table: Option<Table>,
}

/// How the levels of a grid lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// Evenly.
    Uniform,
    /// So that normal numbers err least.
    LloydMax,
}

impl Spacing {
    fn of(name: &str) -> Result<Self> {
        match name {
            "uniform" => Ok(Self::Uniform),
            "lloyd-max" => Ok(Self::LloydMax),
            _ => refuse("levels", name, "uniform, lloyd-max"),
        }
    }
}

impl Rotated {
    /// Checks the parameters: bits of a code are 2, 3, 4 or 8, `group` numbers share a scale after the rotation, 0: all.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: u8, spacing: Spacing, group: usize, window: usize, sinks: usize, seed: u64) -> Result<Self> {
        let grids = Arc::new(Symmetric::new(bits, spacing, group)?);
        Ok(Self { window, sinks, seed, compensation: None, grids })
    }

    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let spacing = Spacing::of(&options.text("levels")?)?;
        let sizes = [options.whole("group")?, options.whole("window")?, options.whole("sinks")?];
        let seed = options.whole("seed")?;
        let rotated = Self::new(options.whole("bits")?, spacing, sizes[0], sizes[1], sizes[2], seed)?;
        Ok(Self { compensation: Gptq::of(options)?, ..rotated })
    }

    fn map(&self, plan: &mut Plan, dim: usize) -> Arc<Map> {
        plan.map(|| Map::hadamard(dim, self.seed))
    }
}

impl Method for Rotated {
    fn sinks(&self) -> usize {
        self.sinks
    }

    fn window(&self) -> usize {
        self.window
    }

    /// Half of what float16 holds: what is put together from rotated numbers may be larger than what was taken apart.
    fn limit(&self) -> Limit {
        Limit { number: f16_limit() / 2.0, norm: self.grids.longest() }
    }

    fn compensation(&self) -> Option<&Arc<Gptq>> {
        self.compensation.as_ref()
    }
}

impl Codec<KeyPage> for Rotated {
    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(KeyPage, usize)> {
        let map = self.map(plan, rows.dim());
        Ok(TokenKeys::seal(self.grids.clone(), Some(map), plan.compensation(self.compensation()).as_deref(), rows, n))
    }
}

impl Codec<ValuePage> for Rotated {
    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(ValuePage, usize)> {
        let format = Format::new(self.grids.clone(), Some(self.map(plan, rows.dim())), rows.dim());
        Ok(TokenValues::seal(format, plan.compensation(self.compensation()).as_deref(), rows, n))
    }
}

impl Symmetric {
    pub(super) fn new(bits: u8, spacing: Spacing, group: usize) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return refuse("bits", bits, "2, 3, 4, 8");
        }
        if !group.is_multiple_of(MOST_OUTER) || group > 256 {
            return refuse("group", group, "0 for the whole head dim, or multiples of 16 up to 256");
        }
        let table = match spacing {
            Spacing::Uniform => None,
            Spacing::LloydMax if bits == 8 => return refuse("bits", bits, "2, 3, 4 with Lloyd-Max levels"),
            Spacing::LloydMax => {
                let half = lloyd_max(bits);
                let levels: Vec<f32> = half.iter().rev().map(|l| -l).chain(half.iter().copied()).collect();
                Some(Table::new(&levels))
            }
        };
        Ok(Self { bits, group, table })
    }

    /// What stands for 0.
    pub(super) fn middle(&self) -> f32 {
        if self.table.is_some() { TOP / 2.0 } else { levels(self.bits) / 2.0 }
    }

    /// The best step for numbers with variance 1 (Max 1960).
    fn best_step(&self) -> f32 {
        if let Some(table) = &self.table {
            return table.span / TOP;
        }
        match self.bits {
            2 => 0.9957,
            3 => 0.5860,
            4 => 0.3352,
            _ => 0.0308,
        }
    }

    /// The step with which numbers are coded; infinite where all are 0.
    fn step(&self, y: &[f32]) -> f32 {
        let square: f32 = y.iter().map(|y| y * y).sum();
        if square == 0.0 {
            return f32::INFINITY;
        }
        let rms = (square / y.len() as f32).sqrt();
        let largest = y.iter().fold(0.0f32, |largest, y| largest.max(y.abs()));
        let [normal, whole] = [self.best_step() * rms, largest / self.middle()];
        let best = if self.error(y, whole) < self.error(y, normal) { whole } else { normal };
        if best < SMALL { stored_scale(best, 0.0).to_f32() } else { best }
    }

    /// The scale that is stored with the codes of numbers, which were coded with `step`.
    fn scale(&self, y: &[f32], codes: &[u8], step: f32) -> f16 {
        let square: f32 = y.iter().map(|y| y * y).sum();
        if step < SMALL {
            // The step is a half itself, and halves are coarse: nothing is better than what errs more than that.
            let error = |(y, &code): (&f32, &u8)| (y - self.decode(code, step)).powi(2);
            let better = y.iter().zip(codes).map(error).sum::<f32>() < square;
            return if better { f16::from_f32(step) } else { f16::ZERO };
        }
        let entries = codes.iter().map(|&code| self.stands_for(code) - self.middle());
        let sums =
            |(product, length): (f32, f32), (y, entry): (&f32, f32)| (product + y * entry, length + entry * entry);
        let (product, length) = y.iter().zip(entries).fold((0.0, 0.0), sums);
        if square == 0.0 || product <= 0.0 {
            return f16::ZERO;
        }
        // At least as long as the numbers, but at most twice: codes that fit badly do not make them any longer.
        let twice = 2.0 * (square / length).sqrt();
        f16::from_f32((square / product).min(twice).min(f16::MAX.to_f32()))
    }

    /// What a code stands for when numbers are coded with `step`.
    pub(super) fn decode(&self, code: u8, step: f32) -> f32 {
        if step.is_finite() { step * (self.stands_for(code) - self.middle()) } else { 0.0 }
    }

    /// The code of a number in steps.
    fn code(&self, y: f32) -> u8 {
        match &self.table {
            Some(table) => table.nearest(y + TOP / 2.0),
            None => round(y + levels(self.bits) / 2.0, levels(self.bits)),
        }
    }

    fn stands_for(&self, code: u8) -> f32 {
        f32::from(self.table.as_ref().map_or(code, |table| table.levels().of(code)))
    }

    fn error(&self, y: &[f32], step: f32) -> f32 {
        let (inverse, middle) = (1.0 / step, self.middle());
        y.iter().map(|&y| (y - step * (self.stands_for(self.code(y * inverse)) - middle)).powi(2)).sum()
    }
}

impl TokenCoding for Symmetric {
    fn bits(&self) -> u8 {
        self.bits
    }

    fn levels(&self) -> Option<&Levels> {
        self.table.as_ref().map(Table::levels)
    }

    fn group(&self) -> usize {
        self.group
    }

    fn origin(&self) -> Option<f32> {
        Some(self.middle())
    }

    /// The longest vector whose scales float16 holds. With `step <= max(best_step, 1 / m) |y|`, a number is at most 2.2 times what
    /// its code stands for, or the code is the last one, and the number `|y|` at most: so `scale <= 2.2 max(best_step, 1 / m) |y|`.
    /// Lloyd's and Max's levels, whose scales are smaller, have the limit of evenly spaced ones that reach as far: they err as much.
    fn longest(&self) -> f32 {
        let apart = self.middle() / (levels(self.bits) / 2.0);
        f16::MAX.to_f32() / (2.2 * apart * self.best_step().max(1.0 / self.middle()))
    }

    fn encode(&self, y: &[f32], codes: &mut [u8]) -> (f16, f16) {
        let step = self.step(y);
        for (code, &y) in codes.iter_mut().zip(y) {
            *code = self.code(y / step);
        }
        (self.scale(y, codes, step), f16::ZERO)
    }

    fn encode_compensated(&self, group: Compensated<'_>) -> (f16, f16) {
        let step = self.step(group.numbers());
        let (exact, codes) = group.encode(|x| self.code(x / step), |code| self.decode(code, step));
        (self.scale(exact, codes, step), f16::ZERO)
    }
}

impl ScaledCoding for Symmetric {}
