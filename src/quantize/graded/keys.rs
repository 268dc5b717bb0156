//! A page of keys: per channel, bands of channels with different bits.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfBitsSliceExt;

use super::{Band, Graded, grid_of};
use crate::attend::codes::packed_len;
use crate::attend::kernels::Ahead;
use crate::attend::mat::{Mat, MatMut};
use crate::attend::packed::{Grids, Packed};
use crate::attend::{Basis, KEY_TOLERANCE, KeySegment, Scratch};
use crate::quantize::kivi::{bytes_of, pack_group};
use crate::quantize::{PageBytes, Plan};
use crate::tensor::Rows;

/// Group after group of tokens: of every band the codes `[channels, tokens]`, the scales and the zero-points of its channels;
/// of a band of 0 bits only what stands for all its codes.
#[derive(Clone)]
pub struct GradedKeys {
    order: Arc<Basis>,
    bands: Arc<[Band]>,
    group: usize,
    tokens: usize,
    words: Box<[u16]>,
}

impl GradedKeys {
    /// Packs the `n` oldest of `rows`; `n` is a multiple of the group.
    pub(in crate::quantize) fn pack(graded: &Graded, plan: &mut Plan, rows: &Rows, n: usize) -> Self {
        let (dim, group) = (rows.dim(), graded.group);
        let mut x = rows.to_f32(0..n);
        graded.choose(plan, &x, dim);
        plan.sealed += n;
        let (Some(order), Some(bands)) = (plan.basis.clone(), plan.bands.clone()) else {
            unreachable!("choose has chosen")
        };
        let mut page = Self { order, bands, group, tokens: n, words: Box::default() };
        page.words = vec![0; n / group * page.group_words()].into();
        x.chunks_exact_mut(dim).for_each(|x| page.order.apply(x));
        let group_words = page.group_words();
        for (x, words) in x.chunks_exact(group * dim).zip(page.words.chunks_exact_mut(group_words)) {
            pack_bands(&page.bands, group, x, words);
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
        Packed {
            words: &self.words[groups.start * step + at..groups.end * step],
            bits: band.bits,
            outer: band.channels,
            lead: 0,
            parts: groups.len(),
            width: self.group,
            lanes: self.group,
            codes_step: step,
            grids: Grids::Affine { scales_at: codes, zeros_at: codes + band.channels, step },
            lane_scales_at: None,
            tolerance: KEY_TOLERANCE / (self.bands.len() as f32).sqrt(),
        }
    }

    /// What the channels of a band of 0 bits at word `at` are in group `i`.
    fn constants(&self, band: Band, at: usize, i: usize) -> &[f16] {
        self.words[i * self.group_words() + at..][..band.channels].reinterpret_cast()
    }

    fn groups_of(&self, first: usize, n: usize) -> Range<usize> {
        first / self.group..(first + n).div_ceil(self.group)
    }

    /// Bits of every channel.
    pub fn bits(&self) -> Vec<u8> {
        let mut bits: Vec<f32> = self.bands.iter().flat_map(|band| vec![f32::from(band.bits); band.channels]).collect();
        self.order.undo(&mut bits);
        bits.into_iter().map(|bits| bits as u8).collect()
    }

    /// Codes, scales and zero-points of the channels of token `t`; a channel of 0 bits has code and scale 0.
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
        for x in [&mut codes, &mut scales, &mut zeros] {
            self.order.undo(x);
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
fn pack_bands(bands: &[Band], group: usize, x: &[f32], mut words: &mut [u16]) {
    let dim = x.len() / group;
    let mut channel = 0;
    for &band in bands {
        let (own, rest) = words.split_at_mut(band_words(band, group));
        let columns = channel..channel + band.channels;
        let own_x: Vec<f32> = x.chunks_exact(dim).flat_map(|row| row[columns.clone()].iter().copied()).collect();
        if band.bits == 0 {
            for (c, word) in own.iter_mut().enumerate() {
                let sum: f32 = own_x[c..].iter().step_by(band.channels).sum();
                *word = f16::from_f32(sum / group as f32).to_bits();
            }
        } else {
            let (codes, grid) = own.split_at_mut(code_words(band, group));
            let (scales, zeros) = grid.split_at_mut(band.channels);
            let (scales, zeros) = (scales.reinterpret_cast_mut(), zeros.reinterpret_cast_mut());
            pack_group(&grid_of(band.bits, group), &own_x, scales, zeros, codes);
        }
        words = rest;
        channel += band.channels;
    }
}

impl KeySegment for GradedKeys {
    fn unit(&self) -> usize {
        self.group
    }

    fn basis(&self) -> Option<&Arc<Basis>> {
        Some(&self.order)
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
        let zero_bits = self.bands().find(|(band, ..)| band.bits == 0);
        for g in 0..q.rows {
            for (i, out) in groups.clone().zip(out.row(g).chunks_exact_mut(self.group)) {
                let constant = zero_bits.map_or(0.0, |(band, channel, at)| {
                    q.row(g)[channel..].iter().zip(self.constants(band, at, i)).map(|(q, k)| q * k.to_f32()).sum()
                });
                out.fill(constant);
            }
        }
        for (band, channel, at) in self.bands().filter(|(band, ..)| band.bits > 0) {
            let (q, packed) = (q.from_column(channel), self.parts(band, at, groups.clone()));
            (scratch.kernels.add_packed)(q, &packed, out.from_column(0), &mut scratch.folded, ahead);
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
                let packed = self.parts(band, at, group..group + 1);
                let (codes, grid) = (packed.codes(0).0, packed.grid(0));
                (scratch.kernels.unpack)(codes, out.part(channel, codes.outer()));
                for c in 0..band.channels {
                    let (scale, zero) = (grid.scale(c), grid.zero(c));
                    for x in &mut out.row(channel + c)[..self.group] {
                        *x = *x * scale + zero;
                    }
                }
            }
        }
        self.order.undo_columns(&mut out, n);
    }
}
