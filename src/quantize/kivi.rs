//! KIVI: asymmetric 2 to 8 bits, tuning-free (Liu et al. 2024, arXiv 2402.02750).
//!
//! Keys have channels that are large for all tokens, values have not. So keys are quantised per channel, over
//! groups of `group` tokens, and values per token, over groups of `group` channels:
//!
//! ```text
//! zero = min(x)    scale = (max(x) - min(x)) / (2^bits - 1)    code = round((x - zero) / scale)
//! x' = scale * code + zero
//! ```
//!
//! scale and zero are stored as f16, and codes are computed from the stored ones. The flush rule of the paper: keys
//! wait until `window` of them can be packed together (a group needs all its tokens), values leave one by one as
//! soon as `window` newer ones are held. The first `sinks` tokens stay exact (not in the paper; 0 gives it).
//!
//! The scales never meet the codes: `q . k'_t = sum_c (q_c scale_c) code_tc + sum_c q_c zero_c` folds a channel's scale
//! into the query, `sum_t w_t v'_t = sum_t (w_t scale_t) code_t + sum_t w_t zero_t` a token's into its weight.

use std::ops::Range;

use half::f16;

use super::PageBytes;
use crate::attend::codes::{BLOCK, Codes, pack_block, packed_len};
use crate::attend::mat::{Mat, MatMut};
use crate::attend::{CHUNK, KeySegment, Scratch, ValueSegment, padded};
use crate::error::{Error, Result};
use crate::tensor::Rows;

/// Tokens for which a page of values has room.
const VALUE_PAGE: usize = 128;

/// KIVI's parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kivi {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Numbers that share a scale and a zero-point.
    pub group: usize,
    /// The paper's residual length R: keys are packed in blocks of it, the newest values stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
}

