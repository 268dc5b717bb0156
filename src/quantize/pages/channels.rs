//! A page of keys with a grid a channel and group of tokens, as KIVI has them; bands of channels may have different bits.

use std::ops::Range;
use std::sync::Arc;

use half::f16;
use half::slice::HalfBitsSliceExt;

use super::{PageBytes, bytes_of};
use crate::attend::{CHUNK, KEY_TOLERANCE, KeySegment, Scratch};
use crate::format::codes::packed_len;
use crate::format::{Grids, Packed};
use crate::kernels::Ahead;
use crate::linalg::{Map, Mat, MatMut};
use crate::memory;

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
    /// What leads to the order of the channels, or a rotation, where they are not the head's.
    pub(super) map: Option<Arc<Map>>,
    /// The largest factor of a token; 0 where they have none.
    pub(super) largest: f32,
    pub(super) bands: Arc<[Band]>,
    pub(super) group: usize,
    pub(super) tokens: usize,
    pub(super) words: Box<[u16]>,
}

impl ChannelKeys {
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
    pub(super) fn group_words(&self) -> usize {
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
            && self.map == other.map;
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
        let bits: Vec<f32> = self.bands.iter().flat_map(|band| vec![f32::from(band.bits); band.channels]).collect();
        in_order(self.map.as_deref(), bits).into_iter().map(|bits| bits as u8).collect()
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
        let map = self.map.as_deref().filter(|_| self.factors_at().is_none());
        let [codes, scales, zeros] = [codes, scales, zeros].map(|x| in_order(map, x));
        (codes.into_iter().map(|code| code as u8).collect(), scales, zeros)
    }
}

/// What is known of channels, in the order of the model's.
fn in_order(map: Option<&Map>, x: Vec<f32>) -> Vec<f32> {
    let Some(map) = map else { return x };
    let mut ordered = vec![0.0; x.len()];
    map.undo(&x, &mut ordered);
    ordered
}

/// Words of a band's codes in a group of tokens.
pub(super) fn code_words(band: Band, group: usize) -> usize {
    if band.bits == 0 { 0 } else { packed_len(band.bits, band.channels, group) }
}

/// Words of a band in a group of tokens.
pub(super) fn band_words(band: Band, group: usize) -> usize {
    code_words(band, group) + if band.bits == 0 { 1 } else { 2 } * band.channels
}

impl KeySegment for ChannelKeys {
    fn granularity(&self) -> usize {
        self.group
    }

    fn map(&self) -> Option<&Arc<Map>> {
        self.map.as_ref()
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
                let packed = self.parts(band, at, group..group + 1);
                scratch.kernels.open(&packed, 0, out.from_row(channel));
            }
        }
    }
}
