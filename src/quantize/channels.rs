//! A page of keys with a grid a channel and group of tokens, as KIVI has them; bands of channels may have different bits.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfBitsSliceExt;

use super::kivi::{MinMax, range};
use super::{Factor, Method, PageBytes, Plan, bytes_of, kvarn, levels, round};
use crate::attend::codes::{packed_len, put_lane};
use crate::attend::kernels::Ahead;
use crate::attend::mat::{Mat, MatMut};
use crate::attend::packed::{Grids, Packed};
use crate::attend::{Basis, CHUNK, KEY_TOLERANCE, KeySegment, Scratch};
use crate::memory;
use crate::tensor::Rows;

/// Channels of equal width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Band {
    /// Bits of a code: 8, 4, 3, 2 or 0.
    pub bits: u8,
    /// Channels.
    pub channels: usize,
}

/// Group after group of tokens: of every band the codes `[channels, tokens]`, the scales and the zero-points of its channels;
/// of a band of 0 bits only what stands for all its codes. Behind all groups, where tokens have factors, those.
#[derive(Clone)]
pub struct ChannelKeys {
    /// The order of the channels, or a rotation, where they are not the model's.
    order: Option<Arc<Basis>>,
    /// The largest factor of a token; 0 where they have none.
    largest: f32,
    bands: Arc<[Band]>,
    group: usize,
    tokens: usize,
    words: Box<[u16]>,
}

impl ChannelKeys {
    /// Packs the oldest of `rows`, a window of the method.
    ///
    /// # Panics
    /// When the method has no such pages.
    pub(super) fn pack(method: &Method, plan: &mut Plan, rows: &Rows) -> Self {
        let dim = rows.dim();
        let (group, mut x, bands) = match method {
            Method::Kivi(kivi) => {
                let bands = plan.bands(|| vec![Band { bits: kivi.bits, channels: dim }]);
                (kivi.group, rows.to_f32(0..kivi.window), bands)
            }
            Method::Graded(graded) => {
                let x = rows.to_f32(0..graded.window);
                let bands = graded.choose(plan, &x, dim);
                (graded.group, x, bands)
            }
            Method::Kvarn(kvarn) => {
                plan.basis(|| Basis::hadamard(dim, kvarn.seed));
                let bands = plan.bands(|| vec![Band { bits: kvarn.bits, channels: dim }]);
                (kvarn::BLOCK, rows.to_f32(0..kvarn::BLOCK), bands)
            }
            _ => panic!("{method:?} has no pages with a grid a channel"),
        };
        let tokens = x.len() / dim;
        plan.sealed += tokens;
        let mut page = Self { order: plan.basis.clone(), largest: 0.0, bands, group, tokens, words: Box::default() };
        let factors_at = tokens / group * page.group_words();
        if let Some(factor) = method.feedback().and_then(|gptq| plan.factor(gptq, true)) {
            let bits = page.bits();
            x.chunks_exact_mut(group * dim).for_each(|x| feed_back(&factor, x, &bits));
        }
        if let Some(order) = &page.order {
            x.chunks_exact_mut(dim).for_each(|x| order.apply(x));
        }
        let factors = if let Method::Kvarn(_) = method { kvarn::deviations(&x, dim).0 } else { Vec::new() };
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
        page
    }

    /// Every band with its first channel and the first of its words in a group.
    fn bands(&self) -> impl Iterator<Item = (Band, usize, usize)> {
        self.bands.iter().scan((0, 0), |(channel, word), &band| {
            let found = (band, *channel, *word);
            *channel += band.channels;
            *word += band_words(band, self.group);
            Some(found)
        })
    }

    /// Where the tokens' factors begin in the words, if there are any.
    fn factors_at(&self) -> Option<usize> {
        (self.largest > 0.0).then(|| self.tokens / self.group * self.group_words())
    }

