//! A page of values: quantised per token, over groups of channels.

use std::ops::Range;

use super::{Kivi, as_f16_mut, bytes_of, code, divisor};
use crate::attend::codes::{block, block_words, packed_len, put_row};
use crate::attend::kernels::Ahead;
use crate::attend::mat::MatMut;
use crate::attend::packed::{Grids, Packed};
use crate::attend::{Scratch, ValueSegment, Weights, padded};
use crate::quantize::PageBytes;
use crate::tensor::Rows;

/// Tokens for which a page has room: whole blocks of codes, and few enough that their sums are exact.
const PAGE: usize = 128;

/// The codes `[tokens, channels]`, and a scale and a zero-point per token and group of channels.
#[derive(Clone)]
pub struct PackedValues {
    kivi: Kivi,
    tokens: usize,
    dim: usize,
    /// The codes of [`PAGE`] tokens, channels padded to whole lanes; then `[groups, 2, PAGE]` scales and zero-points.
    words: Box<[u16]>,
}

impl PackedValues {
    /// An empty page.
    pub(in crate::quantize) fn new(kivi: &Kivi, dim: usize) -> Self {
        let mut page = Self { kivi: kivi.clone(), tokens: 0, dim, words: Box::default() };
        page.words = vec![0; page.code_words() + page.groups() * 2 * PAGE].into();
        page
    }

    pub(in crate::quantize) fn room(&self) -> usize {
        PAGE - self.tokens
    }

    pub(in crate::quantize) fn extend(&mut self, rows: &Rows, n: usize) {
        let (dim, group, bits, levels) = (self.dim, self.kivi.group, self.kivi.bits, self.kivi.levels());
        let code_words = self.code_words();
        let (codes, grids) = self.words.split_at_mut(code_words);
        let grids = as_f16_mut(grids);
        let mut row_codes = vec![0; padded(dim)];
        let x = rows.to_f32(0..n);
        for (row, t) in x.chunks_exact(dim).zip(self.tokens..) {
            for (j, (x, out)) in row.chunks(group).zip(row_codes.chunks_mut(group)).enumerate() {
                let (min, max) = range(x);
                let (scale, zero) = self.kivi.grid(min, max);
                let grid = &mut grids[j * 2 * PAGE..];
                (grid[t], grid[PAGE + t]) = (scale, zero);
                let (divisor, zero) = (divisor(scale), zero.to_f32());
                for (out, &x) in out.iter_mut().zip(x) {
                    *out = code(x, divisor, zero, levels);
                }
            }
            put_row(bits, &row_codes, t, codes);
        }
        self.tokens += n;
    }

    pub(in crate::quantize) fn bytes(&self) -> PageBytes {
        let codes = self.code_words() * size_of::<u16>();
        PageBytes { codes, scales: size_of_val(&*self.words) - codes, exact: 0 }
    }

    fn code_words(&self) -> usize {
        packed_len(self.kivi.bits, PAGE, padded(self.dim))
    }

    /// Groups of channels, each a part, for `tokens`.
    fn groups_of(&self, tokens: Range<usize>) -> Packed<'_> {
        let (bits, lanes) = (self.kivi.bits, padded(self.dim));
        let skipped = tokens.start / block(bits) * block_words(bits, lanes);
        let scales_at = self.code_words() - skipped + tokens.start;
        Packed {
            words: &self.words[skipped..],
            bits,
            outer: tokens.len(),
            lead: tokens.start % block(bits),
            parts: self.groups(),
            width: self.kivi.group,
            lanes,
            codes_step: 0,
            grids: Grids::Affine { scales_at, zeros_at: scales_at + PAGE, step: 2 * PAGE },
            lane_scales_at: None,
            tolerance: 0.0,
        }
    }

    pub(in crate::quantize) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Numbers of a value.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Groups of channels.
    pub fn groups(&self) -> usize {
        self.dim.div_ceil(self.kivi.group)
    }

    /// The code of channel `c` of token `t`.
    pub fn code(&self, t: usize, c: usize) -> u8 {
        self.groups_of(0..PAGE).codes(0).0.get(t, c)
    }

    /// Scale and zero-point of channel group `j` of token `t`.
    pub fn grid(&self, t: usize, j: usize) -> (f32, f32) {
        let grid = self.groups_of(t..t + 1).grid(j);
        (grid.scale(0), grid.zero(0))
    }
}

/// Smallest and largest number.
fn range(x: &[f32]) -> (f32, f32) {
    let (mut min, mut max) = ([f32::INFINITY; 8], [f32::NEG_INFINITY; 8]);
    for x in x.chunks(8) {
        for (i, &x) in x.iter().enumerate() {
            min[i] = min[i].min(x);
            max[i] = max[i].max(x);
        }
    }
    (min.into_iter().fold(f32::INFINITY, f32::min), max.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

impl ValueSegment for PackedValues {
    fn bytes(&self, _: usize, _: usize) -> &[u8] {
        bytes_of(&self.words)
    }

    fn accumulate(
        &self,
        weights: Weights<'_>,
        first: usize,
        n: usize,
        acc: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        let packed = Packed { tolerance: weights.tolerance(), ..self.groups_of(first..first + n) };
        (scratch.kernels.add_packed)(weights.of, &packed, acc, &mut scratch.folded, ahead);
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        let Packed { lead, .. } = self.groups_of(first..first + n);
        let codes = self.groups_of(first..first + n).codes(0).0;
        let lanes = codes.lanes();
        scratch.buffer.resize(codes.outer() * lanes, 0.0);
        (scratch.kernels.unpack)(codes, MatMut::new(&mut scratch.buffer, codes.outer(), lanes));
        for t in 0..n {
            let codes = &scratch.buffer[(lead + t) * lanes..][..self.dim];
            let out = &mut out.row(t)[..self.dim];
            let groups = codes.chunks(self.kivi.group).zip(out.chunks_mut(self.kivi.group));
            for (j, (codes, out)) in groups.enumerate() {
                let (scale, zero) = self.grid(first + t, j);
                for (x, code) in out.iter_mut().zip(codes) {
                    *x = code * scale + zero;
                }
            }
        }
    }
}
