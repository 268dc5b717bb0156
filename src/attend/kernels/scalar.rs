//! The equations, one loop each.

#![forbid(unsafe_code)]

use std::ops::Range;

use super::{Ahead, Folded, Grid, Kernels, nothing_visible};
use crate::attend::codes::Codes;
use crate::attend::folded::step_of;
use crate::attend::mat::{Mat, MatMut};
use crate::tensor::Slice;

pub(super) static KERNELS: Kernels =
    Kernels { name: "scalar", dot_rows, add_rows, fold, add_codes, unpack, softmax, matmul };

fn dot_rows(q: Mat<'_>, rows: Slice<'_>, d: usize, mut out: MatMut<'_>, _: &mut Ahead<'_>) {
    let mut row = vec![0.0; d];
    for t in 0..rows.len() / d {
        rows.part(t * d..(t + 1) * d).to_f32(&mut row);
        for g in 0..q.rows {
            out.row(g)[t] = q.row(g).iter().zip(&row).map(|(q, k)| q * k).sum();
        }
    }
}

fn add_rows(w: Mat<'_>, rows: Slice<'_>, d: usize, mut acc: MatMut<'_>, _: &mut Ahead<'_>) {
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

fn fold(x: Mat<'_>, grid: Grid<'_>, largest_word: f32, lead: usize, out: &mut Folded) {
    for g in 0..x.rows {
        let x = &x.row(g)[..grid.scale.len()];
        let product = |i: usize| x[i] * grid.scale[i].to_f32();
        let max = (0..x.len()).map(|i| product(i).abs()).fold(0.0, f32::max);
        let (step, inverse) = step_of(max, largest_word);
        out.step[g] = step;
        out.offset[g] = (0..x.len()).map(|i| x[i] * grid.zero[i].to_f32()).sum();
        for (i, word) in out.words[g * out.stride + lead..][..x.len()].iter_mut().enumerate() {
            *word = (product(i) * inverse).round_ties_even() as i16;
        }
    }
}

fn add_codes(w: &Folded, codes: Codes<'_>, lanes: Range<usize>, mut acc: MatMut<'_>) {
    for g in 0..w.rows {
        let words = &w.words[g * w.stride..(g + 1) * w.stride];
        for l in lanes.clone() {
            let sum: i32 = (0..codes.outer()).map(|o| i32::from(words[o]) * i32::from(codes.get(o, l))).sum();
            acc.row(g)[l] += w.step[g] * sum as f32 + w.offset[g];
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
