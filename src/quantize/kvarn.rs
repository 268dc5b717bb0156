//! `KVarN`: variance-normalised blocks (Muller et al. 2026, arXiv 2606.03458), calibration-free.
//!
//! ```text
//! Y = X H D / sqrt(d)                  a block of 128 tokens, rotated
//! Y = diag(t) N diag(c)                such that every row and every column of N has standard deviation 1
//! keys:    N[:, j] = zero_j + scale_j code, asymmetric, per channel
//! values:  N[i, :] = zero_i + scale_i code, asymmetric, per token
//! ```
//!
//! `t` and `c` come from dividing by the deviations of rows and of columns in turn. An asymmetric grid per channel has the same
//! codes whatever the channel's factor is, so of keys only `t` is stored beside the grids, and of values only `c`: a wrong scale of
//! a token, from which the paper says most of the harm comes, is what each of them mends.
//!
//! The block size, the rotation, the normalisation and the grids are the paper's; that sinks and the newest tokens stay exact
//! until a block is full is how all methods here do it, and the number of turns is ours.

#![forbid(unsafe_code)]

use std::sync::Arc;

use half::f16;

use super::grid::Asymmetric;
use super::pages::{Band, ChannelKeys, Channels, Factors, KeyPage, TokenValues, ValuePage};
use super::tokens::{Format, TokenCoding};
use super::{Codec, Method, Plan, f16_limit, whole_windows};
use crate::error::{Result, refuse};
use crate::linalg::Map;
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// Tokens of a block.
const BLOCK: usize = 128;

/// Turns of dividing: deviations are within some per cent of 1 after three.
const TURNS: usize = 6;

/// A deviation is at least this,
const LEAST: f32 = 1e-6;

/// and of rows and of columns this share of the root mean square: a nearly constant one would become large beside all others.
const LEAST_SHARES: [f32; 2] = [1.0 / 16.0, 1.0 / 1024.0];

/// The largest quotient of a number and its factor, below what float16 holds.
const LARGEST: f32 = 60_000.0;

/// Where all quotients are below `SMALLEST`, factors are made smaller, at most by `FINEST`: halves are coarse near 0.
const SMALLEST: f32 = 1.0 / 256.0;
const FINEST: f32 = 1.0 / 512.0;

/// The parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Kvarn {
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// Of the random signs.
    pub seed: u64,
    /// Whether at least the newest 128 tokens stay exact; else fewer do.
    pub full_window: bool,
    /// The grids of values.
    grids: Arc<Normalised>,
}

/// Grids of a block's tokens whose channels have factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Normalised(Asymmetric);

impl Kvarn {
    /// Checks the parameters: bits of a code are 2, 3, 4 or 8.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: u8, sinks: usize, seed: u64) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return refuse("bits", bits, "2, 3, 4, 8");
        }
        let grids = Arc::new(Normalised(Asymmetric { bits, group: 0 }));
        Ok(Self { sinks, seed, full_window: false, grids })
    }

    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let kvarn = Self::new(options.whole("bits")?, options.whole("sinks")?, options.whole("seed")?)?;
        Ok(Self { full_window: options.flag("full_window")?, ..kvarn })
    }

    fn map(&self, plan: &mut Plan, dim: usize) -> Arc<Map> {
        plan.map(|| Map::hadamard(dim, self.seed))
    }
}

impl Method for Kvarn {
    fn sinks(&self) -> usize {
        self.sinks
    }

    fn window(&self) -> usize {
        BLOCK
    }

    /// The errors of 2 bits spread over all numbers of a block.
    fn limit(&self) -> Limit {
        Limit::of_numbers(f16_limit() / 4.0)
    }
}

