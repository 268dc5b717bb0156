//! A grid a row, and pairs of rows turned: un-rotated keys on their way to a position.

use super::super::Turn;
use super::super::vector::Vector;
use crate::attend::mat::MatMut;

/// As `Kernels::turn` says.
#[inline(always)]
pub(in super::super) unsafe fn turn<V: Vector>(mut x: MatMut<'_>, turn: &Turn<'_>, n: usize) {
    let whole = n / V::LANES * V::LANES;
    // SAFETY: by the caller's contract all rows of `x` and of the angles have n columns.
    unsafe {
        columns::<V>(&mut x, turn, 0, whole);
        columns::<V::Half>(&mut x, turn, whole, n);
    }
}

/// Columns `first .. end`, a multiple of the lanes of them.
#[inline(always)]
unsafe fn columns<V: Vector>(x: &mut MatMut<'_>, turn: &Turn<'_>, first: usize, end: usize) {
    if first == end {
        return;
    }
    // SAFETY: by the caller's contract.
    unsafe {
        let data = x.data.as_mut_ptr();
        let load = |row: usize, t: usize| {
            let (scale, zero) = (V::splat(turn.scale[row]), V::splat(turn.zero[row]));
            V::fma(V::load(data.add(row * x.stride + t)), scale, zero)
        };
        let mut paired = [false; MOST_ROWS];
        for (i, &(a, b)) in turn.pairs.iter().enumerate() {
            let (a, b) = (usize::from(a), usize::from(b));
            (paired[a], paired[b]) = (true, true);
            let (cos, sin) = (turn.cos.row(i).as_ptr(), turn.sin.row(i).as_ptr());
            for t in (first..end).step_by(V::LANES) {
                let (xa, xb) = (load(a, t), load(b, t));
                let (cos, sin) = (V::load(cos.add(t)), V::load(sin.add(t)));
                V::store(data.add(a * x.stride + t), V::sub(V::mul(xa, cos), V::mul(xb, sin)));
                V::store(data.add(b * x.stride + t), V::fma(xa, sin, V::mul(xb, cos)));
            }
        }
        for row in (0..turn.scale.len()).filter(|&row| !paired[row]) {
            for t in (first..end).step_by(V::LANES) {
                V::store(data.add(row * x.stride + t), load(row, t));
            }
        }
    }
}

/// Rows that `turn` takes at most.
pub(in super::super) const MOST_ROWS: usize = 1024;
