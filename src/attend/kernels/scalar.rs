//! The equations, one loop each.

use std::ops::Range;

use super::{Kernels, Matmul};
use crate::attend::codes::Codes;
use crate::tensor::Slice;

pub(super) static KERNELS: Kernels = Kernels { name: "scalar", dot_rows, add_rows, add_codes, unpack, exp_sum, matmul };

fn dot_rows(q: &[f32], rows: Slice<'_>, d: usize, out: &mut [f32], stride: usize) {
    let mut row = vec![0.0; d];
    for t in 0..rows.len() / d {
        rows.part(t * d..(t + 1) * d).to_f32(&mut row);
        for (g, q) in q.chunks_exact(d).enumerate() {
            out[g * stride + t] = q.iter().zip(&row).map(|(q, k)| q * k).sum();
        }
    }
}

fn add_rows(w: &[f32], w_stride: usize, rows: Slice<'_>, d: usize, acc: &mut [f32], acc_stride: usize) {
    let mut row = vec![0.0; d];
    for t in 0..rows.len() / d {
        rows.part(t * d..(t + 1) * d).to_f32(&mut row);
        for (g, acc) in acc.chunks_mut(acc_stride).enumerate() {
            for (a, v) in acc.iter_mut().zip(&row) {
                *a += w[g * w_stride + t] * v;
            }
        }
    }
}

fn add_codes(w: &[f32], codes: Codes<'_>, lanes: Range<usize>, acc: &mut [f32], acc_stride: usize) {
    let outer = codes.outer();
    for (g, w) in w.chunks_exact(outer).enumerate() {
        for l in lanes.clone() {
            for (o, w) in w.iter().enumerate() {
                acc[g * acc_stride + l] += w * f32::from(codes.get(o, l));
            }
        }
    }
}

fn unpack(codes: Codes<'_>, out: &mut [f32], stride: usize) {
    for o in 0..codes.outer() {
        for l in 0..codes.lanes() {
            out[o * stride + l] = f32::from(codes.get(o, l));
        }
    }
}

fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    let mut sum = 0.0;
    for x in x {
        *x = (*x - max).exp();
        sum += *x;
    }
    sum
}

fn matmul(Matmul { m, k, n, a: (a, lda), b: (b, ldb), c: (c, ldc) }: Matmul<'_>) {
    for i in 0..m {
        for p in 0..k {
            for j in 0..n {
                c[i * ldc + j] += a[i * lda + p] * b[p * ldb + j];
            }
        }
    }
}
