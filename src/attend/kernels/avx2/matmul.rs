//! Many queries times a tile of tokens.

use std::arch::x86_64::*;

use super::tiles_of_heads;
use crate::attend::mat::{Mat, MatMut};

pub(super) fn matmul(a: Mat<'_>, b: Mat<'_>, n: usize, mut c: MatMut<'_>) {
    assert!(a.has_columns(b.rows) && b.has_columns(n) && c.has_columns(n) && c.rows == a.rows);
    let (pairs, whole) = (n / 16 * 16, n / 8 * 8);
    tiles_of_heads!(a.rows, i, M => {
        let (a, mut c) = (a.part(i, M), c.part(i, M));
        // SAFETY: the table is only handed out where the CPU has AVX2 and FMA; sizes as asserted.
        unsafe {
            for j in (0..pairs).step_by(16) {
                matmul_tile::<M, 2>(a, b, j, &mut c);
            }
            if pairs < whole {
                matmul_tile::<M, 1>(a, b, pairs, &mut c);
            }
        }
        for j in whole..n {
            for i in 0..M {
                c.row(i)[j] += (0..b.rows).map(|p| a.row(i)[p] * b.row(p)[j]).sum::<f32>();
            }
        }
    });
}

/// # Safety
/// AVX2, FMA; `a` and `c` hold `M` rows; rows of `a` reach `b.rows`, rows of `b` and `c` column `j + 8 V`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn matmul_tile<const M: usize, const V: usize>(a: Mat<'_>, b: Mat<'_>, j: usize, c: &mut MatMut<'_>) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut sum = [[_mm256_setzero_ps(); V]; M];
        for p in 0..b.rows {
            let mut x = [_mm256_setzero_ps(); V];
            for (v, x) in x.iter_mut().enumerate() {
                *x = _mm256_loadu_ps(b.data.as_ptr().add(p * b.stride + j + 8 * v));
            }
            for (i, sum) in sum.iter_mut().enumerate() {
                let a = _mm256_broadcast_ss(&*a.data.as_ptr().add(i * a.stride + p));
                for (sum, x) in sum.iter_mut().zip(x) {
                    *sum = _mm256_fmadd_ps(a, x, *sum);
                }
            }
        }
        for (i, sum) in sum.into_iter().enumerate() {
            for (v, sum) in sum.into_iter().enumerate() {
                let c = c.data.as_mut_ptr().add(i * c.stride + j + 8 * v);
                _mm256_storeu_ps(c, _mm256_add_ps(_mm256_loadu_ps(c), sum));
            }
        }
    }
}
