//! A page of values with a grid a token and group of channels.

use std::ops::Range;
use std::sync::Arc;

use half::f16;

use super::{Outliers, PageBytes, ValuePage, bytes_of};
use crate::attend::{Scratch, ValueSegment, Weights};
use crate::format::codes::{LANES, block, block_words, packed_len, put_row};
use crate::format::{Grids, Packed, padded};
use crate::kernels::Ahead;
use crate::linalg::{Map, MatMut};
use crate::memory;
use crate::quantize::Factor;
use crate::quantize::tokens::{Format, PAGE};
use crate::tensor::Rows;

/// The codes `[capacity, channels]`, channels padded to whole lanes; then for every group of channels the scales of all tokens,
/// and where the format has them the zero-points.
#[derive(Clone)]
pub struct TokenValues {
    format: Format,
    tokens: u16,
    /// Tokens for which there are words.
    capacity: u16,
    /// Whether channels have factors, which lie behind all else: those of a block, to which nothing can be added.
    scaled: bool,
    words: Box<[u16]>,
}

impl TokenValues {
    /// Seals the oldest of the first `n` of `rows`; returns the page and how many it took.
    pub(in crate::quantize) fn seal(
        format: Format,
        compensation: Option<&Factor>,
        rows: &Rows,
        n: usize,
    ) -> (ValuePage, usize) {
        let mut page = Self::empty(format, PAGE);
        let n = n.min(page.room());
        page.extend(rows, n, compensation);
        (ValuePage::Tokens(page), n)
    }

    /// A page without tokens, for so many.
    fn empty(format: Format, capacity: usize) -> Self {
        let mut page = Self { format, tokens: 0, capacity: capacity as u16, scaled: false, words: Box::default() };
        page.words = memory::zeros(page.factors_at()).into();
        page
    }

    fn capacity(&self) -> usize {
        self.capacity.into()
    }

    fn places(&self) -> Outliers {
        self.format.outliers(self.capacity())
    }

    fn code_words(&self) -> usize {
        packed_len(self.format.bits(), self.capacity(), padded(self.format.dim()))
    }

    /// Where the grids of group `j` begin in the words.
    fn grid_at(&self, j: usize) -> usize {
        self.code_words() + j * self.format.grid_numbers() * self.capacity()
    }

    /// Where the outliers begin.
    fn outliers_at(&self) -> usize {
        self.grid_at(self.format.groups())
    }

    /// The outliers of the first `n` tokens, as many a token: channels, and what their codes lack.
    pub fn outliers_of(&self, n: usize) -> Vec<(usize, f32)> {
        let mut buffer = Vec::new();
        let (channels, rests) = self.outliers(0, n, &mut buffer);
        channels.iter().zip(rests).map(|(&c, &rest)| (usize::from(c), rest)).collect()
    }

