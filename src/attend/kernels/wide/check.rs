//! The sizes that the loops rely on; the only thing between a caller's mistake and memory of others.

#![forbid(unsafe_code)]

use std::ops::Range;

use super::super::{Folded, Grid};
use crate::attend::codes::{Codes, LANES};
use crate::attend::mat::{Mat, MatMut};
use crate::tensor::Slice;

pub(in super::super) fn dot_rows(q: Mat<'_>, rows: Slice<'_>, d: usize, out: &MatMut<'_>) {
    assert!(d > 0 && q.has_columns(d) && out.has_columns(rows.len() / d) && out.rows == q.rows);
}

pub(in super::super) fn add_rows(w: Mat<'_>, rows: Slice<'_>, d: usize, acc: &MatMut<'_>) {
    assert!(d > 0 && w.has_columns(rows.len() / d) && acc.has_columns(d) && acc.rows == w.rows);
}

pub(in super::super) fn fold(x: Mat<'_>, grid: Grid<'_>, lead: usize, out: &Folded) {
    let n = grid.scale.len();
    assert!(grid.zero.len() == n && x.has_columns(n) && lead + n <= out.stride);
    assert!(out.rows == x.rows && holds_rows(out));
}

pub(in super::super) fn add_codes(w: &Folded, codes: Codes<'_>, lanes: &Range<usize>, acc: &MatMut<'_>) {
    assert!(lanes.start.is_multiple_of(LANES) && lanes.end.is_multiple_of(LANES) && lanes.end <= codes.lanes());
    assert!(w.stride == codes.outer() && holds_rows(w) && acc.has_columns(lanes.end) && acc.rows == w.rows);
}

fn holds_rows(w: &Folded) -> bool {
    w.words.len() >= w.rows * w.stride && w.step.len() >= w.rows && w.offset.len() >= w.rows
}

pub(in super::super) fn unpack(codes: Codes<'_>, out: &MatMut<'_>) {
    assert!(out.rows == codes.outer() && out.has_columns(codes.lanes()));
}

pub(in super::super) fn matmul(a: Mat<'_>, b: Mat<'_>, n: usize, c: &MatMut<'_>) {
    assert!(a.has_columns(b.rows) && b.has_columns(n) && c.has_columns(n) && c.rows == a.rows);
}
