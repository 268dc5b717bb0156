//! The equations, one loop each.

#![forbid(unsafe_code)]

use super::{Ahead, Folded, Kernels, nothing_visible};
use crate::attend::codes::Codes;
use crate::attend::folded::{largest_word, step_of};
use crate::attend::mat::{Mat, MatMut};
use crate::attend::packed::{Grid, Packed};
use crate::tensor::Slice;

pub(super) static KERNELS: Kernels =
    Kernels { name: "scalar", dot_rows, add_rows, add_packed, unpack, softmax, matmul };

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

fn add_packed(w: Mat<'_>, packed: &Packed<'_>, mut acc: MatMut<'_>, folded: &mut Folded, _: &mut Ahead<'_>) {
    folded.reset(w.rows, packed);
    let largest = largest_word(packed.bits, packed.outer);
    for i in 0..packed.parts {
        let Grid { scale, zero } = packed.grid(i);
        let (codes, lanes) = packed.codes(i);
        for g in 0..w.rows {
            let w = &w.row(g)[..packed.outer];
            let product = |o: usize| w[o] * scale[o].to_f32();
            let max = (0..w.len()).map(|o| product(o).abs()).fold(0.0, f32::max);
            let (step, inverse) = step_of(max, largest);
            let words = &mut folded.words[packed.lead..][..w.len()];
            for (o, word) in words.iter_mut().enumerate() {
                *word = (product(o) * inverse).round_ties_even() as i16;
            }
            let offset: f32 = (0..w.len()).map(|o| w[o] * zero[o].to_f32()).sum();
            for (l, acc) in lanes.clone().zip(&mut acc.row(g)[i * packed.width..]) {
                let code = |o: usize| i32::from(codes.get(packed.lead + o, l));
                let sum: i32 = words.iter().enumerate().map(|(o, &word)| i32::from(word) * code(o)).sum();
                *acc += step * sum as f32 + offset;
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
