//! A page of keys as they were before RoPE, on static grids.

use std::sync::Arc;

use half::f16;

use super::{KeyPage, Outliers, PageBytes, bytes_of};
use crate::attend::{KeySegment, Scratch};
use crate::format::codes::{Codes, blocks, packed_len, put_lane};
use crate::format::{padded, tile_rows};
use crate::kernels::{Ahead, Kernels};
use crate::linalg::{Map, Mat, MatMut, SPAN};
use crate::memory;
use crate::quantize::{KvQuant, StaticKeys};
use crate::tensor::Rows;

/// Tokens for which a page has room.
const PAGE: usize = SPAN;

/// Tokens that are opened at once: their keys stay in the first level of the cache until they have met the queries.
const STEP: usize = 64;

/// Grids of a KV head's channels, and how they were found.
#[derive(Debug)]
pub(in crate::quantize) struct HeadGrids {
    method: Arc<KvQuant>,
    keys: Arc<StaticKeys>,
    head: usize,
    scale: Box<[f32]>,
    zero: Box<[f32]>,
}

impl HeadGrids {
    /// Of KV head number `head`.
    pub(in crate::quantize) fn new(method: &Arc<KvQuant>, keys: &Arc<StaticKeys>, head: usize) -> Self {
        let dim = keys.low[head].len();
        let (scale, zero): (Vec<f32>, Vec<f32>) =
            (0..dim).map(|c| keys.range(head, c)).map(|(low, high)| method.grid(low, high)).unzip();
        let (method, keys) = (Arc::clone(method), Arc::clone(keys));
        Self { method, keys, head, scale: scale.into(), zero: zero.into() }
    }

    /// Bytes allocated.
    pub(in crate::quantize) fn bytes(&self) -> usize {
        size_of::<Self>() + 2 * size_of_val(&*self.scale)
    }
}

/// The codes `[dim, PAGE]`, then the outliers of `PAGE` tokens, in units of their channels' levels.
#[derive(Clone)]
pub struct PreRopeKeys {
    grids: Arc<HeadGrids>,
    /// The position of the first token, as coordinates.
    map: Arc<Map>,
    tokens: usize,
    words: Box<[u16]>,
}

impl PreRopeKeys {
    /// Seals the oldest of the first `n` of `rows`, whose first token is at position `start`; returns the page and how many it took.
    pub(in crate::quantize) fn seal(grids: Arc<HeadGrids>, start: usize, rows: &Rows, n: usize) -> (KeyPage, usize) {
        let mut page = Self::new(grids, start);
        let n = n.min(page.room());
        page.extend(rows, n);
        (KeyPage::PreRope(page), n)
    }

    /// An empty page, whose first token will be at position `start`.
    fn new(grids: Arc<HeadGrids>, start: usize) -> Self {
        let map = grids.keys.rope.map(start);
        let mut page = Self { grids, map, tokens: 0, words: Box::default() };
        page.words = memory::zeros(page.code_words() + page.outliers().words()).into();
        page
    }

    /// Numbers of a key.
    pub fn dim(&self) -> usize {
        self.grids.scale.len()
    }

    fn method(&self) -> &KvQuant {
        &self.grids.method
    }

    fn code_words(&self) -> usize {
        packed_len(self.method().bits, self.dim(), PAGE)
    }

    fn outliers(&self) -> Outliers {
        Outliers { each: self.method().places_of(self.dim()), tokens: PAGE }
    }

    pub(super) fn room(&self) -> usize {
        PAGE - self.tokens
    }

    pub(super) fn extend(&mut self, rows: &Rows, n: usize) {
        let (grids, dim, code_words, places) =
            (Arc::clone(&self.grids), self.dim(), self.code_words(), self.outliers());
        let HeadGrids { method, keys, head, scale, zero } = &*grids;
        let (mut all, mut codes) = (self.map.apply_rows(&rows.to_f32(0..n), dim), vec![0; dim]);
        let (code_place, outlier_place) = self.words.split_at_mut(code_words);
        for (x, t) in all.chunks_exact_mut(dim).zip(self.tokens..) {
            keys.rope.undo(t, x);
            method.encode_within(x, &mut codes, |c| keys.range(*head, c));
            put_lane(method.bits, PAGE, &codes, t, code_place);
            let found: Vec<_> = keys
                .outliers(*head, x, places.each)
                .into_iter()
                .map(|channel| {
                    let c = usize::from(channel);
                    // In units of the levels: so it is added before the grid.
                    let lacks = (x[c] - method.decode(codes[c], (scale[c], zero[c]))) / scale[c];
                    (channel, f16::from_f32(lacks.clamp(-f16::MAX.to_f32(), f16::MAX.to_f32())))
                })
                .collect();
            places.put(outlier_place, t, &found);
        }
        self.tokens += n;
    }

