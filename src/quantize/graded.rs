//! Keys per channel with bits by what a channel's error costs: KIVI's grids, graded widths.
//!
//! A key's error `e` moves a logit by `q . e`, on average over queries by `sum_c E[q_c^2] E[e_c^2]` squared (channels apart).
//! A min-max grid of `b` bits over a range `r` has `E[e^2] = r^2 / (12 (2^b - 1)^2)`; a channel of 0 bits is stored as its mean
//! over a group, and has its variance. Channels have 8, 4, 3, 2 or 0 bits such that the sum over channels is least while the
//! mean width is at most `bits`: a rate allocation (Shoham and Gersho 1988) with the query metric that `SQuat`, `ThinK` and
//! Block-GTQ use too. The queries are those of the text itself, as the cache sees them; without any all channels' errors
//! weigh the same. Widths are chosen again each time the tokens have doubled.
//!
//! Grids and codes are KIVI's ([`super::Kivi`]), in groups of `group` tokens. Channels of equal width lie together (a [`Band`]).

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::grid::levels;
use super::pages::{Band, ChannelKeys, Channels, KeyPage};
use super::{Codec, Gptq, Method, Plan, Wants, check_groups, f16_limit, whole_windows};
use crate::error::{Result, refuse};
use crate::format::codes::{LANES, block};
use crate::linalg::Map;
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// The parameters of graded keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Graded {
    /// Mean bits of a code.
    pub bits: f32,
    /// Tokens of a channel that share a scale and a zero-point.
    pub group: usize,
    /// Keys are packed in blocks of so many tokens.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// Whether at least the newest `window` keys stay exact; else fewer than `window` do.
    pub full_window: bool,
    /// How roundings are made up for, if they are.
    pub compensation: Option<Arc<Gptq>>,
}

impl Graded {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: f32, group: usize, window: usize, sinks: usize) -> Result<Self> {
        if !(1.0..=8.0).contains(&bits) {
            return refuse("bits", bits, "1 to 8");
        }
        check_groups(group, window)?;
        Ok(Self { bits, group, window, sinks, full_window: false, compensation: None })
    }

    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let sizes = [options.whole("group")?, options.whole("window")?, options.whole("sinks")?];
        let graded = Self::new(options.number("bits")?, sizes[0], sizes[1], sizes[2])?;
        Ok(Self { full_window: options.flag("full_window")?, compensation: Gptq::of(options)?, ..graded })
    }

    /// The widths for `x` `[tokens, dim]`, chosen anew when it is time; the plan has their order.
    fn choose(&self, plan: &mut Plan, x: &[f32], dim: usize) -> Arc<[Band]> {
        if let Some(bands) = plan.bands.as_ref().filter(|_| plan.sealed < plan.renewal) {
            return Arc::clone(bands);
        }
        plan.renewal = 2 * plan.sealed.max(self.window);
        let weights = plan.weights(dim);
        let costs: Vec<Cost> = weights.iter().enumerate().map(|(c, &weight)| self.cost(x, dim, c, weight)).collect();
        let (order, bands) = allot(&costs, self.bits);
        if plan.map.as_deref() != Some(&order) {
            plan.map = Some(order.into());
        }
        let bands: Arc<[Band]> = bands.into();
        plan.bands = Some(Arc::clone(&bands));
        bands
    }

    /// What channel `c` costs at every width.
    fn cost(&self, x: &[f32], dim: usize, c: usize, weight: f32) -> Cost {
        let (mut square, mut variance) = (0.0, 0.0);
        for rows in x.chunks_exact(self.group * dim) {
            let channel = || rows[c..].iter().step_by(dim).copied();
            let (min, max) = channel().fold((f32::INFINITY, f32::NEG_INFINITY), |(a, b), x| (a.min(x), b.max(x)));
            let mean = channel().sum::<f32>() / self.group as f32;
            square += f64::from((max - min).powi(2));
            variance += channel().map(|x| f64::from((x - mean).powi(2))).sum::<f64>() / self.group as f64;
        }
        let (groups, weight) = ((x.len() / (self.group * dim)) as f64, f64::from(weight));
        let of = |bits: u8| weight * square / groups / (12.0 * f64::from(levels(bits)).powi(2));
        Cost { of_width: [of(8), of(4), of(3), of(2), weight * variance / groups] }
    }
}

impl Method for Graded {
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

impl Codec<KeyPage> for Graded {
    /// Keys of `dim` numbers are cut into whole blocks of codes.
    fn check(&self, heads: Option<usize>, dim: usize) -> Result<()> {
        if !dim.is_multiple_of(LANES) {
            return refuse("quantize", format!("graded keys of {dim} numbers"), "head dims that are multiples of 8");
        }
        self.compensation().map_or(Ok(()), |gptq| gptq.check_dims(heads, dim))
    }

    fn wants(&self) -> Wants {
        let moment = self.compensation().is_some_and(|gptq| gptq.wants_queries());
        Wants { squares: Some(usize::MAX), moment, ..Wants::default() }
    }

