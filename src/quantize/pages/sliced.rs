//! Exact rows of fewer numbers than keys or values have: what a map leaves of them, in the model's own dtype.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::rows;
use crate::attend::{KeySegment, Scratch, ValueSegment, Weights};
use crate::kernels::Ahead;
use crate::linalg::{Map, Mat, MatMut};
use crate::tensor::Rows;

/// `y = T x` of every token.
#[derive(Clone)]
pub struct SlicedRows {
    rows: Rows,
    map: Arc<Map>,
}

impl SlicedRows {
    /// The `n` oldest of `rows`, by way of `map`.
    pub(in crate::quantize) fn seal(map: Arc<Map>, rows: &Rows, n: usize) -> Self {
        let (dim, mut sliced) = (rows.dim(), Rows::new(rows.dtype(), map.dim(rows.dim())));
        let all = map.apply_rows(&rows.to_f32(0..n), dim);
        all.chunks_exact(sliced.dim()).for_each(|row| sliced.push(row));
        Self { rows: sliced.copy(0..n), map }
    }

    pub(super) fn rows(&self) -> &Rows {
        &self.rows
    }

    /// A page of some tokens.
    #[must_use]
    pub(super) fn part(&self, tokens: &[usize]) -> Self {
        Self { rows: self.rows.take(tokens), map: Arc::clone(&self.map) }
    }

    /// Takes the first of some tokens of `other`, if that is in the same coordinates, up to a whole page.
    pub(super) fn join(&mut self, other: &Self, tokens: &[usize]) -> usize {
        if Arc::ptr_eq(&self.map, &other.map) { rows::join(&mut self.rows, &other.rows, tokens) } else { 0 }
    }
}

impl KeySegment for SlicedRows {
    fn granularity(&self) -> usize {
        1
    }

    fn map(&self) -> Option<&Arc<Map>> {
        Some(&self.map)
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        KeySegment::bytes(&self.rows, first, n)
    }

    fn scores(
        &self,
        q: Mat<'_>,
        first: usize,
        n: usize,
        out: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        self.rows.scores(q, first, n, out, scratch, ahead);
    }

    fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch) {
        KeySegment::tile(&self.rows, first, n, out, scratch);
    }
}

impl ValueSegment for SlicedRows {
    fn map(&self) -> Option<&Arc<Map>> {
        Some(&self.map)
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        ValueSegment::bytes(&self.rows, first, n)
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
        self.rows.accumulate(weights, first, n, acc, scratch, ahead);
    }

    fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch) {
        ValueSegment::tile(&self.rows, first, n, out, scratch);
    }
}
