//! Packed numbers: grids folded in first, then the codes.

use super::super::vector::Vector;
use super::super::{Ahead, Folded};
use super::codes::add_codes;
use super::fold::{Rounding, fold, fold_rest};
use crate::attend::folded::{largest_word, middle, negligible};
use crate::attend::mat::{Mat, MatMut};
use crate::attend::packed::Packed;

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
    folded.products.resize(folded.products.len().max(4 * packed.outer), 0.0);
    let rounding = Rounding { largest_word: largest_word(packed.bits, packed.outer), middle: middle(packed.bits) };
    let share = ahead.left().div_ceil(2 * packed.parts.max(1));
    // SAFETY: by the caller's contract; `reset` made room for a row a part and head.
    unsafe {
        // All grids first: their sums wait for each other, those of different parts do not.
        for i in 0..packed.parts {
            ahead.fetch(share);
            fold::<V>(w, packed.grid(i), rounding, [i * w.rows, packed.lead], folded);
        }
        match packed.bits {
            8 => add_parts::<V, 8>(w, packed, acc, folded, ahead, share),
            4 => add_parts::<V, 4>(w, packed, acc, folded, ahead, share),
            3 => add_parts::<V, 3>(w, packed, acc, folded, ahead, share),
            _ => add_parts::<V, 2>(w, packed, acc, folded, ahead, share),
        }
    }
}

#[inline(always)]
unsafe fn add_parts<V: Vector, const BITS: u8>(
    w: Mat<'_>,
    packed: &Packed<'_>,
    mut acc: MatMut<'_>,
    folded: &mut Folded,
    ahead: &mut Ahead<'_>,
    share: usize,
) {
    for i in 0..packed.parts {
        ahead.fetch(share);
        let (codes, lanes) = packed.codes(i);
        let mut acc = acc.from_column(i * packed.width);
        let rows = i * w.rows..(i + 1) * w.rows;
        let step = folded.step[rows.clone()].iter().copied().fold(0.0, f32::max);
        // SAFETY: by the caller's contract; all columns of the parts are within `acc`.
        unsafe {
            add_codes::<V, BITS>(folded, rows.start, codes, lanes.clone(), &mut acc);
            if !negligible(step, BITS, packed.outer, packed.tolerance) {
                let rest = packed.parts * w.rows;
                fold_rest::<V>(w, packed.grid(i).scale, middle(BITS), [rows.start, rest, packed.lead], folded);
                add_codes::<V, BITS>(folded, rest, codes, lanes, &mut acc);
            }
        }
    }
}
