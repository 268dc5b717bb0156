//! AVX-512 with VNNI: sixteen lanes, thirty-two registers, multiply and add of words in one instruction.

#![allow(clippy::wildcard_imports, clippy::inline_always)]

use std::arch::asm;
use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2::{self, Avx2};
use super::vector::Vector;
use super::wide;

wide::kernels!("avx512", Avx512, "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni");

pub(super) fn detected() -> bool {
    avx2::detected()
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

/// 512-bit vectors.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

// SAFETY of the bodies: the contract of `Vector`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Vector for Avx512 {
    const LANES: usize = 16;
    const REGISTERS: usize = 32;
    const FUSED_DOT: bool = true;
    type F = __m512;
    type I = __m512i;
    type Half = Avx2;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const bf16) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())), 16)) }
    }
    #[inline(always)]
    unsafe fn load_words(p: *const i16) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn store_rounded(p: *mut i16, a: __m512, b: __m512) -> __m512i {
        unsafe {
            let (a, b) = (_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
            let even = _mm512_cvtepu8_epi16(_mm256_loadu_si256(EVEN.as_ptr().cast()));
            _mm512_storeu_si512(p.cast(), _mm512_permutex2var_epi16(a, even, b));
            _mm512_add_epi32(a, b)
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn max_magnitude(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_range_ps::<0b1011>(a, b) }
    }
    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    unsafe fn times_power_of_two(x: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(x, n) }
    }
    #[inline(always)]
    unsafe fn sum(x: __m512) -> f32 {
        unsafe { Avx2::sum(halves_sum(x)) }
    }
    #[inline(always)]
    unsafe fn sum4([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe { Avx2::sum4([halves_sum(a), halves_sum(b), halves_sum(c), halves_sum(d)]) }
    }
    #[inline(always)]
    unsafe fn largest4([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe { Avx2::largest4([halves_max(a), halves_max(b), halves_max(c), halves_max(d)]) }
    }

    #[inline(always)]
    unsafe fn integer_zero() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn splat_word(x: i16) -> __m512i {
        unsafe { _mm512_set1_epi16(x) }
    }
    #[inline(always)]
    unsafe fn load_pairs(p: *const u16) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bytes(p: *const u16) -> __m512i {
        unsafe { _mm512_cvtepu8_epi16(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shift_right(x: __m512i, n: u32) -> __m512i {
        unsafe { _mm512_srl_epi16(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shift_left(x: __m512i, n: u32) -> __m512i {
        unsafe { _mm512_sll_epi16(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn dot<const J: usize, const N: usize>(sums: &mut [__m512i; N], words: &[__m512i; N], pairs: *const i16) {
        for v in 0..N {
            sums[v] = unsafe { multiply_add_pairs::<J>(sums[v], words[v], pairs) };
        }
    }
    #[inline(always)]
    unsafe fn load_table(p: *const u8) -> __m512i {
        unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn look_up(table: __m512i, x: __m512i) -> __m512i {
        unsafe { _mm512_shuffle_epi8(table, x) }
    }
    #[inline(always)]
    unsafe fn add_integers(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn to_float(x: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    unsafe fn pairs_to_float(x: __m512i) -> [__m512; 2] {
        unsafe {
            let (even, odd) = (_mm512_and_si512(x, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32::<16>(x));
            [_mm512_cvtepi32_ps(even), _mm512_cvtepi32_ps(odd)]
        }
    }
}

#[inline(always)]
unsafe fn upper(x: __m512) -> __m256 {
    // SAFETY: by the contract of `Vector`.
    unsafe { _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(x))) }
}

#[inline(always)]
unsafe fn halves_sum(x: __m512) -> __m256 {
    // SAFETY: by the contract of `Vector`.
    unsafe { _mm256_add_ps(_mm512_castps512_ps256(x), upper(x)) }
}

#[inline(always)]
unsafe fn halves_max(x: __m512) -> __m256 {
    // SAFETY: by the contract of `Vector`.
    unsafe { _mm256_max_ps(_mm512_castps512_ps256(x), upper(x)) }
}

/// The words of two vectors that are the low halves of 32-bit integers.
const EVEN: [u8; 32] = {
    let mut even = [0; 32];
    let mut i = 0;
    while i < 32 {
        even[i] = 2 * i as u8;
        i += 1;
    }
    even
};

/// `vpdpwssd` with the pair of words number `J` at `pairs` in every lane. Of its intrinsic the compiler makes two
/// instructions, to shorten chains that are short here anyway.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn multiply_add_pairs<const J: usize>(mut sum: __m512i, words: __m512i, pairs: *const i16) -> __m512i {
    // SAFETY: reads the pair, by the contract of `Vector`.
    unsafe {
        asm!("vpdpwssd {sum}, {words}, dword ptr [{pairs} + {offset}]{{1to16}}", sum = inout(zmm_reg) sum,
            words = in(zmm_reg) words, pairs = in(reg) pairs, offset = const { 4 * J },
            options(pure, readonly, nostack, preserves_flags));
    }
    sum
}