impl Codec<KeyPage> for Kvarn {
    fn due(&self, n: usize) -> usize {
        whole_windows(n, BLOCK, self.full_window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, _: usize) -> Result<(KeyPage, usize)> {
        self.map(plan, rows.dim());
        let bands = plan.bands(|| vec![Band { bits: self.grids.0.bits, channels: rows.dim() }]);
        let factors = Some((|x, dim| deviations(x, dim).0) as Factors);
        let form = Channels { group: BLOCK, bands, compensation: None, factors };
        Ok(ChannelKeys::seal(plan, form, rows.to_f32(0..BLOCK), rows.dim()))
    }
}

impl Codec<ValuePage> for Kvarn {
    fn due(&self, n: usize) -> usize {
        whole_windows(n, BLOCK, self.full_window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(ValuePage, usize)> {
        let format = Format::new(self.grids.clone(), Some(self.map(plan, rows.dim())), rows.dim());
        Ok(TokenValues::seal(format, None, rows, n))
    }
}

impl TokenCoding for Normalised {
    fn bits(&self) -> u8 {
        self.0.bits
    }

    fn group(&self) -> usize {
        self.0.group
    }

    fn factors(&self, x: &[f32], dim: usize) -> Vec<f16> {
        deviations(x, dim).1
    }

    fn encode(&self, x: &[f32], codes: &mut [u8]) -> (f16, f16) {
        self.0.encode(x, codes)
    }
}

/// The deviations `t` of the rows and `c` of the columns of a block `[rows, dim]`, as they are stored.
fn deviations(block: &[f32], dim: usize) -> (Vec<f16>, Vec<f16>) {
    let rows = block.len() / dim;
    let (mut t, mut c) = (vec![1.0f32; rows], vec![1.0f32; dim]);
    let mut normal = block.to_vec();
    for _ in 0..TURNS {
        for (j, c) in c.iter_mut().enumerate() {
            let own = deviation(normal.iter().skip(j).step_by(dim), LEAST_SHARES[1]);
            normal.iter_mut().skip(j).step_by(dim).for_each(|x| *x /= own);
            *c *= own;
        }
        for (row, t) in normal.chunks_exact_mut(dim).zip(&mut t) {
            let own = deviation(row.iter(), LEAST_SHARES[0]);
            for x in row {
                *x /= own;
            }
            *t *= own;
        }
    }
    // What both could share is given to the one that is not stored: their means are 1.
    let stored = |scales: Vec<f32>, largest: &[f32]| -> Vec<f16> {
        let mean = scales.iter().sum::<f32>() / scales.len() as f32;
        let factor = |(s, largest): (&f32, &f32)| (s / mean).max(f16::MIN_POSITIVE.to_f32()).max(largest / LARGEST);
        let mut factors: Vec<f16> = scales.iter().zip(largest).map(factor).map(f16::from_f32).collect();
        let quotients = factors.iter().zip(largest).map(|(factor, largest)| largest / factor.to_f32());
        let quotient = quotients.fold(0.0, f32::max);
        if quotient > 0.0 && quotient < SMALLEST {
            let finer = quotient.log2().ceil().exp2().max(FINEST);
            for factor in &mut factors {
                *factor = f16::from_f32(factor.to_f32() * finer);
            }
        }
        factors
    };
    let (mut of_rows, mut of_columns) = (vec![0.0f32; rows], vec![0.0f32; dim]);
    for (row, of_row) in block.chunks_exact(dim).zip(&mut of_rows) {
        for (x, of_column) in row.iter().zip(&mut of_columns) {
            *of_column = of_column.max(x.abs());
        }
        *of_row = row.iter().fold(0.0, |largest, x| largest.max(x.abs()));
    }
    (stored(t, &of_rows), stored(c, &of_columns))
}

/// The standard deviation, at least a share of the root mean square.
fn deviation<'a>(x: impl Iterator<Item = &'a f32> + Clone, share: f32) -> f32 {
    let n = x.clone().count() as f32;
    let mean = x.clone().sum::<f32>() / n;
    let own = (x.map(|x| (x - mean).powi(2)).sum::<f32>() / n).sqrt();
    // The root mean square is at most what stands here, and costs as much as all else.
    let least = if own < share * (mean.abs() + own) { share * mean.hypot(own) } else { 0.0 };
    own.max(least).max(LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deviations_are_those_of_rows_and_columns() {
        let (rows, dim) = (BLOCK, 24);
        let wave = |i: usize| ((i * i) as f32 * 0.7311).sin();
        let (t, c) = (|i: usize| 0.2 + (i % 7) as f32, |j: usize| 1.0 / (1 + j % 5) as f32);
        let block: Vec<f32> = (0..rows * dim).map(|n| t(n / dim) * c(n % dim) * wave(n)).collect();
        let (got_t, got_c) = deviations(&block, dim);
        let normal = |i: usize, j: usize| block[i * dim + j] / (got_t[i].to_f32() * got_c[j].to_f32());
        let row = |i: usize| deviation((0..dim).map(|j| normal(i, j)).collect::<Vec<_>>().iter(), 0.0);
        let column = |j: usize| deviation((0..rows).map(|i| normal(i, j)).collect::<Vec<_>>().iter(), 0.0);
        let (rows, columns): (Vec<f32>, Vec<f32>) = ((0..rows).map(row).collect(), (0..dim).map(column).collect());
        for all in [rows, columns] {
            let mean = all.iter().sum::<f32>() / all.len() as f32;
            assert!(all.iter().all(|x| (x / mean - 1.0).abs() < 0.02), "{all:?}");
        }
    }

    #[test]
    fn constant_blocks_are_no_trouble() {
        for x in [0.0, 3.0] {
            let (t, c) = deviations(&[x; BLOCK * 8], 8);
            assert!(t.iter().chain(&c).all(|s| s.to_f32() == 1.0));
        }
    }
}
