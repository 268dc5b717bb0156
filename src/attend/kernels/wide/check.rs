//! The sizes that the loops rely on; the only thing between a caller's mistake and memory of others.

#![forbid(unsafe_code)]

use super::super::Weighed;
use crate::attend::codes::{Codes, LANES};
use crate::attend::mat::{Mat, MatMut};
use crate::attend::packed::Packed;
use crate::tensor::Slice;

pub(in super::super) fn dot_rows(q: Mat<'_>, rows: Slice<'_>, d: usize, out: &MatMut<'_>) {
    assert!(d > 0 && q.has_columns(d) && out.has_columns(rows.len() / d) && out.rows == q.rows);
}

pub(in super::super) fn add_rows(w: Mat<'_>, rows: Slice<'_>, d: usize, acc: &MatMut<'_>) {
    assert!(d > 0 && w.has_columns(rows.len() / d) && acc.has_columns(d) && acc.rows == w.rows);
}

pub(in super::super) fn add_packed(w: Mat<'_>, packed: &Packed<'_>, acc: &MatMut<'_>) {
    assert!(packed.width.is_multiple_of(LANES) && w.has_columns(packed.outer));
    assert!(acc.has_columns(packed.columns()) && acc.rows == w.rows);
}

pub(in super::super) fn softmax(x: &MatMut<'_>, n: usize, weighed: &[Weighed]) {
    assert!(x.has_columns(n) && x.rows == weighed.len());
}

pub(in super::super) fn unpack(codes: Codes<'_>, out: &MatMut<'_>) {
    assert!(out.rows == codes.outer() && out.has_columns(codes.lanes()));
}

pub(in super::super) fn matmul(a: Mat<'_>, b: Mat<'_>, n: usize, c: &MatMut<'_>) {
    assert!(a.has_columns(b.rows) && b.has_columns(n) && c.has_columns(n) && c.rows == a.rows);
}