    /// Words of a group of tokens.
    fn group_words(&self) -> usize {
        self.bands.iter().map(|&band| band_words(band, self.group)).sum()
    }

    pub(in crate::quantize) fn bytes(&self) -> PageBytes {
        let groups = self.tokens / self.group;
        let codes: usize = self.bands.iter().map(|&band| code_words(band, self.group)).sum();
        let codes = groups * codes * size_of::<u16>();
        PageBytes { codes, scales: size_of_val(&*self.words) - codes, exact: 0 }
    }

    pub(in crate::quantize) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Numbers of a key.
    pub fn dim(&self) -> usize {
        self.bands.iter().map(|band| band.channels).sum()
    }

    /// Tokens that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Groups of tokens, each a part, of a band at word `at` of a group.
    fn parts(&self, band: Band, at: usize, groups: Range<usize>) -> Packed<'_> {
        let step = self.group_words();
        let codes = code_words(band, self.group);
        let start = groups.start * step + at;
        let factors = self.factors_at().map(|factors| factors + groups.start * self.group - start);
        Packed {
            words: &self.words[start..],
            bits: band.bits,
            levels: None,
            outer: band.channels,
            lead: 0,
            parts: groups.len(),
            width: self.group,
            lanes: self.group,
            codes_step: step,
            grids: Grids::Affine { scales_at: codes, zeros_at: codes + band.channels, step },
            lane_scales_at: factors,
            // With factors in the units of the sums before them.
            tolerance: KEY_TOLERANCE / (self.bands.len() as f32).sqrt() / factors.map_or(1.0, |_| self.largest),
        }
    }

    /// What the channels of a band of 0 bits at word `at` are in group `i`.
    fn constants(&self, band: Band, at: usize, i: usize) -> &[f16] {
        self.words[i * self.group_words() + at..][..band.channels].reinterpret_cast()
    }

    /// Adds to the logits of groups what their channels of 0 bits give, the same for all tokens of a group.
    fn add_constants(&self, q: Mat<'_>, band: Band, at: usize, groups: Range<usize>, out: &mut MatMut<'_>) {
        for g in 0..q.rows {
            for (i, out) in groups.clone().zip(out.row(g).chunks_exact_mut(self.group)) {
                let constants = self.constants(band, at, i);
                let sum: f32 = q.row(g).iter().zip(constants).map(|(q, k)| q * k.to_f32()).sum();
                for out in out {
                    *out += sum;
                }
            }
        }
    }

    fn groups_of(&self, first: usize, n: usize) -> Range<usize> {
        first / self.group..(first + n).div_ceil(self.group)
    }

    /// A page of some groups' tokens.
    #[must_use]
    pub(super) fn part(&self, tokens: &[usize]) -> Self {
        let mut part = Self { words: Box::default(), tokens: 0, ..self.clone() };
        part.add(self, tokens);
        part
    }

    /// Takes the first of some groups' tokens of `other`, if it has the same format, as far as there is room.
    pub(super) fn join(&mut self, other: &Self, tokens: &[usize]) -> usize {
        let same = self.largest == 0.0
            && other.largest == 0.0
            && self.group == other.group
            && self.bands == other.bands
            && self.order == other.order;
        let room = if same { CHUNK.saturating_sub(self.tokens) / self.group * self.group } else { 0 };
        let taken = &tokens[..tokens.len().min(room)];
        self.add(other, taken);
        taken.len()
    }

    /// # Panics
    /// When the tokens have factors, and are not the first ones.
    fn add(&mut self, other: &Self, tokens: &[usize]) {
        if other.factors_at().is_some() && !tokens.is_empty() {
            // A block that a crop has shortened stays as it is stored.
            assert!(self.tokens == 0 && tokens.iter().copied().eq(0..tokens.len()), "a block goes as one");
            self.clone_from(other);
            return;
        }
        let size = self.group_words();
        let mut words = std::mem::take(&mut self.words).into_vec();
        let groups = tokens.chunks(self.group).map(|tokens| tokens[0] / self.group);
        memory::reserve(&mut words, groups.len() * size);
        groups.clone().for_each(|group| words.extend_from_slice(&other.words[group * size..][..size]));
        self.tokens += groups.len() * self.group;
        self.words = words.into();
    }

    /// Bits of every channel.
    pub fn bits(&self) -> Vec<u8> {
        let mut bits: Vec<f32> = self.bands.iter().flat_map(|band| vec![f32::from(band.bits); band.channels]).collect();
        if let Some(order) = &self.order {
            order.undo(&mut bits);
        }
        bits.into_iter().map(|bits| bits as u8).collect()
    }

    /// Codes, scales and zero-points of the channels of token `t`; a channel of 0 bits has code and scale 0. Of tokens with factors
    /// they are in the page's coordinates, before the factor.
    pub fn token(&self, t: usize) -> (Vec<u8>, Vec<f32>, Vec<f32>) {
        let dim = self.dim();
        let (mut codes, mut scales, mut zeros) = (vec![0.0; dim], vec![0.0; dim], vec![0.0; dim]);
        let group = t / self.group;
        for (band, channel, at) in self.bands() {
            for c in 0..band.channels {
                if band.bits == 0 {
                    zeros[channel + c] = self.constants(band, at, group)[c].to_f32();
                    continue;
                }
                let packed = self.parts(band, at, group..group + 1);
                codes[channel + c] = f32::from(packed.codes(0).0.get(c, t % self.group));
                (scales[channel + c], zeros[channel + c]) = (packed.grid(0).scale(c), packed.grid(0).zero(c));
            }
        }
        if let Some(order) = self.order.as_ref().filter(|_| self.factors_at().is_none()) {
            for x in [&mut codes, &mut scales, &mut zeros] {
                order.undo(x);
            }
        }
        (codes.into_iter().map(|code| code as u8).collect(), scales, zeros)
    }
}

