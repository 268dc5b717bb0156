//! KVQuant: pre-RoPE keys on static grids, levels that are not evenly spaced, and outliers apart (Hooper et al. 2024,
//! arXiv 2401.18079).
//!
//! ```text
//! keys, before RoPE, channel c:   low_c, high_c from a calibration
//! values, token t:                low_t, high_t = smallest and largest number that is no outlier
//! n = (x - mid) / half            mid = (low + high) / 2    half = (high - low) / 2
//! code = the nearest of 2^bits levels, which are the layer's, from a weighted k-means of a calibration
//! x' = mid + half (a level + b)   a = 1, b = 0, or such that levels keep mean and deviation (Q-Norm)
//! ```
//!
//! Outliers are a share of each vector, at least one: of keys the numbers furthest outside their range, if there are any there,
//! of values those without which the range is smallest. They get codes as well; what the code lacks is stored beside it.
//! The vector is that of a KV head, where the paper takes all heads' together; the number of outliers is its capped variant's.
//!
//! Grids of keys are static, so each token can be packed at once. A page holds keys as they were before RoPE, and rotates them
//! when it is read ([`crate::linalg::Rope`]).

#![forbid(unsafe_code)]

mod codecs;

pub(super) use codecs::from_options;
pub use codecs::{KvQuantKeys, KvQuantValues};

use std::sync::Arc;

use half::f16;

use crate::error::{Result, refuse};
use crate::format::Levels;
use crate::linalg::Rope;
use crate::quantize::f16_limit;
use crate::quantize::grid::{SMALL, levels, stored_scale};
use crate::quantize::levels::{TOP, Table};
use crate::quantize::tokens::TokenCoding;
use crate::tensor::Limit;

/// The parameters of KVQuant, and the levels that a calibration found for a layer's keys, or its values.
#[derive(Clone, Debug, PartialEq)]
pub struct KvQuant {
    /// Bits of a code: 2, 3 or 4.
    pub bits: u8,
    /// The levels of normalised numbers.
    pub table: Table,
    /// `a` and `b` of Q-Norm.
    pub norm: [f32; 2],
    /// The share of a vector's numbers that are outliers.
    pub outliers: f32,
    /// The newest tokens, which stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
}

/// Grids of keys that were found beforehand.
#[derive(Clone, Debug, PartialEq)]
pub struct StaticKeys {
    /// The lower end of every channel's range, of each KV head.
    pub low: Box<[Box<[f32]>]>,
    /// The upper end.
    pub high: Box<[Box<[f32]>]>,
    /// The rotation to be undone.
    pub rope: Arc<Rope>,
}

