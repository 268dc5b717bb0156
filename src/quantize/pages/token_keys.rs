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

/// Group after group of channels: the codes `[channels, PAGE]`, then the scales of `PAGE` tokens.
#[derive(Clone)]
pub struct TokenKeys {
    format: Format,
    tokens: usize,
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
        let mut page = Self { format, tokens: 0, largest: 0.0, words: Box::default() };
        page.words = memory::zeros(page.start(page.format.groups())).into();
        let n = n.min(page.room());
        page.extend(rows, n, compensation);
        (KeyPage::Tokens(page), n)
    }

    /// Channels of group `j`.
    fn channels(&self, j: usize) -> usize {
        self.format.group().min(self.format.dim() - j * self.format.group())
    }

    /// Where group `j` begins in the words.
    fn start(&self, j: usize) -> usize {
        let whole = packed_len(self.format.bits(), self.format.group(), PAGE) + PAGE;
        if j < self.format.groups() { j * whole } else { (j - 1) * whole + self.codes_len(j - 1) + PAGE }
    }

    /// Words of the codes of group `j`.
    fn codes_len(&self, j: usize) -> usize {
        packed_len(self.format.bits(), self.channels(j), PAGE)
    }

    pub(super) fn room(&self) -> usize {
        PAGE - self.tokens
    }

    pub(super) fn extend(&mut self, rows: &Rows, n: usize, compensation: Option<&Factor>) {
        let (dim, groups, group) = (self.format.dim(), self.format.groups(), self.format.group());
        let (first, encoded) = (self.tokens, self.format.encode(rows, n, compensation));
        let tokens = encoded.codes.chunks_exact(dim).zip(encoded.grids.chunks_exact(groups)).zip(first..);
        for ((codes, grids), t) in tokens {
            for (j, (codes, &(scale, _))) in codes.chunks(group).zip(grids).enumerate() {
                let (start, len) = (self.start(j), self.codes_len(j));
                put_lane(self.format.bits(), PAGE, codes, t, &mut self.words[start..start + len]);
                self.words[start + len + t] = scale.to_bits();
                self.largest = self.largest.max(scale.to_f32().abs());
            }
        }
        self.tokens += n;
    }

    /// A page of some tokens.
    #[must_use]
    pub(super) fn part(&self, tokens: &[usize]) -> Self {
        let mut part = Self { tokens: 0, largest: 0.0, words: memory::zeros(self.words.len()).into(), ..self.clone() };
        part.join(self, tokens);
        part
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
                put_lane(bits, PAGE, codes, self.tokens, &mut self.words[start..start + len]);
                self.words[start + len + self.tokens] = other.words[start + len + token];
            }
            self.tokens += 1;
        }
        self.largest = self.largest.max(other.largest);
        taken.len()
    }

    pub(super) fn bytes(&self) -> PageBytes {
        let scales = self.format.groups() * PAGE * size_of::<f16>();
        PageBytes { codes: size_of_val(&*self.words) - scales, scales, exact: 0 }
    }

    pub(super) fn tokens(&self) -> usize {
        self.tokens
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
            lanes: PAGE,
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
        self.group(c / group, PAGE).codes(0).0.get(c % group, t)
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
