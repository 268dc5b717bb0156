//! Which held tokens a query may see.

#![forbid(unsafe_code)]

use std::ops::Range;

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

/// A mask over logical positions: its columns speak of the newest ones, all of them but where a window hides the rest. Batch and
/// heads may be 1.
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

    /// Whether a boolean mask, whose first column is position `first`, shows all of `held` from there on to the one query of batch
    /// row `b`.
    fn shows_all(&self, b: usize, first: u32, held: &Positions) -> bool {
        let MaskData::Bool(m) = self.0 else {
            return false;
        };
        let (batch, heads, queries, _) = m.dim();
        if heads != 1 || queries != 1 {
            return false;
        }
        let row = row_of(&m, [b.min(batch - 1), 0, 0]);
        let shown = |(start, len): (u32, u32)| {
            let (start, end) = (start.max(first) - first, (start + len).saturating_sub(first));
            start >= end || row[start as usize..end as usize].iter().all(|&x| x != 0)
        };
        held.runs().all(shown)
    }
}

/// Which positions queries see.
#[derive(Clone, Copy)]
pub struct Seen<'a> {
    /// Which each of them sees; without it, causality.
    pub mask: Option<Mask<'a>>,
    /// Positions that there are.
    pub positions: usize,
    /// How many of the newest ones, itself among them, a query sees at most; `None`: all.
    pub window: Option<usize>,
}

/// What the queries of one batch row see: a mask's word, or without a mask causality.
pub struct Visibility<'a> {
    mask: Option<Mask<'a>>,
    batch_row: usize,
    /// The position of the first query.
    first_query: usize,
    /// The position of the mask's first column; what is older is hidden.
    first_column: u32,
    window: Option<usize>,
}

impl<'a> Visibility<'a> {
    /// For the queries of the `queries` newest positions of batch row `batch_row`, which holds tokens at `held`.
    pub fn new(seen: Seen<'a>, batch_row: usize, queries: usize, held: &Positions) -> Self {
        let first_column = seen.mask.map_or(0, |mask| seen.positions - mask.shape()[3]) as u32;
        let mask = seen.mask.filter(|m| !(queries == 1 && m.shows_all(batch_row, first_column, held)));
        // There may be more queries than positions where a mask says what they see.
        let first_query = seen.positions.saturating_sub(queries);
        Self { mask, batch_row, first_query, first_column, window: seen.window }
    }

    /// Whether query `i` sees all tokens at positions from `first` to `last`.
    pub fn all(&self, i: usize, [first, last]: [u32; 2]) -> bool {
        let query = self.first_query + i;
        self.mask.is_none() && last as usize <= query && !self.passed(query, first)
    }

    /// Whether `queries` see none of the tokens at positions from `first` to `last`.
    pub fn none(&self, queries: &Range<usize>, [first, last]: [u32; 2]) -> bool {
        if self.mask.is_some() {
            return last < self.first_column;
        }
        let [oldest, newest] = [queries.start, queries.end - 1].map(|i| self.first_query + i);
        first as usize > newest || self.passed(oldest, last)
    }

    /// Whether the window of a query at that position has passed `token`.
    fn passed(&self, query: usize, token: u32) -> bool {
        self.window.is_some_and(|window| token as usize + window <= query)
    }

    /// Adds the mask to the logits of the tokens at `positions`, for query `i` of query head `head`.
    pub fn apply(&self, head: usize, i: usize, positions: &[u32], scores: &mut [f32]) {
        match self.mask {
            None => {
                let query = self.first_query + i;
                for (s, &p) in scores.iter_mut().zip(positions) {
                    if p as usize > query || self.passed(query, p) {
                        *s = f32::NEG_INFINITY;
                    }
                }
            }
            Some(Mask(MaskData::Bool(m))) => {
                let (nb, nh, ..) = m.dim();
                let row = row_of(&m, [self.batch_row.min(nb - 1), head.min(nh - 1), i]);
                for (s, &p) in scores.iter_mut().zip(positions) {
                    if p < self.first_column || row[(p - self.first_column) as usize] == 0 {
                        *s = f32::NEG_INFINITY;
                    }
                }
            }
            Some(Mask(MaskData::Bias(m))) => {
                let [nb, nh, ..] = m.shape();
                let row = m.row(self.batch_row.min(nb - 1), head.min(nh - 1), i);
                let hidden = positions.partition_point(|&p| p < self.first_column);
                scores[..hidden].fill(f32::NEG_INFINITY);
                add_bias(row, self.first_column, &positions[hidden..], &mut scores[hidden..]);
            }
        }
    }
}

fn add_bias(row: Slice<'_>, first: u32, positions: &[u32], scores: &mut [f32]) {
    for (s, &p) in scores.iter_mut().zip(positions) {
        let p = (p - first) as usize;
        *s += match row {
            Slice::F32(x) => x[p],
            Slice::F16(x) => x[p].to_f32(),
            Slice::Bf16(x) => x[p].to_f32(),
        };
    }
}