    fn due(&self, n: usize) -> usize {
        whole_windows(n, self.window, self.full_window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, _: usize) -> Result<(KeyPage, usize)> {
        let x = rows.to_f32(0..self.window);
        let bands = self.choose(plan, &x, rows.dim());
        let form = Channels { group: self.group, bands, compensation: self.compensation(), factors: None };
        Ok(ChannelKeys::seal(plan, form, x, rows.dim()))
    }
}

/// Expected loss of a channel at each of [`WIDTHS`].
#[derive(Clone, Copy)]
struct Cost {
    of_width: [f64; WIDTHS.len()],
}

/// Bits of a channel, most first.
const WIDTHS: [u8; 5] = [8, 4, 3, 2, 0];

/// Orders channels by cost and cuts them into bands of whole blocks: of all ways with at most `bits` a channel the one that
/// costs least.
fn allot(costs: &[Cost], bits: f32) -> (Map, Vec<Band>) {
    let dim = costs.len();
    let mut order: Vec<u16> = (0..dim as u16).collect();
    order.sort_by(|&a, &b| {
        let cost = |c: u16| costs[usize::from(c)].of_width[2];
        cost(b).total_cmp(&cost(a)).then(a.cmp(&b))
    });
    // sums[w][n]: cost of the n first channels at width w.
    let sums = [0, 1, 2, 3, 4].map(|w| {
        let mut sum = 0.0;
        let each = order.iter().map(|&c| {
            sum += costs[usize::from(c)].of_width[w];
            sum
        });
        std::iter::once(0.0).chain(each).collect::<Vec<f64>>()
    });
    let budget = (bits * dim as f32) as usize;
    let mut best = (f64::INFINITY, [0; 4]);
    search(&sums, dim, budget, [0; 4], 0, 0.0, &mut best);
    let used: usize = best.1.iter().sum();
    let counts = best.1.into_iter().chain([dim - used]);
    let bands = WIDTHS.into_iter().zip(counts).map(|(bits, channels)| Band { bits, channels });
    (Map::Order(order.into()), bands.filter(|band| band.channels > 0).collect())
}

/// Tries all counts of channels of width number `w` and below, after those in `counts`.
fn search(
    sums: &[Vec<f64>; 5],
    dim: usize,
    budget: usize,
    counts: [usize; 4],
    w: usize,
    cost: f64,
    best: &mut (f64, [usize; 4]),
) {
    let first: usize = counts.iter().sum();
    if w == 4 {
        let cost = cost + sums[4][dim] - sums[4][first];
        if cost < best.0 {
            *best = (cost, counts);
        }
        return;
    }
    let width = usize::from(WIDTHS[w]);
    let step = block(WIDTHS[w]);
    for n in (0..=(dim - first).min(budget / width)).step_by(step) {
        let mut counts = counts;
        counts[w] = n;
        let cost = cost + sums[w][first + n] - sums[w][first];
        search(sums, dim, budget - n * width, counts, w + 1, cost, best);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(range: f64) -> Cost {
        let of = |bits: u8| range * range / 12.0 / f64::from(levels(bits)).powi(2);
        Cost { of_width: [of(8), of(4), of(3), of(2), range * range / 12.0] }
    }

    fn mean(bands: &[Band]) -> f64 {
        let bits: usize = bands.iter().map(|b| usize::from(b.bits) * b.channels).sum();
        bits as f64 / bands.iter().map(|b| b.channels).sum::<usize>() as f64
    }

    #[test]
    fn channels_that_cost_more_get_more_bits() {
        let costs: Vec<Cost> = (0..64).map(|c| cost(if c % 16 == 3 { 20.0 } else { 1.0 })).collect();
        let (Map::Order(order), bands) = allot(&costs, 3.0) else { panic!("an order") };
        let mut first = order[..4].to_vec();
        first.sort_unstable();
        assert_eq!(first, [3, 19, 35, 51]);
        assert!(bands[0].bits == 8 && bands.is_sorted_by(|a, b| a.bits > b.bits), "{bands:?}");
        assert!(mean(&bands) <= 3.0);
    }

    #[test]
    fn bands_are_whole_blocks_within_the_budget() {
        for (dim, bits) in [(8, 1.0), (64, 2.0), (64, 2.5), (80, 3.0), (128, 4.0), (40, 8.0), (256, 2.25)] {
            let costs: Vec<Cost> = (0..dim).map(|c| cost(1.0 + f64::from(c * 7 % 13))).collect();
            let (_, bands) = allot(&costs, bits);
            assert_eq!(bands.iter().map(|b| b.channels).sum::<usize>(), dim as usize);
            assert!(bands.iter().all(|b| b.bits == 0 || b.channels.is_multiple_of(block(b.bits))), "{bands:?}");
            assert!(mean(&bands) <= f64::from(bits), "{bands:?}");
        }
        assert_eq!(allot(&[cost(1.0); 40], 8.0).1, [Band { bits: 8, channels: 40 }]);
    }
}
