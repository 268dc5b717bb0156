//! A grid a row, and pairs of rows rotated: pre-RoPE keys on their way to a position.

use super::super::Rotate;
use super::super::vector::Vector;
use crate::linalg::MatMut;

/// As `Kernels::rotate` says.
#[inline(always)]
pub(in super::super) unsafe fn rotate<V: Vector>(mut x: MatMut<'_>, rotate: &Rotate<'_>, n: usize) {
    let whole = n / V::LANES * V::LANES;
    // SAFETY: by the caller's contract all rows of `x` and of the angles have n columns.
    unsafe {
        columns::<V>(&mut x, rotate, 0, whole);
        columns::<V::Half>(&mut x, rotate, whole, n);
    }
}

/// Columns `first .. end`, a multiple of the lanes of them.
#[inline(always)]
unsafe fn columns<V: Vector>(x: &mut MatMut<'_>, rotate: &Rotate<'_>, first: usize, end: usize) {
    if first == end {
        return;
    }
    // SAFETY: by the caller's contract.
    unsafe {
        let data = x.data.as_mut_ptr();
        let row = |row: usize| (data.add(row * x.stride), V::splat(rotate.scale[row]), V::splat(rotate.zero[row]));
        let mut paired = [false; MOST_ROWS];
        for (i, &(a, b)) in rotate.pairs.iter().enumerate() {
            let (a, b) = (usize::from(a), usize::from(b));
            (paired[a], paired[b]) = (true, true);
            let ((a, scale_a, zero_a), (b, scale_b, zero_b)) = (row(a), row(b));
            let (cos, sin) = (rotate.cos.row(i).as_ptr(), rotate.sin.row(i).as_ptr());
            for t in (first..end).step_by(V::LANES) {
                let xa = V::fma(V::load(a.add(t)), scale_a, zero_a);
                let xb = V::fma(V::load(b.add(t)), scale_b, zero_b);
                let (cos, sin) = (V::load(cos.add(t)), V::load(sin.add(t)));
                V::store(a.add(t), V::sub(V::mul(xa, cos), V::mul(xb, sin)));
                V::store(b.add(t), V::fma(xa, sin, V::mul(xb, cos)));
            }
        }
        for (x, scale, zero) in (0..rotate.scale.len()).filter(|&i| !paired[i]).map(row) {
            for t in (first..end).step_by(V::LANES) {
                V::store(x.add(t), V::fma(V::load(x.add(t)), scale, zero));
            }
        }
    }
}

/// Rows that `rotate` takes at most.
pub(in super::super) const MOST_ROWS: usize = 1024;