    fn outliers<'a>(&'a self, first: usize, n: usize, buffer: &'a mut Vec<f32>) -> (&'a [u8], &'a [f32]) {
        self.places().of(&self.words[self.outliers_at()..], first, n, buffer)
    }

    /// Where the channels' factors begin.
    fn factors_at(&self) -> usize {
        self.outliers_at() + self.places().words()
    }

    /// The factor of channel `c`.
    fn factor(&self, c: usize) -> f32 {
        if self.scaled { f16::from_bits(self.words[self.factors_at() + c]).to_f32() } else { 1.0 }
    }

    pub(super) fn room(&self) -> usize {
        if self.scaled { 0 } else { self.capacity() - self.tokens() }
    }

    pub(super) fn extend(&mut self, rows: &Rows, n: usize, compensation: Option<&Factor>) {
        let (dim, groups, numbers) = (self.format.dim(), self.format.groups(), self.format.grid_numbers());
        let (first, code_words, outliers_at) = (self.tokens(), self.code_words(), self.outliers_at());
        let mut padded_codes = vec![0; padded(dim)];
        let encoded = self.format.encode(rows, n, compensation);
        let tokens = encoded.codes.chunks_exact(dim).zip(encoded.grids.chunks_exact(groups)).zip(&encoded.outliers);
        for (t, ((codes, grids), outliers)) in (first..).zip(tokens) {
            padded_codes[..dim].copy_from_slice(codes);
            put_row(self.format.bits(), &padded_codes, t, &mut self.words[..code_words]);
            self.places().put(&mut self.words[outliers_at..], t, outliers);
            for (j, &(scale, zero)) in grids.iter().enumerate() {
                for (i, number) in [scale, zero][..numbers].iter().enumerate() {
                    self.words[self.grid_at(j) + i * self.capacity() + t] = number.to_bits();
                }
            }
        }
        self.tokens += n as u16;
        if !encoded.factors.is_empty() {
            let factors = encoded.factors.iter().map(|factor| factor.to_bits()).chain(std::iter::repeat(0));
            let mut words = memory::with_capacity(self.words.len() + padded(dim));
            words.extend(self.words.iter().copied().chain(factors.take(padded(dim))));
            self.words = words.into();
            self.scaled = true;
        }
    }

    /// A page of some tokens. Those of a block keep the factors of its channels.
    #[must_use]
    pub(super) fn part(&self, tokens: &[usize]) -> Self {
        self.in_room_for(if self.scaled { tokens.len().next_multiple_of(LANES) } else { PAGE }, tokens)
    }

    /// The page without room for more tokens.
    #[must_use]
    pub(super) fn fit(&self) -> Self {
        let tokens: Vec<usize> = (0..self.tokens()).collect();
        self.in_room_for(tokens.len().next_multiple_of(block(self.format.bits())), &tokens)
    }

    fn in_room_for(&self, capacity: usize, tokens: &[usize]) -> Self {
        let mut part = Self { scaled: self.scaled, ..Self::empty(self.format.clone(), capacity) };
        let mut words = memory::with_capacity(part.words.len() + self.words.len() - self.factors_at());
        words.extend(part.words.iter().chain(&self.words[self.factors_at()..]));
        part.words = words.into();
        part.add(self, tokens);
        part
    }

    /// Takes the first of some tokens of `other`, a page of the same format, as far as there is room.
    pub(super) fn join(&mut self, other: &Self, tokens: &[usize]) -> usize {
        let room = if other.scaled { 0 } else { self.room() };
        let taken = &tokens[..tokens.len().min(room)];
        self.add(other, taken);
        taken.len()
    }

    /// Takes some tokens of `other`, for which there is room.
    fn add(&mut self, other: &Self, tokens: &[usize]) {
        let (bits, code_words, outliers) = (self.format.bits(), self.code_words(), self.places());
        let capacity = self.capacity();
        let mut codes = vec![0; padded(self.format.dim())];
        for &token in tokens {
            let row = other.groups_of(token..token + 1, 0.0);
            codes.iter_mut().enumerate().for_each(|(c, code)| *code = row.codes(0).0.get(row.lead, c));
            put_row(bits, &codes, self.tokens(), &mut self.words[..code_words]);
            let (numbers, all) =
                self.words[code_words..].split_at_mut(self.format.groups() * self.format.grid_numbers() * capacity);
            let theirs = &other.words[other.code_words()..other.outliers_at()];
            for (own, their) in numbers.chunks_exact_mut(capacity).zip(theirs.chunks_exact(other.capacity())) {
                own[usize::from(self.tokens)] = their[token];
            }
            outliers.copy(all, self.tokens.into(), &other.words[other.outliers_at()..], token);
            self.tokens += 1;
        }
    }

    pub(super) fn bytes(&self) -> PageBytes {
        let codes = self.code_words() * size_of::<u16>();
        PageBytes { codes, scales: size_of_val(&*self.words) - codes, exact: 0 }
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens.into()
    }

    /// Numbers of a value.
    pub fn dim(&self) -> usize {
        self.format.dim()
    }

    /// Groups of channels.
    pub fn groups(&self) -> usize {
        self.format.groups()
    }

    /// Groups of channels, each a part, for `tokens`.
    fn groups_of(&self, tokens: Range<usize>, tolerance: f32) -> Packed<'_> {
        let (bits, lanes) = (self.format.bits(), padded(self.format.dim()));
        let skipped = tokens.start / block(bits) * block_words(bits, lanes);
        let (scales_at, step) =
            (self.code_words() - skipped + tokens.start, self.format.grid_numbers() * self.capacity());
        let grids = if self.format.grid_numbers() == 2 {
            Grids::Affine { scales_at, zeros_at: scales_at + self.capacity(), step }
        } else {
            Grids::Scaled { scales_at, origin: self.format.origin(), step }
        };
        Packed {
            words: &self.words[skipped..],
            bits,
            levels: self.format.levels(),
            outer: tokens.len(),
            lead: tokens.start % block(bits),
            parts: self.format.groups(),
            width: padded(self.format.group()),
            lanes,
            codes_step: 0,
            grids,
            lane_scales_at: self.scaled.then(|| self.factors_at() - skipped),
            tolerance,
        }
    }

    /// The code of number `c` of token `t`, in the page's coordinates.
    pub fn code(&self, t: usize, c: usize) -> u8 {
        self.groups_of(0..self.capacity(), 0.0).codes(0).0.get(t, c)
    }

    /// Scale and zero-point of group `j` of token `t`.
    pub fn grid(&self, t: usize, j: usize) -> (f32, f32) {
        let grid = self.groups_of(t..t + 1, 0.0).grid(j);
        (grid.scale(0), grid.zero(0))
    }
}

