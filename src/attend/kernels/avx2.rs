//! AVX2 + FMA + F16C: eight lanes of f32, tiles of query heads kept in registers.

#![allow(clippy::wildcard_imports, clippy::inline_always)]

use std::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};

use super::{Kernels, Matmul};
use crate::attend::codes::{BLOCK, Codes};
use crate::tensor::Slice;

/// Only to be called where [`detected`] says true: every function below relies on it.
pub(super) static KERNELS: Kernels = Kernels { name: "avx2", dot_rows, add_rows, add_codes, unpack, exp_sum, matmul };

pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

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

#[inline]
#[target_feature(enable = "avx2,fma")]
fn sum_lanes(v: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)))
}

/// Calls `$f::<G>` over tiles of at most four of `$heads` query heads; `$g` is the tile's first head.
macro_rules! tiles_of_heads {
    ($heads:expr, $g:ident, $G:ident => $call:expr) => {{
        let heads = $heads;
        let mut $g = 0;
        while $g < heads {
            // SAFETY: see the function that uses the macro.
            unsafe {
                match heads - $g {
                    1 => {
                        const $G: usize = 1;
                        $call;
                    }
                    2 => {
                        const $G: usize = 2;
                        $call;
                    }
                    3 => {
                        const $G: usize = 3;
                        $call;
                    }
                    _ => {
                        const $G: usize = 4;
                        $call;
                    }
                }
            }
            $g += 4;
        }
    }};
}

fn dot_rows(q: &[f32], rows: Slice<'_>, d: usize, out: &mut [f32], stride: usize) {
    match rows {
        Slice::F32(x) => dot_rows_of(q, x, d, out, stride),
        Slice::F16(x) => dot_rows_of(q, x, d, out, stride),
        Slice::Bf16(x) => dot_rows_of(q, x, d, out, stride),
    }
}

fn dot_rows_of<T: Load>(q: &[f32], rows: &[T], d: usize, out: &mut [f32], stride: usize) {
    let (heads, n) = (q.len() / d, rows.len() / d);
    assert!(n <= stride && (heads == 0 || (heads - 1) * stride + n <= out.len()));
    tiles_of_heads!(heads, g, G => dot_rows_tile::<T, G>(&q[g * d..], rows, d, &mut out[g * stride..], stride));
}

/// # Safety
/// AVX2, FMA, F16C; `q` holds `G` rows, `out` `G` rows of `rows.len() / d` numbers `stride` apart.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_rows_tile<T: Load, const G: usize>(q: &[f32], rows: &[T], d: usize, out: &mut [f32], stride: usize) {
    let whole = d / 8 * 8;
    for (t, row) in rows.chunks_exact(d).enumerate() {
        let mut acc = [_mm256_setzero_ps(); G];
        for c in (0..whole).step_by(8) {
            // SAFETY: c + 8 <= d, the length of `row` and of each row of q.
            unsafe {
                let k = T::load(row.as_ptr().add(c));
                for (g, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm256_fmadd_ps(_mm256_loadu_ps(q.as_ptr().add(g * d + c)), k, *acc);
                }
            }
        }
        for (g, acc) in acc.into_iter().enumerate() {
            let rest: f32 = (whole..d).map(|c| q[g * d + c] * row[c].f32()).sum();
            out[g * stride + t] = sum_lanes(acc) + rest;
        }
    }
}

fn add_rows(w: &[f32], w_stride: usize, rows: Slice<'_>, d: usize, acc: &mut [f32], acc_stride: usize) {
    match rows {
        Slice::F32(x) => add_rows_of(w, w_stride, x, d, acc, acc_stride),
        Slice::F16(x) => add_rows_of(w, w_stride, x, d, acc, acc_stride),
        Slice::Bf16(x) => add_rows_of(w, w_stride, x, d, acc, acc_stride),
    }
}

fn add_rows_of<T: Load>(w: &[f32], w_stride: usize, rows: &[T], d: usize, acc: &mut [f32], acc_stride: usize) {
    let (heads, n) = (acc.len() / acc_stride, rows.len() / d);
    assert!(d <= acc_stride && n <= w_stride && (heads == 0 || (heads - 1) * w_stride + n <= w.len()));
    tiles_of_heads!(heads, g, G => {
        add_rows_tile::<T, G>(&w[g * w_stride..], w_stride, rows, d, &mut acc[g * acc_stride..], acc_stride);
    });
}

