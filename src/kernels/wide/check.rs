//! The sizes that the loops rely on; the only thing between a caller's mistake and memory of others.

#![forbid(unsafe_code)]

use std::ops::Range;

use super::super::{Rotate, Weighed};
use super::rotate::MOST_ROWS;
use crate::format::codes::{Codes, LANES};
use crate::format::packed::Packed;
use crate::linalg::{Mat, MatMut};
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

pub(in super::super) fn unpack(codes: Codes<'_>, lanes: &Range<usize>, out: &MatMut<'_>) {
    assert!(lanes.start <= lanes.end && lanes.end <= codes.lanes() && lanes.len().is_multiple_of(LANES));
    assert!(out.rows == codes.outer() && out.has_columns(lanes.len()));
}

pub(in super::super) fn rotate(x: &MatMut<'_>, rotate: &Rotate<'_>, n: usize) {
    let rows = rotate.scale.len();
    assert!(
        rows <= MOST_ROWS && rotate.zero.len() == rows && x.rows >= rows && x.has_columns(n) && n.is_multiple_of(LANES)
    );
    assert!(rotate.pairs.iter().all(|&(a, b)| a != b && usize::from(a.max(b)) < rows));
    let angles = rotate.pairs.len();
    assert!(
        rotate.cos.rows == angles
            && rotate.sin.rows == angles
            && rotate.cos.has_columns(n)
            && rotate.sin.has_columns(n)
    );
}

pub(in super::super) fn matmul(a: Mat<'_>, b: Mat<'_>, n: usize, c: &MatMut<'_>) {
    assert!(a.has_columns(b.rows) && b.has_columns(n) && c.has_columns(n) && c.rows == a.rows);
}
