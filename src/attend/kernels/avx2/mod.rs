//! AVX2 + FMA + F16C: eight lanes of f32, tiles of query heads kept in registers.
//!
//! A fused multiply-add has a latency of four cycles and two start in each, so a tile wants eight sums or more that
//! do not wait for each other, and the sixteen registers allow twelve beside what is loaded. Hence tiles of `G` query
//! heads times `V` vectors of lanes with `G V` of 8 to 12.

// Sums are arrays of registers: indices keep the tile visible.
#![allow(clippy::wildcard_imports, clippy::inline_always, clippy::needless_range_loop)]

mod codes;
mod matmul;
mod rows;
mod softmax;

use std::arch::x86_64::*;

use super::Kernels;

/// Only handed out where [`detected`] says true: every function in this folder relies on it.
pub(super) static KERNELS: Kernels = Kernels {
    name: "avx2",
    dot_rows: rows::dot_rows,
    add_rows: rows::add_rows,
    add_codes: codes::add_codes,
    unpack: codes::unpack,
    fold: codes::fold,
    softmax: softmax::softmax,
    prefetch,
    matmul: matmul::matmul,
};

pub(super) fn detected() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The beginning is enough: from there on the CPU's own prefetcher follows, and more requests at once than it has line
/// buffers only stall.
fn prefetch(bytes: &[u8]) {
    const LINE: usize = 64;
    const MOST: usize = 4096;
    for line in bytes.iter().take(MOST).step_by(LINE) {
        // SAFETY: a prefetch touches nothing, whatever the address; every x86-64 CPU has it.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(line).cast()) };
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn sum_lanes(v: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)))
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn max_lanes(v: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)))
}

/// Runs `$call` with the constant `$G` for tiles of at most four of `$heads` rows; `$g` is the tile's first row.
macro_rules! tiles_of_heads {
    ($heads:expr, $g:ident, $G:ident => $call:expr) => {{
        let heads = $heads;
        let mut $g = 0;
        while $g < heads {
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
            $g += 4;
        }
    }};
}
use tiles_of_heads;