impl KvQuant {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: u8, steps: &[f32], norm: [f32; 2], outliers: f32, window: usize, sinks: usize) -> Result<Self> {
        if !matches!(bits, 2..=4) {
            return refuse("bits", bits, "2, 3, 4");
        }
        let count = usize::from(levels(bits) as u8) + 1;
        if steps.len() != count || !steps.is_sorted() || steps[0] >= steps[count - 1] || !finite(steps) {
            return refuse("levels", format!("{steps:?}"), format!("{count} finite numbers in ascending order"));
        }
        if !(0.0..=0.25).contains(&outliers) {
            return refuse("outliers", outliers, "shares from 0 to 0.25");
        }
        if !finite(&norm) || norm[0] <= 0.0 {
            return refuse("norm", format!("{norm:?}"), "a positive factor and a finite offset");
        }
        Ok(Self { bits, table: Table::new(steps), norm, outliers, window, sinks })
    }

    /// How far what is stored of a number may be from 0, in the largest magnitude of its vector: what a code lacks is largest.
    fn reach(&self) -> f32 {
        let (first, last) = (self.table.first, self.table.first + self.table.span);
        2.0 * (self.norm[0] * first.abs().max(last.abs()) + self.norm[1].abs()).max(1.0)
    }

    pub(in crate::quantize) fn limit(&self) -> Limit {
        Limit::of_numbers(f16_limit() / self.reach())
    }

    /// Places for outliers in a vector of `dim` numbers.
    pub(in crate::quantize) fn places_of(&self, dim: usize) -> usize {
        if self.outliers == 0.0 { 0 } else { ((self.outliers * dim as f32).round() as usize).max(1) }
    }

    /// The grid of the range from `low` to `high`: what an entry of the table is worth, and what entry 0 stands for.
    pub(in crate::quantize) fn grid(&self, low: f32, high: f32) -> (f32, f32) {
        let (mid, half, [factor, offset]) = (low.midpoint(high), (high - low) / 2.0, self.norm);
        (half * factor * self.table.span / TOP, mid + half * (factor * self.table.first + offset))
    }

    /// The codes of `x`, number `c` of which has the range `of(c)`.
    pub(in crate::quantize) fn encode_within(&self, x: &[f32], codes: &mut [u8], of: impl Fn(usize) -> (f32, f32)) {
        let units = TOP / self.table.span;
        for (c, (code, &x)) in codes.iter_mut().zip(x).enumerate() {
            *code = self.table.nearest((normalised(x, of(c)) - self.table.first) * units);
        }
    }

    /// What `code` stands for on a grid.
    pub(in crate::quantize) fn decode(&self, code: u8, (scale, zero): (f32, f32)) -> f32 {
        scale * f32::from(self.table.levels().of(code)) + zero
    }

    /// The codes of a value, its grid, and its outliers.
    fn encode_value(&self, x: &[f32], codes: &mut [u8]) -> ((f16, f16), Vec<(u8, f16)>) {
        let (range, outliers) = self.value_range(x);
        self.encode_within(x, codes, |_| range);
        let (scale, zero) = self.grid(range.0, range.1);
        let mut grid = (f16::from_f32(scale), f16::from_f32(zero));
        if scale < SMALL {
            // Halves are coarse near 0: codes go by the grid as it is stored, and nothing is better than what errs more than that.
            grid.0 = stored_scale(scale, 0.0);
            let stored = (grid.0.to_f32(), grid.1.to_f32());
            let mut error = 0.0;
            for (c, (code, &x)) in codes.iter_mut().zip(x).enumerate() {
                *code = if stored.0 > 0.0 { self.table.nearest((x - stored.1) / stored.0) } else { 0 };
                if !outliers.contains(&(c as u8)) {
                    error += (x - self.decode(*code, stored)).powi(2) - x.powi(2);
                }
            }
            if error >= 0.0 {
                grid = (f16::ZERO, f16::ZERO);
            }
        }
        let lacks = |channel: u8| {
            let c = usize::from(channel);
            f16::from_f32(x[c] - self.decode(codes[c], (grid.0.to_f32(), grid.1.to_f32())))
        };
        (grid, outliers.into_iter().map(|channel| (channel, lacks(channel))).collect())
    }

    /// The range of a value without its outliers, and which these are.
    fn value_range(&self, x: &[f32]) -> ((f32, f32), Vec<u8>) {
        let places = self.places_of(x.len()).min(x.len() - 1);
        let lowest = leading(x, places + 1, |x, other| x < other);
        let highest = leading(x, places + 1, |x, other| x > other);
        let (at, mut outliers) = (|c: u8| x[usize::from(c)], Vec::with_capacity(places));
        let (mut low, mut high) = (0, 0);
        while outliers.len() < places {
            if at(highest[high]) - at(highest[high + 1]) > at(lowest[low + 1]) - at(lowest[low]) {
                outliers.push(highest[high]);
                high += 1;
            } else {
                outliers.push(lowest[low]);
                low += 1;
            }
        }
        ((at(lowest[low]), at(highest[high])), outliers)
    }
}

impl TokenCoding for KvQuant {
    fn bits(&self) -> u8 {
        self.bits
    }

