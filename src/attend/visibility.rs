//! Which held tokens a query may see.

#![forbid(unsafe_code)]

use ndarray::ArrayView4;

use super::Positions;
use crate::tensor::{Slice, View, row_of};

/// A mask's numbers.
#[derive(Clone, Copy)]
pub enum MaskData<'a> {
    /// 1 byte a token, non-zero where it is visible, with strides as in [`View`].
    Bool(ArrayView4<'a, u8>),
    /// Added to the scaled logits.
    Bias(View<'a>),
}

/// A mask over logical positions: column `p` speaks of the token at position `p`. Batch and heads may be 1.
#[derive(Clone, Copy)]
pub struct Mask<'a>(pub MaskData<'a>);

impl Mask<'_> {
    /// `[batch or 1, query heads or 1, queries, positions]`.
    pub fn shape(&self) -> [usize; 4] {
        match self.0 {
            MaskData::Bool(m) => m.dim().into(),
            MaskData::Bias(m) => m.shape(),
        }
    }

    /// Whether a boolean mask shows all of `held` to the one query of batch row `b`.
    fn shows_all(&self, b: usize, held: &Positions) -> bool {
        let MaskData::Bool(m) = self.0 else {
            return false;
        };
        let (batch, heads, queries, _) = m.dim();
        if heads != 1 || queries != 1 {
            return false;
        }
        let row = row_of(&m, [b.min(batch - 1), 0, 0]);
        held.runs().all(|(start, len)| row[start as usize..][..len as usize].iter().all(|&x| x != 0))
    }
}

/// What the queries of one batch row see: a mask's word, or without a mask causality.
pub struct Visibility<'a> {
    mask: Option<Mask<'a>>,
    batch_row: usize,
    /// The position of the first query.
    first_query: usize,
}

impl<'a> Visibility<'a> {
    /// For the `queries` newest of `seen` positions of batch row `batch_row`, which holds tokens at `held`.
    pub fn new(mask: Option<Mask<'a>>, batch_row: usize, seen: usize, queries: usize, held: &Positions) -> Self {
        let mask = mask.filter(|m| !(queries == 1 && m.shows_all(batch_row, held)));
        Self { mask, batch_row, first_query: seen - queries }
    }

    /// Whether query `i` sees all tokens at positions up to `last`.
    pub fn all(&self, i: usize, last: u32) -> bool {
        self.mask.is_none() && last as usize <= self.first_query + i
    }

    /// Whether query `i` sees none of the tokens from position `first` on.
    pub fn none(&self, i: usize, first: u32) -> bool {
        self.mask.is_none() && first as usize > self.first_query + i
    }

    /// Adds the mask to the logits of the tokens at `positions`, for query `i` of query head `head`.
    pub fn apply(&self, head: usize, i: usize, positions: &[u32], scores: &mut [f32]) {
        match self.mask {
            None => {
                for (s, &p) in scores.iter_mut().zip(positions) {
                    if p as usize > self.first_query + i {
                        *s = f32::NEG_INFINITY;
                    }
                }
            }
            Some(Mask(MaskData::Bool(m))) => {
                let (nb, nh, ..) = m.dim();
                let row = row_of(&m, [self.batch_row.min(nb - 1), head.min(nh - 1), i]);
                for (s, &p) in scores.iter_mut().zip(positions) {
                    if row[p as usize] == 0 {
                        *s = f32::NEG_INFINITY;
                    }
                }
            }
            Some(Mask(MaskData::Bias(m))) => {
                let [nb, nh, ..] = m.shape();
                let row = m.row(self.batch_row.min(nb - 1), head.min(nh - 1), i);
                add_bias(row, positions, scores);
            }
        }
    }
}

fn add_bias(row: Slice<'_>, positions: &[u32], scores: &mut [f32]) {
    for (s, &p) in scores.iter_mut().zip(positions) {
        let p = p as usize;
        *s += match row {
            Slice::F32(x) => x[p],
            Slice::F16(x) => x[p].to_f32(),
            Slice::Bf16(x) => x[p].to_f32(),
        };
    }
}
