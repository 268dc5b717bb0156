//! AVX2 + FMA + F16C: eight lanes, sixteen registers.

#![allow(clippy::wildcard_imports, clippy::inline_always)]

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::vector::Vector;
use super::wide;

wide::kernels!("avx2", Avx2, "avx2,fma,f16c");

pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// 256-bit vectors.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

// SAFETY of the bodies: the contract of `Vector`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Vector for Avx2 {
    const LANES: usize = 8;
    const REGISTERS: usize = 16;
    const FUSED_DOT: bool = false;
    type F = __m256;
    type I = __m256i;
    type Half = Self;

    #[inline(always)]
    unsafe fn zero() -> __m256 {
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> __m256 {
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())), 16)) }
    }
    #[inline(always)]
    unsafe fn load_words(p: *const i16) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn store_rounded(p: *mut i16, a: __m256, b: __m256) -> __m256i {
        unsafe {
            let (a, b) = (_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
            // Packs within 128-bit halves: the two inner quarters change places.
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0b11_01_10_00));
            _mm256_add_epi32(a, b)
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max_magnitude(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0), b), a) }
    }
    #[inline(always)]
    unsafe fn round(x: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    unsafe fn times_power_of_two(x: __m256, n: __m256) -> __m256 {
        unsafe {
            // A biased exponent of 0 means 0.
            let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            let power = _mm256_slli_epi32(_mm256_max_epi32(biased, _mm256_setzero_si256()), 23);
            _mm256_mul_ps(x, _mm256_castsi256_ps(power))
        }
    }
    #[inline(always)]
    unsafe fn sum(x: __m256) -> f32 {
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)))
        }
    }
    #[inline(always)]
    unsafe fn sum4([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        unsafe {
            let x = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), x);
            sums
        }
    }
    #[inline(always)]
    unsafe fn largest4([a, b, c, d]: [__m256; 4]) -> [f32; 4] {
        unsafe {
            // Of each half: the larger of two, `[a, b, a, b]` and `[c, d, c, d]`; then of those, `[a, b, c, d]`.
            let ab = _mm256_max_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
            let cd = _mm256_max_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
            let x = _mm256_max_ps(_mm256_shuffle_ps(ab, cd, 0b01_00_01_00), _mm256_shuffle_ps(ab, cd, 0b11_10_11_10));
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
            let mut largest = [0.0; 4];
            _mm_storeu_ps(largest.as_mut_ptr(), x);
            largest
        }
    }

    #[inline(always)]
    unsafe fn integer_zero() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn splat_word(x: i16) -> __m256i {
        unsafe { _mm256_set1_epi16(x) }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u16) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u16) -> __m256i {
        unsafe { _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn and(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_and_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn shift_right(x: __m256i, n: u32) -> __m256i {
        unsafe { _mm256_srl_epi16(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shift_left(x: __m256i, n: u32) -> __m256i {
        unsafe { _mm256_sll_epi16(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn dot<const J: usize, const N: usize>(sums: &mut [__m256i; N], words: &[__m256i; N], pairs: *const i16) {
        unsafe {
            let pair = _mm256_set1_epi32(pairs.cast::<i32>().add(J).read_unaligned());
            for v in 0..N {
                sums[v] = _mm256_add_epi32(sums[v], _mm256_madd_epi16(words[v], pair));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_table(p: *const u8) -> __m256i {
        unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn look_up(table: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_shuffle_epi8(table, x) }
    }
    #[inline(always)]
    unsafe fn add_integers(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn to_float(x: __m256i) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(x) }
    }
    #[inline(always)]
    unsafe fn pairs_to_float(x: __m256i) -> [__m256; 2] {
        unsafe {
            let (even, odd) = (_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(x, 16));
            [_mm256_cvtepi32_ps(even), _mm256_cvtepi32_ps(odd)]
        }
    }
}