impl Kivi {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`] for the first that does not fit.
    pub fn new(bits: u8, group: usize, window: usize, sinks: usize) -> Result<Self> {
        let refuse = |name, given: usize, accepted: &str| {
            Err(Error::Option { name, given: given.to_string(), accepted: accepted.into() })
        };
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return refuse("bits", bits.into(), "2, 3, 4, 8");
        }
        if group == 0 || !group.is_multiple_of(BLOCK) || group > CHUNK {
            return refuse("group", group, "multiples of 8 from 8 to 256");
        }
        if window == 0 || !window.is_multiple_of(group) {
            return refuse("window", window, &format!("positive multiples of group={group}"));
        }
        Ok(Self { bits, group, window, sinks })
    }

    pub(super) fn check_dims(&self, dim: usize) -> Result<()> {
        if self.group <= dim {
            return Ok(());
        }
        let accepted = format!("multiples of 8 up to this model's value head dim, {dim}");
        Err(Error::Option { name: "group", given: self.group.to_string(), accepted })
    }

    pub(super) fn keys_due(&self, n: usize) -> usize {
        n / self.window * self.window
    }

    pub(super) fn values_due(&self, n: usize) -> usize {
        n.saturating_sub(self.window)
    }

    fn levels(&self) -> f32 {
        f32::from(u8::MAX >> (8 - self.bits))
    }

    /// Scale and zero-point of numbers between `min` and `max`.
    fn grid(&self, min: f32, max: f32) -> (f16, f16) {
        (f16::from_f32((max - min) / self.levels()), f16::from_f32(min))
    }

    /// The code of `x` on a stored grid; a group of equal numbers has scale 0, and all its codes are 0.
    fn code(&self, x: f32, scale: f32, zero: f32) -> u8 {
        if scale == 0.0 {
            return 0;
        }
        // Adding 1.5 * 2^23 leaves the number, rounded half to even, in the lowest bits: no call, and it vectorises.
        let code = ((x - zero) / scale).clamp(0.0, self.levels());
        (code + 12_582_912.0).to_bits() as u8
    }
}

/// A page of keys: per group of tokens the codes `[channels, tokens]`, and a scale and a zero-point per channel.
#[derive(Clone)]
pub struct PackedKeys {
    bits: u8,
    group: usize,
    tokens: usize,
    dim: usize,
    /// Group after group; channels are padded to whole blocks.
    codes: Box<[u8]>,
    /// `[groups, 2, dim]`: scales, then zero-points.
    grids: Box<[f16]>,
}

impl PackedKeys {
    /// Packs the `n` oldest of `rows`; `n` is a multiple of the group.
    pub(super) fn pack(kivi: &Kivi, rows: &Rows, n: usize) -> Self {
        let (dim, group) = (rows.dim(), kivi.group);
        let mut page = Self {
            bits: kivi.bits,
            group,
            tokens: n,
            dim,
            codes: vec![0; n / group * packed_len(kivi.bits, padded(dim), group)].into(),
            grids: vec![f16::ZERO; n / group * 2 * dim].into(),
        };
        let bytes = packed_len(kivi.bits, padded(dim), group);
        let per_group = page.codes.chunks_exact_mut(bytes).zip(page.grids.chunks_exact_mut(2 * dim));
        for (i, (codes, grids)) in per_group.enumerate() {
            let x = rows.to_f32(i * group..(i + 1) * group);
            pack_key_group(kivi, &x, dim, codes, grids);
        }
        page
    }

    pub(super) fn bytes(&self) -> PageBytes {
        PageBytes { codes: self.codes.len(), scales: size_of_val(&*self.grids), exact: 0 }
    }

    fn group_codes(&self, i: usize) -> Codes<'_> {
        let bytes = packed_len(self.bits, padded(self.dim), self.group);
        Codes::new(self.bits, self.group, &self.codes[i * bytes..(i + 1) * bytes])
    }

    /// Scales and zero-points of group `i`, one a channel.
    fn group_grids(&self, i: usize) -> (&[f16], &[f16]) {
        self.grids[i * 2 * self.dim..(i + 1) * 2 * self.dim].split_at(self.dim)
    }

    pub(super) fn tokens(&self) -> usize {
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
        self.group_codes(t / self.group).get(c, t % self.group)
    }

    /// Scale and zero-point of channel `c` of token `t`.
    pub fn grid(&self, t: usize, c: usize) -> (f32, f32) {
        let (scale, zero) = self.group_grids(t / self.group);
        (scale[c].to_f32(), zero[c].to_f32())
    }
}

/// `x` is `[group, dim]`.
fn pack_key_group(kivi: &Kivi, x: &[f32], dim: usize, packed: &mut [u8], grids: &mut [f16]) {
    let group = x.len() / dim;
    let (mut min, mut max) = (vec![f32::INFINITY; dim], vec![f32::NEG_INFINITY; dim]);
    for row in x.chunks_exact(dim) {
        for c in 0..dim {
            min[c] = min[c].min(row[c]);
            max[c] = max[c].max(row[c]);
        }
    }
    let (scales, zeros) = grids.split_at_mut(dim);
    let mut block = vec![0; BLOCK * group];
    for (b, packed) in packed.chunks_exact_mut(usize::from(kivi.bits) * group).enumerate() {
        block.fill(0);
        for (o, codes) in block.chunks_exact_mut(group).enumerate() {
            let c = b * BLOCK + o;
            if c < dim {
                (scales[c], zeros[c]) = kivi.grid(min[c], max[c]);
                let (scale, zero) = (scales[c].to_f32(), zeros[c].to_f32());
                for (code, row) in codes.iter_mut().zip(x.chunks_exact(dim)) {
                    *code = kivi.code(row[c], scale, zero);
                }
            }
        }
        pack_block(kivi.bits, &block, packed);
    }
}

impl KeySegment for PackedKeys {
    fn unit(&self) -> usize {
        self.group
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        let bytes = packed_len(self.bits, padded(self.dim), self.group);
        &self.codes[first / self.group * bytes..(first + n).div_ceil(self.group) * bytes]
    }

    fn scores(&self, q: Mat<'_>, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        let (dim, outer) = (self.dim, padded(self.dim));
        let kernels = scratch.kernels;
        scratch.buffer.clear();
        scratch.buffer.resize(q.rows * outer, 0.0);
        let folded = &mut scratch.buffer;
        for (at, group) in (first / self.group..(first + n).div_ceil(self.group)).enumerate() {
            let (scale, zero) = self.group_grids(group);
            let mut out = out.from_column(at * self.group);
            for g in 0..q.rows {
                let offset = (kernels.fold)(&q.row(g)[..dim], scale, zero, &mut folded[g * outer..][..dim]);
                out.row(g)[..self.group].fill(offset);
            }
            let folded = Mat::new(folded, q.rows, outer);
            (kernels.add_codes)(folded, self.group_codes(group), 0..self.group, out);
        }
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        for (at, group) in (first / self.group..(first + n).div_ceil(self.group)).enumerate() {
            let (scales, zeros) = self.group_grids(group);
            let mut out = out.from_column(at * self.group);
            (scratch.kernels.unpack)(self.group_codes(group), out.part(0, padded(self.dim)));
            for c in 0..self.dim {
                let (scale, zero) = (scales[c].to_f32(), zeros[c].to_f32());
                for x in &mut out.row(c)[..self.group] {
                    *x = *x * scale + zero;
                }
            }
        }
    }
}

/// A page of values: the codes `[tokens, channels]`, and a scale and a zero-point per token and group of channels.
#[derive(Clone)]
pub struct PackedValues {
    kivi: Kivi,
    tokens: usize,
    dim: usize,
    /// [`VALUE_PAGE`] tokens; channels are padded to whole blocks.
    codes: Box<[u8]>,
    /// `[groups, 2, VALUE_PAGE]`: scales, then zero-points.
    grids: Box<[f16]>,
}

impl PackedValues {
    /// An empty page.
    pub(super) fn new(kivi: &Kivi, dim: usize) -> Self {
        Self {
            kivi: kivi.clone(),
            tokens: 0,
            dim,
            codes: vec![0; packed_len(kivi.bits, VALUE_PAGE, padded(dim))].into(),
            grids: vec![f16::ZERO; dim.div_ceil(kivi.group) * 2 * VALUE_PAGE].into(),
        }
    }

    pub(super) fn room(&self) -> usize {
        VALUE_PAGE - self.tokens
    }

    pub(super) fn extend(&mut self, rows: &Rows, n: usize) {
        let (dim, lanes) = (self.dim, padded(self.dim));
        let mut block = vec![0; BLOCK * lanes];
        let x = rows.to_f32(0..n);
        let bytes = usize::from(self.kivi.bits) * lanes;
        for (i, row) in x.chunks_exact(dim).enumerate() {
            let t = self.tokens + i;
            for (j, x) in row.chunks(self.kivi.group).enumerate() {
                let (min, max) =
                    x.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &x| (lo.min(x), hi.max(x)));
                let (scale, zero) = self.kivi.grid(min, max);
                let grids = &mut self.grids[j * 2 * VALUE_PAGE..];
                (grids[t], grids[VALUE_PAGE + t]) = (scale, zero);
                let codes = &mut block[t % BLOCK * lanes + j * self.kivi.group..];
                for (code, &x) in codes.iter_mut().zip(x) {
                    *code = self.kivi.code(x, scale.to_f32(), zero.to_f32());
                }
            }
            if t % BLOCK == BLOCK - 1 || i == n - 1 {
                pack_block(self.kivi.bits, &block, &mut self.codes[t / BLOCK * bytes..][..bytes]);
                block.fill(0);
            }
        }
        self.tokens += n;
    }

    pub(super) fn bytes(&self) -> PageBytes {
        PageBytes { codes: self.codes.len(), scales: size_of_val(&*self.grids), exact: 0 }
    }

    /// Codes of the whole blocks around `tokens`.
    fn blocks(&self, tokens: &Range<usize>) -> Codes<'_> {
        let bytes = usize::from(self.kivi.bits) * padded(self.dim);
        let blocks = tokens.start / BLOCK..tokens.end.div_ceil(BLOCK);
        Codes::new(self.kivi.bits, padded(self.dim), &self.codes[blocks.start * bytes..blocks.end * bytes])
    }

    /// Scales and zero-points of channel group `j`, one a token.
    fn group_grids(&self, j: usize) -> (&[f16], &[f16]) {
        self.grids[j * 2 * VALUE_PAGE..(j + 1) * 2 * VALUE_PAGE].split_at(VALUE_PAGE)
    }

    pub(super) fn tokens(&self) -> usize {
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
        self.blocks(&(0..VALUE_PAGE)).get(t, c)
    }

    /// Scale and zero-point of channel group `j` of token `t`.
    pub fn grid(&self, t: usize, j: usize) -> (f32, f32) {
        let (scale, zero) = self.group_grids(j);
        (scale[t].to_f32(), zero[t].to_f32())
    }
}

impl ValueSegment for PackedValues {
    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        self.blocks(&(first..first + n)).data()
    }

    fn accumulate(&self, w: Mat<'_>, first: usize, n: usize, mut acc: MatMut<'_>, scratch: &mut Scratch) {
        let codes = self.blocks(&(first..first + n));
        let (outer, lead) = (codes.outer(), first % BLOCK);
        scratch.buffer.clear();
        scratch.buffer.resize(w.rows * outer, 0.0);
        let folded = &mut scratch.buffer;
        for j in 0..self.groups() {
            let (scales, zeros) = self.group_grids(j);
            let (scale, zero) = (&scales[first..first + n], &zeros[first..first + n]);
            let lanes = j * self.kivi.group..((j + 1) * self.kivi.group).min(padded(self.dim));
            for g in 0..w.rows {
                let folded = &mut folded[g * outer + lead..][..n];
                let offset = (scratch.kernels.fold)(&w.row(g)[..n], scale, zero, folded);
                for a in &mut acc.row(g)[lanes.clone()] {
                    *a += offset;
                }
            }
            (scratch.kernels.add_codes)(Mat::new(folded, w.rows, outer), codes, lanes, acc.from_column(0));
        }
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        let codes = self.blocks(&(first..first + n));
        let lanes = codes.lanes();
        scratch.buffer.resize(codes.outer() * lanes, 0.0);
        (scratch.kernels.unpack)(codes, MatMut::new(&mut scratch.buffer, codes.outer(), lanes));
        for t in 0..n {
            let codes = &scratch.buffer[(first % BLOCK + t) * lanes..][..self.dim];
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
