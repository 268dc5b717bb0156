//! Exponentials, a vector at a time.

use super::super::vector::Vector;
use super::super::{Weighed, nothing_visible};

/// As `Kernels::softmax` says.
#[inline(always)]
pub(in super::super) unsafe fn softmax<V: Vector>(x: &mut [f32], max: f32) -> Weighed {
    let whole = x.len() / V::LANES * V::LANES;
    let own = x[whole..].iter().copied().fold(f32::NEG_INFINITY, f32::max);
    // SAFETY: i + LANES <= the length.
    unsafe {
        let mut largest = V::splat(own);
        for i in (0..whole).step_by(V::LANES) {
            // In this order a NaN is passed over here; its weight will be one.
            largest = V::max(V::load(x.as_ptr().add(i)), largest);
        }
        let own = V::largest(largest);
        let max = max.max(own);
        if max == f32::NEG_INFINITY {
            return Weighed { max, sum: nothing_visible(x), heaviest: 0.0 };
        }
        let mut sum = V::zero();
        for i in (0..whole).step_by(V::LANES) {
            let e = exp::<V>(V::sub(V::load(x.as_ptr().add(i)), V::splat(max)));
            V::store(x.as_mut_ptr().add(i), e);
            sum = V::add(sum, e);
        }
        let mut total = V::sum(sum);
        for x in &mut x[whole..] {
            *x = (*x - max).exp();
            total += *x;
        }
        Weighed { max, sum: total, heaviest: (own - max).exp() }
    }
}

/// `exp(x)` for `x <= 0`, to about one unit in the last place: `2^n e^r` with `|r| <= ln 2 / 2` and a polynomial
/// of degree 7 in `r` (the classic minimax coefficients of Cephes). Below -87.3 it gives 0.
#[inline(always)]
unsafe fn exp<V: Vector>(x: V::F) -> V::F {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const POLY: [f32; 6] = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1];
    const LEAST: f32 = -87.3;
    // SAFETY: by the caller's contract.
    unsafe {
        let clamped = V::max(V::splat(LEAST), x); // in this order a NaN stays one
        let n = V::round(V::mul(clamped, V::splat(std::f32::consts::LOG2_E)));
        let r = V::fma(n, V::splat(-LN2_HIGH), clamped);
        let r = V::fma(n, V::splat(-LN2_LOW), r);
        let mut p = V::splat(POLY[0]);
        for c in &POLY[1..] {
            p = V::fma(p, r, V::splat(*c));
        }
        let p = V::fma(p, V::mul(r, r), V::add(r, V::splat(1.0)));
        V::zero_below(x, V::splat(LEAST), V::mul(p, V::power_of_two(n)))
    }
}
