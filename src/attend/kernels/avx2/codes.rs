//! Packed codes: widened to f32 in registers and used at once by a tile of query heads.

use std::arch::x86_64::*;
use std::ops::Range;

use half::f16;

use super::{sum_lanes, tiles_of_heads};
use crate::attend::codes::{BLOCK, Codes};
use crate::attend::mat::{Mat, MatMut};

/// Runs `$body` for the eight outer rows of the block at `$block`, with `$o` the row and `$code` its codes in `$V` vectors
/// of eight lanes, as i32; `$lanes` is the distance of byte rows.
macro_rules! each_outer {
    ($bits:expr, $V:expr, $block:expr, $lanes:expr, $o:ident, $code:ident => $body:expr) => {{
        let bits: u8 = $bits;
        let byte_row = |r: usize| -> [__m256i; $V] {
            let row = $block.add(r * $lanes);
            std::array::from_fn(|v| _mm256_cvtepu8_epi32(_mm_loadl_epi64(row.add(v * BLOCK).cast())))
        };
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
                        let $code = x.map(|x| _mm256_and_si256(x, _mm256_set1_epi32(15)));
                        $body
                    }
                    {
                        let $o = 2 * r + 1;
                        let $code = x.map(|x| _mm256_srli_epi32(x, 4));
                        $body
                    }
                }
            }
            2 => {
                for r in 0..2 {
                    let x = byte_row(r);
                    for s in 0..4 {
                        let $o = 4 * r + s;
                        let $code = x.map(|x| two_bits(x, s));
                        $body
                    }
                }
            }
            _ => {
                let high = byte_row(2).map(|x| _mm256_slli_epi32(x, 2));
                for r in 0..2 {
                    let x = byte_row(r);
                    for s in 0..4 {
                        let $o = 4 * r + s;
                        let shift = _mm_cvtsi32_si128($o as i32);
                        let $code: [__m256i; $V] = std::array::from_fn(|v| {
                            let top = _mm256_and_si256(_mm256_srl_epi32(high[v], shift), _mm256_set1_epi32(4));
                            _mm256_or_si256(two_bits(x[v], s), top)
                        });
                        $body
                    }
                }
            }
        }
    }};
}

/// Bits `2 s` and `2 s + 1` of each lane's byte.
#[inline]
#[target_feature(enable = "avx2")]
fn two_bits(x: __m256i, s: usize) -> __m256i {
    let three = _mm256_set1_epi32(3);
    match s {
        0 => _mm256_and_si256(x, three),
        1 => _mm256_and_si256(_mm256_srli_epi32(x, 2), three),
        2 => _mm256_and_si256(_mm256_srli_epi32(x, 4), three),
        _ => _mm256_srli_epi32(x, 6),
    }
}

pub(super) fn add_codes(w: Mat<'_>, codes: Codes<'_>, lanes: Range<usize>, acc: MatMut<'_>) {
    assert!(lanes.start.is_multiple_of(BLOCK) && lanes.end.is_multiple_of(BLOCK) && lanes.end <= codes.lanes());
    assert!(w.has_columns(codes.outer()) && acc.has_columns(lanes.end) && acc.rows == w.rows);
    match codes.bits() {
        8 => add_codes_of::<8>(w, codes, lanes, acc),
        4 => add_codes_of::<4>(w, codes, lanes, acc),
        3 => add_codes_of::<3>(w, codes, lanes, acc),
        _ => add_codes_of::<2>(w, codes, lanes, acc),
    }
}

fn add_codes_of<const BITS: u8>(w: Mat<'_>, codes: Codes<'_>, lanes: Range<usize>, mut acc: MatMut<'_>) {
    tiles_of_heads!(w.rows, g, G => {
        const WIDE: usize = if G <= 2 { 4 } else { 2 };
        let (w, mut acc) = (w.part(g, G), acc.part(g, G));
        let mut lane = lanes.start;
        // SAFETY: the table is only handed out where the CPU has AVX2 and FMA; sizes as `add_codes` asserts.
        unsafe {
            while lane + WIDE * BLOCK <= lanes.end {
                add_codes_tile::<BITS, G, WIDE>(w, codes, lane, &mut acc);
                lane += WIDE * BLOCK;
            }
            while lane < lanes.end {
                add_codes_tile::<BITS, G, 1>(w, codes, lane, &mut acc);
                lane += BLOCK;
            }
        }
    });
}

