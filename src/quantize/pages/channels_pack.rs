//! How a window of keys becomes a page with a grid a channel.

use std::sync::Arc;

use half::f16;

use super::KeyPage;
use super::channels::{Band, ChannelKeys, band_words, code_words};
use crate::format::codes::put_lane;
use crate::memory;
use crate::quantize::grid::{MinMax, levels, range, round};
use crate::quantize::{Factor, Gptq, Plan};

/// Factors of the tokens of a block of vectors of so many numbers.
pub(in crate::quantize) type Factors = fn(&[f32], usize) -> Vec<f16>;

/// What a method decides of such a page.
pub(in crate::quantize) struct Channels<'a> {
    /// Tokens of a channel that share a grid.
    pub(in crate::quantize) group: usize,
    /// Ranges of channels of equal width, in the coordinates of the plan.
    pub(in crate::quantize) bands: Arc<[Band]>,
    /// How roundings are made up for, if they are.
    pub(in crate::quantize) compensation: Option<&'a Arc<Gptq>>,
    /// Factors of a block's tokens, which are divided by them first, if they have any.
    pub(in crate::quantize) factors: Option<Factors>,
}

impl ChannelKeys {
    /// Packs keys `x` of `dim` numbers, a window of the method; returns the page and how many tokens it took.
    pub(in crate::quantize) fn seal(
        plan: &mut Plan,
        form: Channels<'_>,
        mut x: Vec<f32>,
        dim: usize,
    ) -> (KeyPage, usize) {
        let Channels { group, bands, compensation, factors } = form;
        let tokens = x.len() / dim;
        plan.sealed += tokens;
        let mut page = Self { map: plan.map.clone(), largest: 0.0, bands, group, tokens, words: Box::default() };
        let factors_at = tokens / group * page.group_words();
        if let Some(factor) = compensation.and_then(|gptq| plan.factor(gptq, true)) {
            let bits = page.bits();
            x.chunks_exact_mut(group * dim).for_each(|x| compensate(&factor, x, &bits));
        }
        if let Some(map) = &page.map {
            x = map.apply_rows(&x, dim);
        }
        let factors = factors.map_or_else(Vec::new, |factors| factors(&x, dim));
        page.words = memory::zeros(factors_at + factors.len()).into();
        for (t, factor) in factors.iter().enumerate() {
            x[t * dim..(t + 1) * dim].iter_mut().for_each(|x| *x /= factor.to_f32());
            page.words[factors_at + t] = factor.to_bits();
            page.largest = page.largest.max(factor.to_f32());
        }
        let group_words = page.group_words();
        for (x, words) in x.chunks_exact(group * dim).zip(page.words[..factors_at].chunks_exact_mut(group_words)) {
            pack_bands(&page.bands, x, dim, words);
        }
        (KeyPage::Channels(page), tokens)
    }
}

/// Packs a group of tokens `[group, dim]`, whose channels are in the order of the bands.
fn pack_bands(bands: &[Band], x: &[f32], dim: usize, mut words: &mut [u16]) {
    let group = x.len() / dim;
    let mut channel = 0;
    for &band in bands {
        let (own, rest) = words.split_at_mut(band_words(band, group));
        let rows = x.chunks_exact(dim).map(|row| &row[channel..channel + band.channels]);
        if band.bits == 0 {
            pack_means(rows, own);
        } else {
            pack_band(band, rows, own);
        }
        words = rest;
        channel += band.channels;
    }
}

/// Makes up for the roundings of a group of tokens `[group, dim]`, channel by channel, each of its own width: what is packed then
/// has the grids and codes that were found here.
fn compensate(factor: &Factor, x: &mut [f32], bits: &[u8]) {
    let (dim, group) = (bits.len(), x.len() / bits.len());
    let mut columns = memory::zeros(x.len());
    let places = |c: usize| (0..group).map(move |t| t * dim + c);
    for (c, column) in columns.chunks_exact_mut(group).enumerate() {
        column.iter_mut().zip(places(c)).for_each(|(to, from)| *to = x[from]);
    }
    factor.correct(&mut columns, group, |channel, column| round_column(bits[channel], column));
    for (c, column) in columns.chunks_exact(group).enumerate() {
        column.iter().zip(places(c)).for_each(|(from, to)| x[to] = *from);
    }
}

/// Turns the numbers of a channel into what they will stand for.
fn round_column(bits: u8, column: &mut [f32]) {
    if bits == 0 {
        let mean = column.iter().sum::<f32>() / column.len() as f32;
        column.fill(f16::from_f32(mean).to_f32());
        return;
    }
    let (least, most) = range(column);
    let grid = MinMax::new(bits, least, most);
    for x in column {
        *x = grid.decode(grid.code(bits, *x));
    }
}

/// The mean of every channel.
fn pack_means<'a>(rows: impl ExactSizeIterator<Item = &'a [f32]>, words: &mut [u16]) {
    let tokens = rows.len() as f32;
    let mut sums: Vec<f32> = memory::zeros(words.len());
    for row in rows {
        for (sum, x) in sums.iter_mut().zip(row) {
            *sum += x;
        }
    }
    for (word, sum) in words.iter_mut().zip(sums) {
        *word = f16::from_f32(sum / tokens).to_bits();
    }
}

/// Codes, scales and zero-points of a band.
fn pack_band<'a>(band: Band, rows: impl ExactSizeIterator<Item = &'a [f32]> + Clone, words: &mut [u16]) {
    let group = rows.len();
    let (mut min, mut max) = (vec![f32::INFINITY; band.channels], vec![f32::NEG_INFINITY; band.channels]);
    for row in rows.clone() {
        for ((min, max), &x) in min.iter_mut().zip(&mut max).zip(row) {
            *min = min.min(x);
            *max = max.max(x);
        }
    }
    let (code_words, numbers) = words.split_at_mut(code_words(band, group));
    let (scales, zeros) = numbers.split_at_mut(band.channels);
    // From here on `min` has what codes count from, and `max` the divisors.
    for c in 0..band.channels {
        let grid = MinMax::new(band.bits, min[c], max[c]);
        (scales[c], zeros[c]) = (grid.scale.to_bits(), grid.zero.to_bits());
        (min[c], max[c]) = (grid.first(), grid.divisor());
    }
    let (mut codes, levels) = (vec![0; band.channels], levels(band.bits));
    for (t, row) in rows.enumerate() {
        for (code, ((&x, &first), &divisor)) in codes.iter_mut().zip(row.iter().zip(&min).zip(&max)) {
            *code = round((x - first) / divisor, levels);
        }
        put_lane(band.bits, group, &codes, t, code_words);
    }
}