    pub(super) fn bytes(&self) -> PageBytes {
        let codes = self.code_words() * size_of::<u16>();
        PageBytes { codes, scales: size_of_val(&*self.words) - codes, exact: 0 }
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    fn codes(&self) -> Codes<'_> {
        let bits = self.method().bits;
        Codes::new(bits, PAGE, blocks(bits, self.dim()), &self.words).with_levels(Some(self.method().table.levels()))
    }

    /// The code of channel `c` of token `t`.
    pub fn code(&self, t: usize, c: usize) -> u8 {
        self.codes().get(c, t)
    }

    /// What an entry of the levels is worth in channel `c`, and what entry 0 stands for.
    pub fn grid(&self, c: usize) -> (f32, f32) {
        (self.grids.scale[c], self.grids.zero[c])
    }

    /// The outliers of the first `n` tokens, as many a token: channels, and what their codes lack.
    pub fn outliers_of(&self, n: usize) -> Vec<(usize, f32)> {
        let mut buffer = Vec::new();
        let (channels, rests) = self.outliers().of(&self.words[self.code_words()..], 0, n, &mut buffer);
        let of_channel = |(&c, rest): (&u8, &f32)| (usize::from(c), self.grids.scale[usize::from(c)] * rest);
        channels.iter().zip(rests).map(of_channel).collect()
    }

    /// The keys `out[c, t]` of the tokens from `first` on, rotated as if the page began at position 0; `n` is a multiple of 8.
    fn open(&self, first: usize, n: usize, out: &mut MatMut<'_>, kernels: &Kernels, rests: &mut Vec<f32>) {
        let HeadGrids { keys, scale, zero, .. } = &*self.grids;
        let (codes, outliers) = (self.codes(), self.outliers());
        (kernels.unpack)(codes, first..first + n, out.part(0, codes.outer()));
        if outliers.each > 0 {
            let (channels, rests) = outliers.of(&self.words[self.code_words()..], first, n, rests);
            let tokens = channels.chunks_exact(outliers.each).zip(rests.chunks_exact(outliers.each));
            for (t, (channels, rests)) in tokens.enumerate() {
                for (&channel, rest) in channels.iter().zip(rests) {
                    out.data[usize::from(channel) * out.stride + t] += rest;
                }
            }
        }
        (kernels.rotate)(out.part(0, self.dim()), &keys.rope.rotate(scale, zero, first), n);
    }
}

impl KeySegment for PreRopeKeys {
    fn granularity(&self) -> usize {
        PAGE
    }

    fn map(&self) -> Option<&Arc<Map>> {
        Some(&self.map)
    }

    fn bytes(&self, _: usize, _: usize) -> &[u8] {
        bytes_of(&self.words)
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
        assert_eq!(first, 0, "a page is read from its beginning");
        let Scratch { kernels, buffer, outliers, .. } = scratch;
        memory::resize(buffer, tile_rows(self.dim()) * STEP);
        let lines = ahead.left().div_ceil(padded(n).div_ceil(STEP).max(1));
        for first in (0..padded(n)).step_by(STEP) {
            let n = STEP.min(padded(n) - first);
            ahead.fetch(lines);
            self.open(first, n, &mut MatMut::new(buffer, tile_rows(self.dim()), STEP), kernels, outliers);
            for g in 0..q.rows {
                out.row(g)[first..first + n].fill(0.0);
            }
            (kernels.matmul)(q, Mat::new(buffer, self.dim(), STEP), n, out.from_column(first));
        }
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        assert_eq!(first, 0, "a page is read from its beginning");
        self.open(0, padded(n), &mut out, scratch.kernels, &mut scratch.outliers);
    }
}
