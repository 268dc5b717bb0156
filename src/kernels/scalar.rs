//! The equations, one loop each.

#![forbid(unsafe_code)]

use std::ops::Range;

use super::{Ahead, Folded, Kernels, Rotate, Weighed, shift};
use crate::format::codes::Codes;
use crate::format::folded::{largest_word, rounding_error, step_of};
use crate::format::packed::{Grid, Packed};
use crate::linalg::{Mat, MatMut};
use crate::tensor::Slice;

pub(super) static KERNELS: Kernels =
    Kernels { name: "scalar", dot_rows, add_rows, add_packed, unpack, rotate, softmax, matmul };

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
    let Packed { outer, lead, tolerance, .. } = *packed;
    let (largest, center) = (largest_word(packed.largest(), outer), packed.center());
    folded.reset(1, packed);
    for i in 0..packed.parts {
        let (grid, (codes, lanes)) = (packed.grid(i), packed.codes(i));
        let lane_scales = packed.lane_scales(i, lanes.len());
        let lane_scale = |l: usize| lane_scales.map_or(1.0, |scales| scales[l].to_f32());
        let product = |g: usize, o: usize| w.row(g)[o] * grid.scale(o);
        let max = |g: usize| (0..outer).map(|o| product(g, o).abs()).fold(0.0, f32::max);
        let error = rounding_error(
            (0..w.rows).map(|g| step_of(max(g), largest).0).fold(0.0, f32::max),
            packed.largest(),
            outer,
        );
        let exact = error > tolerance;
        for g in 0..w.rows {
            let out = &mut acc.row(g)[i * packed.width..][..lanes.len()];
            let weighted = |x: &dyn Fn(usize) -> f32| (0..outer).map(|o| w.row(g)[o] * x(o)).sum::<f32>();
            if exact {
                let offset = weighted(&|o| grid.zero(o));
                for (l, out) in out.iter_mut().enumerate() {
                    let code = |o: usize| f32::from(codes.level(lead + o, lanes.start + l));
                    *out += lane_scale(l) * ((0..outer).map(|o| product(g, o) * code(o)).sum::<f32>() + offset);
                }
                continue;
            }
            let (step, inverse) = step_of(max(g), largest);
            let words = &mut folded.words[..outer];
            for (o, word) in words.iter_mut().enumerate() {
                *word = (product(g, o) * inverse).round_ties_even() as i16;
            }
            let at_center = match grid {
                Grid::Affine(..) => weighted(&|o| grid.zero(o) + center * grid.scale(o)),
                Grid::Scaled(..) | Grid::Plain(_) => 0.0,
            };
            let offset = at_center - step * center * words.iter().map(|&word| i32::from(word)).sum::<i32>() as f32;
            for (l, out) in out.iter_mut().enumerate() {
                let code = |o: usize| i32::from(codes.level(lead + o, lanes.start + l));
                let sum = words.iter().enumerate().map(|(o, &word)| i32::from(word) * code(o)).sum::<i32>();
                *out += lane_scale(l) * (step * sum as f32 + offset);
            }
        }
    }
}

fn unpack(codes: Codes<'_>, lanes: Range<usize>, mut out: MatMut<'_>) {
    for o in 0..codes.outer() {
        for l in lanes.clone() {
            out.row(o)[l - lanes.start] = f32::from(codes.level(o, l));
        }
    }
}

fn rotate(mut x: MatMut<'_>, rotate: &Rotate<'_>, n: usize) {
    for (c, (scale, zero)) in rotate.scale.iter().zip(rotate.zero).enumerate() {
        for x in &mut x.row(c)[..n] {
            *x = scale * *x + zero;
        }
    }
    for (i, &(a, b)) in rotate.pairs.iter().enumerate() {
        let (a, b) = (usize::from(a), usize::from(b));
        for t in 0..n {
            let (cos, sin) = (rotate.cos.row(i)[t], rotate.sin.row(i)[t]);
            let (xa, xb) = (x.row(a)[t], x.row(b)[t]);
            x.row(a)[t] = xa * cos - xb * sin;
            x.row(b)[t] = xa * sin + xb * cos;
        }
    }
}

fn softmax(mut x: MatMut<'_>, n: usize, weighed: &mut [Weighed]) {
    for (g, weighed) in weighed.iter_mut().enumerate() {
        let x = &mut x.row(g)[..n];
        let own = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let max = weighed.max.max(own);
        for x in x.iter_mut() {
            *x = (*x - shift(max)).exp();
        }
        *weighed = Weighed { max, sum: x.iter().sum(), heaviest: Weighed::heaviest(own, max) };
    }
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
