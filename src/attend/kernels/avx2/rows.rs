//! Exact rows, in f32, f16 or bf16.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{sum_lanes, tiles_of_heads};
use crate::attend::mat::{Mat, MatMut};
use crate::tensor::Slice;

/// Loads eight numbers as f32. Always inlined: only inside a function with the CPU features do the intrinsics become
/// instructions.
trait Load: Copy {
    /// # Safety
    /// Eight numbers at `p` must be readable, and the CPU must have AVX2 and F16C.
    unsafe fn load(p: *const Self) -> __m256;
    fn f32(self) -> f32;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn load(p: *const Self) -> __m256 {
        // SAFETY: by the trait's contract.
        unsafe { _mm256_loadu_ps(p) }
    }
    fn f32(self) -> f32 {
        self
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn load(p: *const Self) -> __m256 {
        // SAFETY: by the trait's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn load(p: *const Self) -> __m256 {
        // SAFETY: by the trait's contract.
        unsafe {
            let x = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32(x, 16))
        }
    }
    fn f32(self) -> f32 {
        self.to_f32()
    }
}

pub(super) fn dot_rows(q: Mat<'_>, rows: Slice<'_>, d: usize, out: MatMut<'_>) {
    match rows {
        Slice::F32(x) => dot_rows_of(q, x, d, out),
        Slice::F16(x) => dot_rows_of(q, x, d, out),
        Slice::Bf16(x) => dot_rows_of(q, x, d, out),
    }
}

fn dot_rows_of<T: Load>(q: Mat<'_>, rows: &[T], d: usize, mut out: MatMut<'_>) {
    assert!(q.has_columns(d) && out.has_columns(rows.len() / d) && out.rows == q.rows);
    tiles_of_heads!(q.rows, g, G => {
        // SAFETY: the table is only handed out where the CPU has the features; sizes as asserted.
        unsafe { dot_rows_tile::<T, G>(q.part(g, G), rows, d, &mut out.part(g, G)) }
    });
}

/// # Safety
/// AVX2, FMA, F16C; `q` holds `G` rows of `d` numbers, `out` `G` of one a row.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_rows_tile<T: Load, const G: usize>(q: Mat<'_>, rows: &[T], d: usize, out: &mut MatMut<'_>) {
    let whole = d / 8 * 8;
    for (t, row) in rows.chunks_exact(d).enumerate() {
        let mut acc = [_mm256_setzero_ps(); G];
        for c in (0..whole).step_by(8) {
            // SAFETY: c + 8 <= d, the length of `row` and of each row of q.
            unsafe {
                let k = T::load(row.as_ptr().add(c));
                for (g, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(_mm256_loadu_ps(q.data.as_ptr().add(g * q.stride + c)), k, *acc);
                }
            }
        }
        for (g, acc) in acc.into_iter().enumerate() {
            let rest: f32 = (whole..d).map(|c| q.data[g * q.stride + c] * row[c].f32()).sum();
            out.data[g * out.stride + t] = sum_lanes(acc) + rest;
        }
    }
}

pub(super) fn add_rows(w: Mat<'_>, rows: Slice<'_>, d: usize, acc: MatMut<'_>) {
    match rows {
        Slice::F32(x) => add_rows_of(w, x, d, acc),
        Slice::F16(x) => add_rows_of(w, x, d, acc),
        Slice::Bf16(x) => add_rows_of(w, x, d, acc),
    }
}

fn add_rows_of<T: Load>(w: Mat<'_>, rows: &[T], d: usize, mut acc: MatMut<'_>) {
    assert!(w.has_columns(rows.len() / d) && acc.has_columns(d) && acc.rows == w.rows);
    tiles_of_heads!(w.rows, g, G => {
        const WIDE: usize = if G == 4 { 2 } else { 4 };
        let (w, mut acc) = (w.part(g, G), acc.part(g, G));
        let mut c = 0;
        // SAFETY: the table is only handed out where the CPU has the features; sizes as asserted.
        unsafe {
            while c + WIDE * 8 <= d {
                add_rows_tile::<T, G, WIDE>(w, rows, d, c, &mut acc);
                c += WIDE * 8;
            }
            while c + 8 <= d {
                add_rows_tile::<T, G, 1>(w, rows, d, c, &mut acc);
                c += 8;
            }
        }
        for c in c..d {
            for g in 0..G {
                let sum: f32 = rows.chunks_exact(d).zip(w.row(g)).map(|(row, w)| w * row[c].f32()).sum();
                acc.row(g)[c] += sum;
            }
        }
    });
}

/// # Safety
/// AVX2, FMA, F16C; `w` and `acc` hold `G` rows, of one number a row of `rows` and of `d`; `c + 8 V <= d`.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_rows_tile<T: Load, const G: usize, const V: usize>(
    w: Mat<'_>,
    rows: &[T],
    d: usize,
    c: usize,
    acc: &mut MatMut<'_>,
) {
    let mut sum = [[_mm256_setzero_ps(); V]; G];
    // SAFETY: columns c .. c + 8 V are within d, tokens within `rows` and `w`, by this function's contract.
    unsafe {
        for (g, sum) in sum.iter_mut().enumerate() {
            for (v, sum) in sum.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(acc.data.as_ptr().add(g * acc.stride + c + 8 * v));
            }
        }
        for t in 0..rows.len() / d {
            let row = rows.as_ptr().add(t * d + c);
            for v in 0..V {
                let x = T::load(row.add(8 * v));
                for (g, sum) in sum.iter_mut().enumerate() {
                    sum[v] = _mm256_fmadd_ps(_mm256_broadcast_ss(&*w.data.as_ptr().add(g * w.stride + t)), x, sum[v]);
                }
            }
        }
        for (g, sum) in sum.into_iter().enumerate() {
            for (v, sum) in sum.into_iter().enumerate() {
                _mm256_storeu_ps(acc.data.as_mut_ptr().add(g * acc.stride + c + 8 * v), sum);
            }
        }
    }
}