/// # Safety
/// AVX2, FMA, F16C; `w` and `acc` hold `G` rows, `w_stride` and `acc_stride` apart, of at least
/// `rows.len() / d` and `d` numbers.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_rows_tile<T: Load, const G: usize>(
    w: &[f32],
    w_stride: usize,
    rows: &[T],
    d: usize,
    acc: &mut [f32],
    acc_stride: usize,
) {
    let n = rows.len() / d;
    let whole = d / 8 * 8;
    for c in (0..whole).step_by(8) {
        // SAFETY: c + 8 <= d bounds the loads of rows and acc; t < n bounds those of w.
        unsafe {
            let mut sum = [_mm256_setzero_ps(); G];
            for (g, sum) in sum.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(acc.as_ptr().add(g * acc_stride + c));
            }
            for t in 0..n {
                let v = T::load(rows.as_ptr().add(t * d + c));
                for (g, sum) in sum.iter_mut().enumerate() {
                    *sum = _mm256_fmadd_ps(_mm256_broadcast_ss(w.get_unchecked(g * w_stride + t)), v, *sum);
                }
            }
            for (g, sum) in sum.into_iter().enumerate() {
                _mm256_storeu_ps(acc.as_mut_ptr().add(g * acc_stride + c), sum);
            }
        }
    }
    for c in whole..d {
        for g in 0..G {
            acc[g * acc_stride + c] += (0..n).map(|t| w[g * w_stride + t] * rows[t * d + c].f32()).sum::<f32>();
        }
    }
}

/// Runs `$body` for the eight outer rows of the block at `$block`, with `$o` the row and `$code` eight lanes
/// of its codes as i32; `$lanes` is the distance of byte rows.
macro_rules! each_outer {
    ($bits:expr, $block:expr, $lanes:expr, $o:ident, $code:ident => $body:expr) => {{
        let bits: u8 = $bits;
        let byte_row = |r: usize| _mm256_cvtepu8_epi32(_mm_loadl_epi64($block.add(r * $lanes).cast()));
        match bits {
            8 => {
                for $o in 0..8 {
                    let $code = byte_row($o);
                    $body
                }
            }
            4 => {
                for r in 0..4 {
                    let x = byte_row(r);
                    {
                        let $o = 2 * r;
                        let $code = _mm256_and_si256(x, _mm256_set1_epi32(15));
                        $body
                    }
                    {
                        let $o = 2 * r + 1;
                        let $code = _mm256_srli_epi32(x, 4);
                        $body
                    }
                }
            }
            2 => {
                for r in 0..2 {
                    let (x, three) = (byte_row(r), _mm256_set1_epi32(3));
                    {
                        let $o = 4 * r;
                        let $code = _mm256_and_si256(x, three);
                        $body
                    }
                    {
                        let $o = 4 * r + 1;
                        let $code = _mm256_and_si256(_mm256_srli_epi32(x, 2), three);
                        $body
                    }
                    {
                        let $o = 4 * r + 2;
                        let $code = _mm256_and_si256(_mm256_srli_epi32(x, 4), three);
                        $body
                    }
                    {
                        let $o = 4 * r + 3;
                        let $code = _mm256_srli_epi32(x, 6);
                        $body
                    }
                }
            }
            _ => {
                let high = byte_row(2);
                for r in 0..2 {
                    let x = byte_row(r);
                    for s in 0..4 {
                        let $o = 4 * r + s;
                        let low = _mm256_and_si256(
                            _mm256_srlv_epi32(x, _mm256_set1_epi32(2 * s as i32)),
                            _mm256_set1_epi32(3),
                        );
                        let top = _mm256_and_si256(
                            _mm256_sllv_epi32(
                                _mm256_srlv_epi32(high, _mm256_set1_epi32($o as i32)),
                                _mm256_set1_epi32(2),
                            ),
                            _mm256_set1_epi32(4),
                        );
                        let $code = _mm256_or_si256(low, top);
                        $body
                    }
                }
            }
        }
    }};
}

