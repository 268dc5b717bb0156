//! Exponentials, a vector at a time.

use std::f32::consts::{LN_2, LOG2_E};

use super::super::vector::Vector;
use super::super::{Weighed, shift};
use super::tiles_of_heads;
use crate::linalg::MatMut;

/// As `Kernels::softmax` says.
#[inline(always)]
pub(in super::super) unsafe fn softmax<V: Vector>(mut x: MatMut<'_>, n: usize, weighed: &mut [Weighed]) {
    tiles_of_heads!(x.rows, g, G => {
        // SAFETY: by the caller's contract.
        unsafe { softmax_rows::<V, G>(x.part(g, G), n, &mut weighed[g..][..G]) };
    });
}

/// `G` rows at once: what goes through a whole row waits for itself, but not for other rows'.
#[inline(always)]
unsafe fn softmax_rows<V: Vector, const G: usize>(x: MatMut<'_>, n: usize, weighed: &mut [Weighed]) {
    let whole = n / V::LANES * V::LANES;
    // SAFETY: i + LANES <= n, which all rows have.
    unsafe {
        let (first, stride) = (x.data.as_mut_ptr(), x.stride);
        let row = |g: usize| first.add(g * stride);
        let mut largest = [V::splat(f32::NEG_INFINITY); 4];
        for i in (0..whole).step_by(V::LANES) {
            for g in 0..G {
                // In this order a NaN is passed over here; its weight will be one.
                largest[g] = V::max(V::load(row(g).add(i)), largest[g]);
            }
        }
        let mut own = V::largest4(largest);
        let mut shifts = [0.0; 4];
        for g in 0..G {
            for i in whole..n {
                own[g] = own[g].max(*row(g).add(i));
            }
            weighed[g].max = weighed[g].max.max(own[g]);
            shifts[g] = shift(weighed[g].max);
        }
        let mut sums = [V::zero(); 4];
        for i in (0..whole).step_by(V::LANES) {
            for g in 0..G {
                let e = exp::<V>(V::sub(V::load(row(g).add(i)), V::splat(shifts[g])));
                V::store(row(g).add(i), e);
                sums[g] = V::add(sums[g], e);
            }
        }
        let mut sums = V::sum4(sums);
        for g in 0..G {
            for i in whole..n {
                let e = (*row(g).add(i) - shifts[g]).exp();
                row(g).add(i).write(e);
                sums[g] += e;
            }
            weighed[g].sum = sums[g];
            weighed[g].heaviest = Weighed::heaviest(own[g], weighed[g].max);
        }
    }
}

/// `exp(x)` for `x <= 0`: `2^n 2^f` with `x log2(e) = n + f` and `|f| <= 1/2`, and for `2^f` the polynomial `1 + f q(f)`,
/// where `q` is right at five Chebyshev points: to 3e-7, and to `6e-8 |x|` where rounding `x log2(e)` is more. 0, or nearly
/// so, below -88.
#[inline(always)]
unsafe fn exp<V: Vector>(x: V::F) -> V::F {
    const POLY: [f32; 6] = [0.001_338_130_2, 0.009_666_368, 0.055_503_81, 0.240_223_5, LN_2, 1.0];
    // SAFETY: by the caller's contract.
    unsafe {
        let t = V::max(V::splat(-200.0), V::mul(x, V::splat(LOG2_E))); // in this order a NaN stays one
        let n = V::round(t);
        let f = V::sub(t, n);
        let mut p = V::splat(POLY[0]);
        for c in &POLY[1..] {
            p = V::fma(p, f, V::splat(*c));
        }
        V::times_power_of_two(p, n)
    }
}