    fn levels(&self) -> Option<&Levels> {
        Some(self.table.levels())
    }

    fn group(&self) -> usize {
        0
    }

    fn places(&self, dim: usize) -> usize {
        self.places_of(dim)
    }

    fn encode(&self, x: &[f32], codes: &mut [u8]) -> (f16, f16) {
        self.encode_value(x, codes).0
    }

    fn encode_token(&self, x: &[f32], codes: &mut [u8], grids: &mut [(f16, f16)]) -> Vec<(u8, f16)> {
        let (grid, outliers) = self.encode_value(x, codes);
        grids.fill(grid);
        outliers
    }
}

impl StaticKeys {
    pub(in crate::quantize) fn check(&self) -> Result<()> {
        let dims: Vec<usize> = self.low.iter().chain(&self.high).map(|x| x.len()).collect();
        if self.low.len() != self.high.len() || dims.is_empty() || dims.iter().any(|&n| n != dims[0]) {
            return refuse("ranges", format!("ends of {dims:?} channels"), "a lower and an upper end for each channel");
        }
        let mut ends = self.low.iter().flatten().zip(self.high.iter().flatten());
        if let Some((low, high)) = ends.find(|&(low, high)| !(low <= high && finite(&[*low, *high]))) {
            return refuse("ranges", format!("{low} to {high}"), "finite ends in ascending order");
        }
        Ok(())
    }

    /// The range of channel `c` of KV head `head`.
    pub(in crate::quantize) fn range(&self, head: usize, c: usize) -> (f32, f32) {
        (self.low[head][c], self.high[head][c])
    }

    /// The channels of `x` that are outside their range, at most `places`, furthest first.
    pub(in crate::quantize) fn outliers(&self, head: usize, x: &[f32], places: usize) -> Vec<u8> {
        let outside = |c: u8| normalised(x[usize::from(c)], self.range(head, c.into())).abs();
        let mut found: Vec<u8> = (0..x.len() as u16).map(|c| c as u8).filter(|&c| outside(c) > 1.0).collect();
        found.sort_by(|&a, &b| outside(b).total_cmp(&outside(a)).then(a.cmp(&b)));
        found.truncate(places);
        found
    }

    /// Bytes allocated, without those of the rotation.
    pub fn bytes(&self) -> usize {
        let numbers: usize = self.low.iter().chain(&self.high).map(|x| x.len()).sum();
        size_of::<Self>() + numbers * size_of::<f32>() + (self.low.len() + self.high.len()) * size_of::<Box<[f32]>>()
    }
}

/// Checks that vectors have at most 256 numbers: the channel of an outlier is a byte.
pub(in crate::quantize) fn check_dim(dim: usize) -> Result<()> {
    if dim <= 256 {
        return Ok(());
    }
    refuse("quantize", format!("KVQuant with vectors of {dim} numbers"), "head dims up to 256")
}

/// The `n` numbers of `x` that come before all others by `before`, in that order; of equal ones the first.
fn leading(x: &[f32], n: usize, before: impl Fn(f32, f32) -> bool) -> Vec<u8> {
    let mut found: Vec<u8> = Vec::with_capacity(n + 1);
    for (c, &value) in x.iter().enumerate() {
        if found.len() == n && !before(value, x[usize::from(found[n - 1])]) {
            continue;
        }
        let place = found.iter().position(|&other| before(value, x[usize::from(other)])).unwrap_or(found.len());
        found.insert(place, c as u8);
        found.truncate(n);
    }
    found
}

/// `x` as a share of half the range, from its middle; 0 where the range is a point.
fn normalised(x: f32, (low, high): (f32, f32)) -> f32 {
    let half = (high - low) / 2.0;
    if half > 0.0 { (x - low.midpoint(high)) / half } else { 0.0 }
}

fn finite(x: &[f32]) -> bool {
    x.iter().all(|x| x.is_finite())
}