fn add_codes(w: &[f32], codes: Codes<'_>, lanes: Range<usize>, acc: &mut [f32], acc_stride: usize) {
    let outer = codes.outer();
    if outer == 0 {
        return;
    }
    let heads = w.len() / outer;
    assert!(lanes.start.is_multiple_of(BLOCK) && lanes.end.is_multiple_of(BLOCK) && lanes.end <= codes.lanes());
    assert!(lanes.end <= acc_stride && (heads == 0 || (heads - 1) * acc_stride + lanes.end <= acc.len()));
    match codes.bits() {
        8 => add_codes_of::<8>(w, codes, lanes, acc, acc_stride),
        4 => add_codes_of::<4>(w, codes, lanes, acc, acc_stride),
        3 => add_codes_of::<3>(w, codes, lanes, acc, acc_stride),
        _ => add_codes_of::<2>(w, codes, lanes, acc, acc_stride),
    }
}

fn add_codes_of<const BITS: u8>(w: &[f32], codes: Codes<'_>, lanes: Range<usize>, acc: &mut [f32], acc_stride: usize) {
    let outer = codes.outer();
    let pairs = lanes.start + lanes.len() / (2 * BLOCK) * (2 * BLOCK);
    tiles_of_heads!(w.len() / outer, g, G => {
        let (w, acc) = (&w[g * outer..], &mut acc[g * acc_stride..]);
        for l in (lanes.start..pairs).step_by(2 * BLOCK) {
            add_codes_tile::<BITS, G, 2>(w, codes, l, acc, acc_stride);
        }
        if pairs < lanes.end {
            add_codes_tile::<BITS, G, 1>(w, codes, pairs, acc, acc_stride);
        }
    });
}

/// # Safety
/// AVX2, FMA; `w` holds `G` rows of `codes.outer()`, `acc` `G` rows `acc_stride` apart that reach lane
/// `lane + 8 V`, and so does `codes`.
#[target_feature(enable = "avx2,fma")]
unsafe fn add_codes_tile<const BITS: u8, const G: usize, const V: usize>(
    w: &[f32],
    codes: Codes<'_>,
    lane: usize,
    acc: &mut [f32],
    acc_stride: usize,
) {
    let (outer, lanes) = (codes.outer(), codes.lanes());
    let mut sum = [[_mm256_setzero_ps(); V]; G];
    // SAFETY: blocks and lanes are within `codes`, heads and lanes within `w` and `acc`, by this function's contract.
    unsafe {
        for (g, sum) in sum.iter_mut().enumerate() {
            for (v, sum) in sum.iter_mut().enumerate() {
                *sum = _mm256_loadu_ps(acc.as_ptr().add(g * acc_stride + lane + v * BLOCK));
            }
        }
        for b in 0..outer / BLOCK {
            let block = codes.data().as_ptr().add(b * usize::from(BITS) * lanes + lane);
            let w = w.as_ptr().add(b * BLOCK);
            for v in 0..V {
                let block = block.add(v * BLOCK);
                each_outer!(BITS, block, lanes, o, code => {
                    let x = _mm256_cvtepi32_ps(code);
                    for (g, sum) in sum.iter_mut().enumerate() {
                        sum[v] = _mm256_fmadd_ps(_mm256_broadcast_ss(&*w.add(g * outer + o)), x, sum[v]);
                    }
                });
            }
        }
        for (g, sum) in sum.into_iter().enumerate() {
            for (v, sum) in sum.into_iter().enumerate() {
                _mm256_storeu_ps(acc.as_mut_ptr().add(g * acc_stride + lane + v * BLOCK), sum);
            }
        }
    }
}

fn unpack(codes: Codes<'_>, out: &mut [f32], stride: usize) {
    let outer = codes.outer();
    assert!(codes.lanes() <= stride && (outer == 0 || (outer - 1) * stride + codes.lanes() <= out.len()));
    // SAFETY: the tables of this file are only reachable where the CPU was found to have AVX2; sizes as asserted.
    unsafe { unpack_all(codes, out, stride) }
}

