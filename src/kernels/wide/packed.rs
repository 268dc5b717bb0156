//! Packed numbers: grids folded in first, then the codes.

use super::super::vector::Vector;
use super::super::{Ahead, Folded};
use super::codes::add_codes;
use super::fold::{fold, fold_rest};
use crate::format::folded::rounding_error;
use crate::format::packed::Packed;
use crate::linalg::{Mat, MatMut};

/// As `Kernels::add_packed` says.
#[inline(always)]
pub(in super::super) unsafe fn add_packed<V: Vector>(
    w: Mat<'_>,
    packed: &Packed<'_>,
    acc: MatMut<'_>,
    folded: &mut Folded,
    ahead: &mut Ahead<'_>,
) {
    folded.reset(w.rows, packed);
    // SAFETY: by the caller's contract; `reset` made room for a row a part and head.
    unsafe {
        fold::<V>(w, packed, folded, ahead);
        match (packed.bits, packed.levels.is_some()) {
            (8, _) => add_parts::<V, 8, false>(w, packed, acc, folded, ahead),
            (4, false) => add_parts::<V, 4, false>(w, packed, acc, folded, ahead),
            (3, false) => add_parts::<V, 3, false>(w, packed, acc, folded, ahead),
            (_, false) => add_parts::<V, 2, false>(w, packed, acc, folded, ahead),
            (4, true) => add_parts::<V, 4, true>(w, packed, acc, folded, ahead),
            (3, true) => add_parts::<V, 3, true>(w, packed, acc, folded, ahead),
            (_, true) => add_parts::<V, 2, true>(w, packed, acc, folded, ahead),
        }
    }
}

#[inline(always)]
unsafe fn add_parts<V: Vector, const BITS: u8, const TABLE: bool>(
    w: Mat<'_>,
    packed: &Packed<'_>,
    mut acc: MatMut<'_>,
    folded: &mut Folded,
    ahead: &mut Ahead<'_>,
) {
    for i in 0..packed.parts {
        let (codes, lanes) = packed.codes(i);
        let scales = packed.lane_scales(i, lanes.len());
        let mut acc = acc.from_column(i * packed.width);
        let rows = i * w.rows..(i + 1) * w.rows;
        let step = folded.step[rows.clone()].iter().copied().fold(0.0, f32::max);
        let error = rounding_error(step, packed.largest(), packed.outer);
        // SAFETY: by the caller's contract; all columns of the parts are within `acc`.
        unsafe {
            add_codes::<V, BITS, TABLE>(folded, rows.start, codes, lanes.clone(), scales, &mut acc, ahead);
            if error > packed.tolerance {
                let rest = packed.parts * w.rows;
                fold_rest::<V>(packed, rows.clone(), rest, folded);
                add_codes::<V, BITS, TABLE>(folded, rest, codes, lanes, scales, &mut acc, ahead);
            }
        }
    }
}