/// # Safety
/// AVX2, FMA; `w` and `acc` hold `G` rows, of `codes.outer()` numbers and up to lane `lane + 8 V`, as `codes` does.
#[target_feature(enable = "avx2,fma")]
unsafe fn add_codes_tile<const BITS: u8, const G: usize, const V: usize>(
    w: Mat<'_>,
    codes: Codes<'_>,
    lane: usize,
    acc: &mut MatMut<'_>,
) {
    let lanes = codes.lanes();
    // One query head alone has too few sums to hide the latency: even and odd outer rows get sums of their own.
    let mut sum = [[[_mm256_setzero_ps(); V]; G]; 2];
    let odd = usize::from(G == 1);
    // SAFETY: blocks and lanes are within `codes`, heads and lanes within `w` and `acc`, by this function's contract.
    unsafe {
        for b in 0..codes.outer() / BLOCK {
            let block = codes.data().as_ptr().add(b * usize::from(BITS) * lanes + lane);
            let w_block = w.data.as_ptr().add(b * BLOCK);
            each_outer!(BITS, V, block, lanes, o, code => {
                let code = code.map(|code| _mm256_cvtepi32_ps(code));
                let sum = &mut sum[o & odd];
                for g in 0..G {
                    let w = _mm256_broadcast_ss(&*w_block.add(g * w.stride + o));
                    for v in 0..V {
                        sum[g][v] = _mm256_fmadd_ps(w, code[v], sum[g][v]);
                    }
                }
            });
        }
        for g in 0..G {
            for v in 0..V {
                let acc = acc.data.as_mut_ptr().add(g * acc.stride + lane + v * BLOCK);
                let total = if odd == 1 { _mm256_add_ps(sum[0][g][v], sum[1][g][v]) } else { sum[0][g][v] };
                _mm256_storeu_ps(acc, _mm256_add_ps(_mm256_loadu_ps(acc), total));
            }
        }
    }
}

pub(super) fn unpack(codes: Codes<'_>, mut out: MatMut<'_>) {
    assert!(out.rows == codes.outer() && out.has_columns(codes.lanes()));
    // SAFETY: the table is only handed out where the CPU has AVX2; sizes as asserted.
    unsafe { unpack_all(codes, &mut out) }
}

/// # Safety
/// AVX2; `out` holds `codes.outer()` rows of `codes.lanes()` numbers.
#[target_feature(enable = "avx2,fma")]
unsafe fn unpack_all(codes: Codes<'_>, out: &mut MatMut<'_>) {
    let (bits, lanes, stride) = (codes.bits(), codes.lanes(), out.stride);
    for b in 0..codes.outer() / BLOCK {
        for l in (0..lanes).step_by(BLOCK) {
            // SAFETY: block b and lanes l .. l + 8 are within `codes`; the rows of `out` by contract.
            unsafe {
                let block = codes.data().as_ptr().add(b * usize::from(bits) * lanes + l);
                let out = out.data.as_mut_ptr().add(b * BLOCK * stride + l);
                each_outer!(bits, 1, block, lanes, o, code => {
                    _mm256_storeu_ps(out.add(o * stride), _mm256_cvtepi32_ps(code[0]));
                });
            }
        }
    }
}

pub(super) fn fold(x: &[f32], scale: &[f16], zero: &[f16], folded: &mut [f32]) -> f32 {
    assert!(scale.len() == x.len() && zero.len() == x.len() && folded.len() == x.len());
    // SAFETY: the table is only handed out where the CPU has AVX2, FMA and F16C; lengths as asserted.
    unsafe { fold_all(x, scale, zero, folded) }
}

/// # Safety
/// AVX2, FMA, F16C; all four have the same length.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn fold_all(x: &[f32], scale: &[f16], zero: &[f16], folded: &mut [f32]) -> f32 {
    let whole = x.len() / 8 * 8;
    let mut sum = _mm256_setzero_ps();
    for i in (0..whole).step_by(8) {
        // SAFETY: i + 8 <= the common length.
        unsafe {
            let x = _mm256_loadu_ps(x.as_ptr().add(i));
            let scale = _mm256_cvtph_ps(_mm_loadu_si128(scale.as_ptr().add(i).cast()));
            let zero = _mm256_cvtph_ps(_mm_loadu_si128(zero.as_ptr().add(i).cast()));
            _mm256_storeu_ps(folded.as_mut_ptr().add(i), _mm256_mul_ps(x, scale));
            sum = _mm256_fmadd_ps(x, zero, sum);
        }
    }
    let mut offset = sum_lanes(sum);
    for i in whole..x.len() {
        folded[i] = x[i] * scale[i].to_f32();
        offset += x[i] * zero[i].to_f32();
    }
    offset
}
