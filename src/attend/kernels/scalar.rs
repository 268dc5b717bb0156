//! The equations, one loop each.

#![forbid(unsafe_code)]

use std::ops::Range;

use half::f16;

use super::{Kernels, nothing_visible};
use crate::attend::codes::Codes;
use crate::attend::mat::{Mat, MatMut};
use crate::tensor::Slice;

pub(super) static KERNELS: Kernels =
    Kernels { name: "scalar", dot_rows, add_rows, add_codes, unpack, fold, softmax, prefetch: |_| (), matmul };

fn dot_rows(q: Mat<'_>, rows: Slice<'_>, d: usize, mut out: MatMut<'_>) {
    let mut row = vec![0.0; d];
    for t in 0..rows.len() / d {
        rows.part(t * d..(t + 1) * d).to_f32(&mut row);
        for g in 0..q.rows {
            out.row(g)[t] = q.row(g).iter().zip(&row).map(|(q, k)| q * k).sum();
        }
    }
}

fn add_rows(w: Mat<'_>, rows: Slice<'_>, d: usize, mut acc: MatMut<'_>) {
    let mut row = vec![0.0; d];
    for t in 0..rows.len() / d {
        rows.part(t * d..(t + 1) * d).to_f32(&mut row);
        for g in 0..w.rows {
            for (a, v) in acc.row(g).iter_mut().zip(&row) {
                *a += w.row(g)[t] * v;
            }
        }
    }
}

fn add_codes(w: Mat<'_>, codes: Codes<'_>, lanes: Range<usize>, mut acc: MatMut<'_>) {
    for g in 0..w.rows {
        for l in lanes.clone() {
            for o in 0..codes.outer() {
                acc.row(g)[l] += w.row(g)[o] * f32::from(codes.get(o, l));
            }
        }
    }
}

fn unpack(codes: Codes<'_>, mut out: MatMut<'_>) {
    for o in 0..codes.outer() {
        for l in 0..codes.lanes() {
            out.row(o)[l] = f32::from(codes.get(o, l));
        }
    }
}

fn fold(x: &[f32], scale: &[f16], zero: &[f16], folded: &mut [f32]) -> f32 {
    let mut offset = 0.0;
    for i in 0..x.len() {
        folded[i] = x[i] * scale[i].to_f32();
        offset += x[i] * zero[i].to_f32();
    }
    offset
}

fn softmax(x: &mut [f32], max: f32) -> (f32, f32) {
    let max = x.iter().copied().fold(max, f32::max);
    if max == f32::NEG_INFINITY {
        return (max, nothing_visible(x));
    }
    let mut sum = 0.0;
    for x in x {
        *x = (*x - max).exp();
        sum += *x;
    }
    (max, sum)
}

fn matmul(a: Mat<'_>, b: Mat<'_>, n: usize, mut c: MatMut<'_>) {
    for i in 0..a.rows {
        for p in 0..b.rows {
            for j in 0..n {
                c.row(i)[j] += a.row(i)[p] * b.row(p)[j];
            }
        }
    }
}