/// # Safety
/// AVX2; `out` holds `codes.outer()` rows of `codes.lanes()`, `stride` apart.
#[target_feature(enable = "avx2,fma")]
unsafe fn unpack_all(codes: Codes<'_>, out: &mut [f32], stride: usize) {
    let (bits, lanes) = (codes.bits(), codes.lanes());
    for b in 0..codes.outer() / BLOCK {
        for l in (0..lanes).step_by(BLOCK) {
            // SAFETY: block b and lanes l .. l + 8 are within `codes`; the rows of `out` by contract.
            unsafe {
                let block = codes.data().as_ptr().add(b * usize::from(bits) * lanes + l);
                let out = out.as_mut_ptr().add(b * BLOCK * stride + l);
                each_outer!(bits, block, lanes, o, code => {
                    _mm256_storeu_ps(out.add(o * stride), _mm256_cvtepi32_ps(code));
                });
            }
        }
    }
}

fn exp_sum(x: &mut [f32], max: f32) -> f32 {
    // SAFETY: the tables of this file are only reachable where the CPU was found to have AVX2.
    unsafe { exp_sum_all(x, max) }
}

#[target_feature(enable = "avx2,fma")]
fn exp_sum_all(x: &mut [f32], max: f32) -> f32 {
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
    total
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
    let x = _mm256_max_ps(x, _mm256_set1_ps(-87.3));
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

fn matmul(mut op: Matmul<'_>) {
    let Matmul { m, k, n, a: (a, lda), b: (b, ldb), c: (ref c, ldc) } = op;
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    assert!(k <= lda && (m - 1) * lda + k <= a.len());
    assert!(n <= ldb && (k - 1) * ldb + n <= b.len());
    assert!(n <= ldc && (m - 1) * ldc + n <= c.len());
    let c = &mut op.c.0;
    tiles_of_heads!(m, i, M => matmul_rows::<M>(k, n, &a[i * lda..], lda, b, ldb, &mut c[i * ldc..], ldc));
}

/// # Safety
/// AVX2, FMA; `a` and `c` hold `M` rows, `b` `k` rows of `n` numbers, at their strides.
#[target_feature(enable = "avx2,fma")]
#[allow(clippy::too_many_arguments)]
unsafe fn matmul_rows<const M: usize>(
    k: usize,
    n: usize,
    a: &[f32],
    lda: usize,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
) {
    let pairs = n / 16 * 16;
    let whole = n / 8 * 8;
    // SAFETY: columns j .. j + 16 (or + 8) stay within n; rows within m and k, by this function's contract.
    unsafe {
        for j in (0..pairs).step_by(16) {
            matmul_tile::<M, 2>(k, a.as_ptr(), lda, b.as_ptr().add(j), ldb, c.as_mut_ptr().add(j), ldc);
        }
        if pairs < whole {
            matmul_tile::<M, 1>(k, a.as_ptr(), lda, b.as_ptr().add(pairs), ldb, c.as_mut_ptr().add(pairs), ldc);
        }
    }
    for j in whole..n {
        for i in 0..M {
            c[i * ldc + j] += (0..k).map(|p| a[i * lda + p] * b[p * ldb + j]).sum::<f32>();
        }
    }
}

/// # Safety
/// AVX2, FMA; `M` rows of `a` and `c` and `k` rows of `b` are readable at their strides, `8 V` columns wide for b and c.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn matmul_tile<const M: usize, const V: usize>(
    k: usize,
    a: *const f32,
    lda: usize,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut sum = [[_mm256_setzero_ps(); V]; M];
        for p in 0..k {
            let mut x = [_mm256_setzero_ps(); V];
            for (v, x) in x.iter_mut().enumerate() {
                *x = _mm256_loadu_ps(b.add(p * ldb + 8 * v));
            }
            for (i, sum) in sum.iter_mut().enumerate() {
                let a = _mm256_broadcast_ss(&*a.add(i * lda + p));
                for (sum, x) in sum.iter_mut().zip(x) {
                    *sum = _mm256_fmadd_ps(a, x, *sum);
                }
            }
        }
        for (i, sum) in sum.into_iter().enumerate() {
            for (v, sum) in sum.into_iter().enumerate() {
                let c = c.add(i * ldc + 8 * v);
                _mm256_storeu_ps(c, _mm256_add_ps(_mm256_loadu_ps(c), sum));
            }
        }
    }
}
