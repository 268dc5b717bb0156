//! Exponentials, eight at a time.

use std::arch::x86_64::*;

use super::{max_lanes, sum_lanes};
use crate::attend::kernels::nothing_visible;

pub(super) fn softmax(x: &mut [f32], max: f32) -> (f32, f32) {
    // SAFETY: the table is only handed out where the CPU has AVX2 and FMA.
    unsafe { softmax_all(x, max) }
}

#[target_feature(enable = "avx2,fma")]
fn softmax_all(x: &mut [f32], max: f32) -> (f32, f32) {
    let mut largest = _mm256_set1_ps(max);
    let chunks = x.chunks_exact(8);
    let max = chunks.remainder().iter().copied().fold(max, f32::max);
    for x in chunks {
        // SAFETY: a chunk has eight numbers.
        largest = _mm256_max_ps(largest, unsafe { _mm256_loadu_ps(x.as_ptr()) });
    }
    let max = max_lanes(largest).max(max);
    if max == f32::NEG_INFINITY {
        return (max, nothing_visible(x));
    }
    let mut sum = _mm256_setzero_ps();
    let mut chunks = x.chunks_exact_mut(8);
    for x in &mut chunks {
        // SAFETY: a chunk has eight numbers.
        unsafe {
            let e = exp(_mm256_sub_ps(_mm256_loadu_ps(x.as_ptr()), _mm256_set1_ps(max)));
            _mm256_storeu_ps(x.as_mut_ptr(), e);
            sum = _mm256_add_ps(sum, e);
        }
    }
    let mut total = sum_lanes(sum);
    for x in chunks.into_remainder() {
        *x = (*x - max).exp();
        total += *x;
    }
    (max, total)
}

/// `exp(x)` for `x <= 0`, to about one unit in the last place: `2^n e^r` with `|r| <= ln 2 / 2` and a polynomial
/// of degree 7 in `r` (the classic minimax coefficients of Cephes). Below -87.3 it gives 0.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn exp(x: __m256) -> __m256 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const POLY: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];
    let tiny = _mm256_cmp_ps(x, _mm256_set1_ps(-87.3), _CMP_LT_OQ);
    let x = _mm256_max_ps(_mm256_set1_ps(-87.3), x); // in this order a NaN stays one
    let n = _mm256_round_ps(
        _mm256_mul_ps(x, _mm256_set1_ps(std::f32::consts::LOG2_E)),
        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC,
    );
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
    let mut p = _mm256_set1_ps(POLY[0]);
    for c in &POLY[1..] {
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
    }
    let p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0)));
    let two_to_n = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    _mm256_andnot_ps(tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(two_to_n)))
}