/// Words of a band's codes in a group of tokens.
fn code_words(band: Band, group: usize) -> usize {
    if band.bits == 0 { 0 } else { packed_len(band.bits, band.channels, group) }
}

/// Words of a band in a group of tokens.
fn band_words(band: Band, group: usize) -> usize {
    code_words(band, group) + if band.bits == 0 { 1 } else { 2 } * band.channels
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
fn feed_back(factor: &Factor, x: &mut [f32], bits: &[u8]) {
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

impl KeySegment for ChannelKeys {
    fn unit(&self) -> usize {
        self.group
    }

    fn basis(&self) -> Option<&Arc<Basis>> {
        self.order.as_ref()
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        let groups = self.groups_of(first, n);
        bytes_of(&self.words[groups.start * self.group_words()..groups.end * self.group_words()])
    }

    fn scores(
        &self,
        q: Mat<'_>,
        first: usize,
        n: usize,
        mut out: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        let groups = self.groups_of(first, n);
        for g in 0..q.rows {
            out.row(g)[..groups.len() * self.group].fill(0.0);
        }
        for (band, channel, at) in self.bands() {
            let q = q.from_column(channel);
            if band.bits == 0 {
                self.add_constants(q, band, at, groups.clone(), &mut out);
            } else {
                let packed = self.parts(band, at, groups.clone());
                (scratch.kernels.add_packed)(q, &packed, out.from_column(0), &mut scratch.folded, ahead);
            }
        }
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        for (i, group) in self.groups_of(first, n).enumerate() {
            let mut out = out.from_column(i * self.group);
            for (band, channel, at) in self.bands() {
                if band.bits == 0 {
                    for (c, k) in self.constants(band, at, group).iter().enumerate() {
                        out.row(channel + c)[..self.group].fill(k.to_f32());
                    }
                    continue;
                }
                self.parts(band, at, group..group + 1).tile(0, out.from_row(channel), scratch.kernels);
            }
        }
    }
}
