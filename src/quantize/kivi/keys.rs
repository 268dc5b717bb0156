//! A page of keys: quantised per channel, over groups of tokens.

use std::ops::Range;

use half::f16;

use super::{Kivi, as_f16_mut, bytes_of, code, divisor};
use crate::attend::codes::{packed_len, put_lane};
use crate::attend::kernels::Ahead;
use crate::attend::mat::{Mat, MatMut};
use crate::attend::packed::{Grids, Packed};
use crate::attend::{KEY_TOLERANCE, KeySegment, Scratch};
use crate::quantize::PageBytes;
use crate::tensor::Rows;

/// Per group of tokens the codes `[channels, tokens]`, and a scale and a zero-point per channel.
#[derive(Clone)]
pub struct PackedKeys {
    bits: u8,
    group: usize,
    tokens: usize,
    dim: usize,
    /// Group after group: codes, `dim` scales, `dim` zero-points, in the order in which they are read.
    words: Box<[u16]>,
}

impl PackedKeys {
    /// Packs the `n` oldest of `rows`; `n` is a multiple of the group.
    pub(in crate::quantize) fn pack(kivi: &Kivi, rows: &Rows, n: usize) -> Self {
        let (dim, group) = (rows.dim(), kivi.group);
        let mut page = Self { bits: kivi.bits, group, tokens: n, dim, words: Box::default() };
        page.words = vec![0; n / group * page.group_words()].into();
        let code_words = page.code_words();
        for (i, words) in page.words.chunks_exact_mut(code_words + 2 * dim).enumerate() {
            let x = rows.to_f32(i * group..(i + 1) * group);
            let (codes, grid) = words.split_at_mut(code_words);
            let (scales, zeros) = as_f16_mut(grid).split_at_mut(dim);
            pack_group(kivi, &x, scales, zeros, codes);
        }
        page
    }

    pub(in crate::quantize) fn bytes(&self) -> PageBytes {
        let scales = self.tokens / self.group * 2 * self.dim * size_of::<f16>();
        PageBytes { codes: size_of_val(&*self.words) - scales, scales, exact: 0 }
    }

    /// Words of a group's codes.
    fn code_words(&self) -> usize {
        packed_len(self.bits, self.dim, self.group)
    }

    /// Words of a group.
    fn group_words(&self) -> usize {
        self.code_words() + 2 * self.dim
    }

    /// Groups of tokens, each a part.
    fn groups(&self, range: Range<usize>) -> Packed<'_> {
        let (code_words, group_words) = (self.code_words(), self.group_words());
        Packed {
            words: &self.words[range.start * group_words..range.end * group_words],
            bits: self.bits,
            outer: self.dim,
            lead: 0,
            parts: range.len(),
            width: self.group,
            lanes: self.group,
            codes_step: group_words,
            grids: Grids::Affine { scales_at: code_words, zeros_at: code_words + self.dim, step: group_words },
            lane_scales_at: None,
            tolerance: KEY_TOLERANCE,
        }
    }

    /// The group of token `t`.
    fn group_of(&self, t: usize) -> Packed<'_> {
        self.groups(t / self.group..t / self.group + 1)
    }

    pub(in crate::quantize) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Numbers of a key.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Tokens that share a scale.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The code of channel `c` of token `t`.
    pub fn code(&self, t: usize, c: usize) -> u8 {
        self.group_of(t).codes(0).0.get(c, t % self.group)
    }

    /// Scale and zero-point of channel `c` of token `t`.
    pub fn grid(&self, t: usize, c: usize) -> (f32, f32) {
        let grid = self.group_of(t).grid(0);
        (grid.scale(c), grid.zero(c))
    }
}

/// Packs the group `x` `[tokens, dim]` with a grid a channel.
pub(in crate::quantize) fn pack_group(
    kivi: &Kivi,
    x: &[f32],
    scales: &mut [f16],
    zeros: &mut [f16],
    words: &mut [u16],
) {
    let (dim, levels) = (scales.len(), kivi.levels());
    let group = x.len() / dim;
    let (mut min, mut max) = (vec![f32::INFINITY; dim], vec![f32::NEG_INFINITY; dim]);
    for row in x.chunks_exact(dim) {
        for ((min, max), &x) in min.iter_mut().zip(&mut max).zip(row) {
            *min = min.min(x);
            *max = max.max(x);
        }
    }
    // From here on `min` has the zero-points and `max` the divisors.
    for c in 0..dim {
        (scales[c], zeros[c]) = kivi.grid(min[c], max[c]);
        (min[c], max[c]) = (zeros[c].to_f32(), divisor(scales[c]));
    }
    let mut codes = vec![0; dim];
    for (t, row) in x.chunks_exact(dim).enumerate() {
        for (code_of, ((&x, &zero), &divisor)) in codes.iter_mut().zip(row.iter().zip(&min).zip(&max)) {
            *code_of = code(x, divisor, zero, levels);
        }
        put_lane(kivi.bits, group, &codes, t, words);
    }
}

impl KeySegment for PackedKeys {
    fn unit(&self) -> usize {
        self.group
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        let groups = first / self.group..(first + n).div_ceil(self.group);
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
        let packed = self.groups(first / self.group..(first + n).div_ceil(self.group));
        for g in 0..q.rows {
            out.row(g)[..packed.columns()].fill(0.0);
        }
        (scratch.kernels.add_packed)(q, &packed, out, &mut scratch.folded, ahead);
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        let packed = self.groups(first / self.group..(first + n).div_ceil(self.group));
        for i in 0..packed.parts {
            let (codes, grid) = (packed.codes(i).0, packed.grid(i));
            let mut out = out.from_column(i * self.group);
            (scratch.kernels.unpack)(codes, out.part(0, codes.outer()));
            for c in 0..self.dim {
                let (scale, zero) = (grid.scale(c), grid.zero(c));
                for x in &mut out.row(c)[..self.group] {
                    *x = *x * scale + zero;
                }
            }
        }
    }
}