impl ValueSegment for TokenValues {
    fn map(&self) -> Option<&Arc<Map>> {
        self.format.map()
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        if n == self.tokens() {
            return bytes_of(&self.words);
        }
        // Of a part the codes, which are most of it.
        let (bits, lanes) = (self.format.bits(), padded(self.format.dim()));
        let at = |token: usize| token / block(bits) * block_words(bits, lanes);
        bytes_of(&self.words[at(first)..at((first + n).next_multiple_of(block(bits)))])
    }

    fn accumulate(
        &self,
        weights: Weights<'_>,
        first: usize,
        n: usize,
        mut acc: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        let each = self.places().each;
        if each > 0 {
            let (channels, rests) = self.outliers(first, n, &mut scratch.outliers);
            for g in 0..acc.rows {
                let (acc, weights) = (acc.row(g), weights.of.row(g));
                for ((channels, rests), weight) in
                    channels.chunks_exact(each).zip(rests.chunks_exact(each)).zip(weights)
                {
                    for (&channel, rest) in channels.iter().zip(rests) {
                        acc[usize::from(channel)] += weight * rest;
                    }
                }
            }
        }
        let packed = self.groups_of(first..first + n, weights.tolerance());
        (scratch.kernels.add_packed)(weights.of, &packed, acc, &mut scratch.folded, ahead);
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        let packed = self.groups_of(first..first + n, 0.0);
        let (codes, dim, group) = (packed.codes(0).0, self.format.dim(), self.format.group());
        let lanes = codes.lanes();
        memory::resize(&mut scratch.buffer, codes.outer() * lanes);
        (scratch.kernels.unpack)(codes, 0..lanes, MatMut::new(&mut scratch.buffer, codes.outer(), lanes));
        for t in 0..n {
            let out = &mut out.row(t)[..dim];
            out.copy_from_slice(&scratch.buffer[(packed.lead + t) * lanes..][..dim]);
            for (j, out) in out.chunks_mut(group).enumerate() {
                packed.grid(j).decode(t, out);
            }
            if self.scaled {
                out.iter_mut().enumerate().for_each(|(c, x)| *x *= self.factor(c));
            }
            let (channels, rests) = self.outliers(first + t, 1, &mut scratch.outliers);
            for (&channel, rest) in channels.iter().zip(rests) {
                out[usize::from(channel)] += rest;
            }
        }
    }
}
