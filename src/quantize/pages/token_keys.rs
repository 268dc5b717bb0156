//! A page of keys with a scale a token and group of channels.

use std::sync::Arc;

use half::f16;

use super::{KeyPage, PageBytes, bytes_of};
use crate::attend::{KEY_TOLERANCE, KeySegment, Scratch};
use crate::format::codes::{packed_len, put_lane};
use crate::format::{Grids, Packed, padded};
use crate::kernels::Ahead;
use crate::linalg::{Map, Mat, MatMut};
use crate::memory;
use crate::quantize::Factor;
use crate::quantize::tokens::{Format, PAGE, ScaledCoding};
use crate::tensor::Rows;

/// Group after group of channels: the codes `[channels, capacity]`, then the scales of all tokens.
#[derive(Clone)]
pub struct TokenKeys {
    format: Format,
    tokens: u16,
    /// Tokens for which there are words.
    capacity: u16,
    /// The largest magnitude of a scale.
    largest: f32,
    words: Box<[u16]>,
}

impl TokenKeys {
    /// Seals the oldest of the first `n` of `rows`; returns the page and how many it took.
    pub(in crate::quantize) fn seal(
        coding: Arc<dyn ScaledCoding>,
        map: Option<Arc<Map>>,
        compensation: Option<&Factor>,
        rows: &Rows,
        n: usize,
    ) -> (KeyPage, usize) {
        let format = Format::new(coding, map, rows.dim());
        let mut page = Self::empty(format, PAGE);
        let n = n.min(page.room());
        page.extend(rows, n, compensation);
        (KeyPage::Tokens(page), n)
    }

    /// A page without tokens, for so many.
    fn empty(format: Format, capacity: usize) -> Self {
        let mut page = Self { format, tokens: 0, capacity: capacity as u16, largest: 0.0, words: Box::default() };
        page.words = memory::zeros(page.start(page.format.groups())).into();
        page
    }

    /// Channels of group `j`.
    fn channels(&self, j: usize) -> usize {
        self.format.group().min(self.format.dim() - j * self.format.group())
    }

    /// Where group `j` begins in the words.
    fn start(&self, j: usize) -> usize {
        let whole = packed_len(self.format.bits(), self.format.group(), self.capacity()) + self.capacity();
        if j < self.format.groups() { j * whole } else { (j - 1) * whole + self.codes_len(j - 1) + self.capacity() }
    }

    /// Words of the codes of group `j`.
    fn codes_len(&self, j: usize) -> usize {
        packed_len(self.format.bits(), self.channels(j), self.capacity())
    }

    pub(super) fn room(&self) -> usize {
        self.capacity() - self.tokens()
    }

    fn capacity(&self) -> usize {
        self.capacity.into()
    }

    pub(super) fn extend(&mut self, rows: &Rows, n: usize, compensation: Option<&Factor>) {
        let (dim, groups, group) = (self.format.dim(), self.format.groups(), self.format.group());
        let (first, encoded) = (self.tokens(), self.format.encode(rows, n, compensation));
        let tokens = encoded.codes.chunks_exact(dim).zip(encoded.grids.chunks_exact(groups)).zip(first..);
        for ((codes, grids), t) in tokens {
            for (j, (codes, &(scale, _))) in codes.chunks(group).zip(grids).enumerate() {
                let (start, len, lanes) = (self.start(j), self.codes_len(j), self.capacity());
                put_lane(self.format.bits(), lanes, codes, t, &mut self.words[start..start + len]);
                self.words[start + len + t] = scale.to_bits();
                self.largest = self.largest.max(scale.to_f32().abs());
            }
        }
        self.tokens += n as u16;
    }

    /// A page of some tokens.
    #[must_use]
    pub(super) fn part(&self, tokens: &[usize]) -> Self {
        let mut part = Self::empty(self.format.clone(), PAGE);
        part.join(self, tokens);
        part
    }

    /// The page without room for more tokens.
    #[must_use]
    pub(super) fn fit(&self) -> Self {
        let tokens: Vec<usize> = (0..self.tokens()).collect();
        let mut fit = Self::empty(self.format.clone(), padded(tokens.len()));
        fit.join(self, &tokens);
        fit
    }

    /// Takes the first of some tokens of `other`, a page of the same format, as far as there is room.
    pub(super) fn join(&mut self, other: &Self, tokens: &[usize]) -> usize {
        let taken = &tokens[..tokens.len().min(self.room())];
        let size = self.format.group();
        let mut codes = vec![0; self.format.dim()];
        for &token in taken {
            codes.iter_mut().enumerate().for_each(|(c, code)| *code = other.code(token, c));
            for (j, codes) in codes.chunks(size).enumerate() {
                let (start, len, bits) = (self.start(j), self.codes_len(j), self.format.bits());
                put_lane(bits, self.capacity(), codes, self.tokens(), &mut self.words[start..start + len]);
                self.words[start + len + self.tokens()] = other.words[other.start(j) + other.codes_len(j) + token];
            }
            self.tokens += 1;
        }
        self.largest = self.largest.max(other.largest);
        taken.len()
    }

    pub(super) fn bytes(&self) -> PageBytes {
        let scales = self.format.groups() * self.capacity() * size_of::<f16>();
        PageBytes { codes: size_of_val(&*self.words) - scales, scales, exact: 0 }
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens.into()
    }

    /// Numbers of a key.
    pub fn dim(&self) -> usize {
        self.format.dim()
    }

    /// Groups of channels.
    pub fn groups(&self) -> usize {
        self.format.groups()
    }

    /// Group `j` of the first `n` tokens.
    fn group(&self, j: usize, n: usize) -> Packed<'_> {
        Packed {
            words: &self.words[self.start(j)..],
            bits: self.format.bits(),
            levels: self.format.levels(),
            outer: self.channels(j),
            lead: 0,
            parts: 1,
            width: padded(n),
            lanes: self.capacity(),
            codes_step: self.codes_len(j),
            grids: Grids::Plain { origin: self.format.origin() },
            lane_scales_at: Some(self.codes_len(j)),
            // In the units of the sums before the scales.
            tolerance: KEY_TOLERANCE / self.largest.max(f32::MIN_POSITIVE),
        }
    }

    /// The code of number `c` of token `t`, in the page's coordinates.
    pub fn code(&self, t: usize, c: usize) -> u8 {
        let group = self.format.group();
        self.group(c / group, self.capacity()).codes(0).0.get(c % group, t)
    }

    /// Scale and zero-point of group `j` of token `t`.
    pub fn grid(&self, t: usize, j: usize) -> (f32, f32) {
        let scale = f16::from_bits(self.words[self.start(j) + self.codes_len(j) + t]).to_f32();
        (scale, -scale * self.format.origin())
    }
}

impl KeySegment for TokenKeys {
    fn granularity(&self) -> usize {
        PAGE
    }

    fn map(&self) -> Option<&Arc<Map>> {
        self.format.map()
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
        for g in 0..q.rows {
            out.row(g)[..padded(n)].fill(0.0);
        }
        for j in 0..self.format.groups() {
            let (q, packed) = (q.from_column(j * self.format.group()), self.group(j, n));
            (scratch.kernels.add_packed)(q, &packed, out.from_column(0), &mut scratch.folded, ahead);
        }
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        assert_eq!(first, 0, "a page is read from its beginning");
        for j in 0..self.format.groups() {
            scratch.kernels.open(&self.group(j, n), 0, out.from_row(j * self.format.group()));
        }
    }
}
