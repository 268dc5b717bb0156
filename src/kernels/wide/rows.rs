//! Exact rows, in f32, f16 or bf16.

use half::{bf16, f16};

use super::super::Ahead;
use super::super::vector::Vector;
use super::tiles_of_heads;
use crate::linalg::{Mat, MatMut};
use crate::tensor::Slice;

/// A number that a vector of can be loaded as f32.
trait Number: Copy {
    /// # Safety
    /// That of [`Vector`].
    unsafe fn load<V: Vector>(p: *const Self) -> V::F;
    fn f32(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V::F {
        // SAFETY: by the trait's contract.
        unsafe { V::load(p) }
    }
    fn f32(self) -> f32 {
        self
    }
}

impl Number for f16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V::F {
        // SAFETY: by the trait's contract.
        unsafe { V::load_f16(p) }
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

impl Number for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(p: *const Self) -> V::F {
        // SAFETY: by the trait's contract.
        unsafe { V::load_bf16(p) }
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

/// `out[g, t] = q_g . rows_t`.
#[inline(always)]
pub(in super::super) unsafe fn dot_rows<V: Vector>(
    q: Mat<'_>,
    rows: Slice<'_>,
    d: usize,
    out: MatMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: by the caller's contract.
    unsafe {
        match rows {
            Slice::F32(x) => dot_rows_of::<V, _>(q, x, d, out, ahead),
            Slice::F16(x) => dot_rows_of::<V, _>(q, x, d, out, ahead),
            Slice::Bf16(x) => dot_rows_of::<V, _>(q, x, d, out, ahead),
        }
    }
}

#[inline(always)]
unsafe fn dot_rows_of<V: Vector, T: Number>(
    q: Mat<'_>,
    rows: &[T],
    d: usize,
    mut out: MatMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    let n = rows.len() / d;
    tiles_of_heads!(q.rows, g, G => {
        let mut t = 0;
        let many = V::REGISTERS > 16 || G < 4;
        // SAFETY: by the caller's contract.
        unsafe {
            while many && t + 4 <= n {
                dot_tile::<V, T, G, 4>(q, rows, d, [g, t], &mut out);
                ahead.fetch((4 * d * size_of::<T>()).div_ceil(Ahead::LINE));
                t += 4;
            }
            while t + 2 <= n {
                dot_tile::<V, T, G, 2>(q, rows, d, [g, t], &mut out);
                ahead.fetch((2 * d * size_of::<T>()).div_ceil(Ahead::LINE));
                t += 2;
            }
            if t < n {
                dot_tile::<V, T, G, 1>(q, rows, d, [g, t], &mut out);
            }
        }
    });
}

/// Query heads `g0 .. g0 + G`, rows `t0 .. t0 + R`.
#[inline(always)]
unsafe fn dot_tile<V: Vector, T: Number, const G: usize, const R: usize>(
    q: Mat<'_>,
    rows: &[T],
    d: usize,
    [g0, t0]: [usize; 2],
    out: &mut MatMut<'_>,
) {
    let whole = d / V::LANES * V::LANES;
    let (q_data, q_stride) = (&q.data[g0 * q.stride..], q.stride);
    let rows = &rows[t0 * d..];
    let mut sum = [[0.0f32; R]; G];
    // SAFETY: c + LANES <= d, the length of each row and of each row of q, by the caller's contract.
    unsafe {
        let mut acc = [[V::zero(); R]; G];
        for c in (0..whole).step_by(V::LANES) {
            let mut x = [V::zero(); G];
            for g in 0..G {
                x[g] = V::load(q_data.as_ptr().add(g * q_stride + c));
            }
            for r in 0..R {
                let k = T::load::<V>(rows.as_ptr().add(r * d + c));
                for g in 0..G {
                    acc[g][r] = V::fma(x[g], k, acc[g][r]);
                }
            }
        }
        for g in 0..G {
            if R == 4 {
                sum[g].copy_from_slice(&V::sum4([acc[g][0], acc[g][1 % R], acc[g][2 % R], acc[g][3 % R]])[..R]);
            } else {
                for r in 0..R {
                    sum[g][r] = V::sum(acc[g][r]);
                }
            }
        }
    }
    for g in 0..G {
        for r in 0..R {
            let rest: f32 = (whole..d).map(|c| q_data[g * q_stride + c] * rows[r * d + c].f32()).sum();
            out.data[(g0 + g) * out.stride + t0 + r] = sum[g][r] + rest;
        }
    }
}

/// `acc[g, c] += sum_t w[g, t] rows[t, c]`.
#[inline(always)]
pub(in super::super) unsafe fn add_rows<V: Vector>(
    w: Mat<'_>,
    rows: Slice<'_>,
    d: usize,
    acc: MatMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: by the caller's contract.
    unsafe {
        match rows {
            Slice::F32(x) => add_rows_of::<V, _>(w, x, d, acc, ahead),
            Slice::F16(x) => add_rows_of::<V, _>(w, x, d, acc, ahead),
            Slice::Bf16(x) => add_rows_of::<V, _>(w, x, d, acc, ahead),
        }
    }
}

#[inline(always)]
unsafe fn add_rows_of<V: Vector, T: Number>(
    w: Mat<'_>,
    rows: &[T],
    d: usize,
    mut acc: MatMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    let n = rows.len() / d;
    tiles_of_heads!(w.rows, g, G => {
        let (w, mut acc) = (w.part(g, G), acc.part(g, G));
        let many = V::REGISTERS > 16 || G < 4;
        let mut c = 0;
        // SAFETY: by the caller's contract.
        unsafe {
            while many && c + 4 * V::LANES <= d {
                add_tile::<V, T, G, 4>(w, rows, d, c, &mut acc, ahead);
                c += 4 * V::LANES;
            }
            while c + 2 * V::LANES <= d {
                add_tile::<V, T, G, 2>(w, rows, d, c, &mut acc, ahead);
                c += 2 * V::LANES;
            }
            while c + V::LANES <= d {
                add_tile::<V, T, G, 1>(w, rows, d, c, &mut acc, ahead);
                c += V::LANES;
            }
        }
        for c in c..d {
            for g in 0..G {
                let sum: f32 = (0..n).map(|t| w.row(g)[t] * rows[t * d + c].f32()).sum();
                acc.row(g)[c] += sum;
            }
        }
    });
}

/// Columns `c .. c + N LANES` of all rows.
#[inline(always)]
unsafe fn add_tile<V: Vector, T: Number, const G: usize, const N: usize>(
    w: Mat<'_>,
    rows: &[T],
    d: usize,
    c: usize,
    acc: &mut MatMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: columns c .. c + N LANES are within d, rows within `rows` and `w`, by the caller's contract.
    unsafe {
        let mut sum = [[V::zero(); N]; G];
        for t in 0..rows.len() / d {
            let row = rows.as_ptr().add(t * d + c);
            ahead.fetch((N * V::LANES * size_of::<T>()).div_ceil(Ahead::LINE));
            let mut weight = [V::zero(); G];
            for g in 0..G {
                weight[g] = V::splat(*w.data.as_ptr().add(g * w.stride + t));
            }
            for v in 0..N {
                let x = T::load::<V>(row.add(v * V::LANES));
                for g in 0..G {
                    sum[g][v] = V::fma(weight[g], x, sum[g][v]);
                }
            }
        }
        for g in 0..G {
            for v in 0..N {
                let p = acc.data.as_mut_ptr().add(g * acc.stride + c + v * V::LANES);
                V::store(p, V::add(V::load(p), sum[g][v]));
            }
        }
    }
}
