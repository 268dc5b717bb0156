//! The inner loops, written once over [`Vector`](super::vector::Vector) for all instruction sets.
//!
//! A multiply-add has a latency of some cycles and two start in each, so a tile wants eight sums or more that do not wait
//! for each other; together with what is loaded they must fit in the registers. Hence tiles of `G` query heads (or
//! queries) times some vectors.
//!
//! Every function is always inlined into one that enables the instruction set (`kernels!`), and is unsafe for that reason:
//! its sizes were checked by the caller there.

// Sums are arrays of registers: indices keep the tile visible. Without inlining, no instruction set. Matrices that are
// written to pass from hand to hand.
#![allow(clippy::inline_always, clippy::needless_range_loop, clippy::needless_pass_by_value)]

pub(super) mod check;
pub(super) mod codes;
mod fold;
pub(super) mod matmul;
pub(super) mod packed;
pub(super) mod rotate;
pub(super) mod rows;
pub(super) mod softmax;

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
pub(super) use tiles_of_heads;

/// The table of an instruction set: each loop compiled with its `$features`, behind a check of all sizes.
macro_rules! kernels {
    ($name:literal, $V:ident, $features:literal) => {
        /// Only handed out where `detected` says true: every function behind it relies on that.
        pub(super) static KERNELS: super::Kernels = super::Kernels {
            name: $name,
            dot_rows: |q, rows, d, out, ahead| {
                wide::check::dot_rows(q, rows, d, &out);
                // SAFETY: the CPU has the features, sizes are checked.
                unsafe { compiled::dot_rows(q, rows, d, out, ahead) }
            },
            add_rows: |w, rows, d, acc, ahead| {
                wide::check::add_rows(w, rows, d, &acc);
                // SAFETY: as above.
                unsafe { compiled::add_rows(w, rows, d, acc, ahead) }
            },
            add_packed: |w, packed, acc, folded, ahead| {
                wide::check::add_packed(w, packed, &acc);
                // SAFETY: as above.
                unsafe { compiled::add_packed(w, packed, acc, folded, ahead) }
            },
            unpack: |codes, lanes, out| {
                wide::check::unpack(codes, &lanes, &out);
                // SAFETY: as above.
                unsafe { compiled::unpack(codes, lanes, out) }
            },
            rotate: |x, rotate, n| {
                wide::check::rotate(&x, rotate, n);
                // SAFETY: as above.
                unsafe { compiled::rotate(x, rotate, n) }
            },
            softmax: |x, n, weighed| {
                wide::check::softmax(&x, n, weighed);
                // SAFETY: as above.
                unsafe { compiled::softmax(x, n, weighed) }
            },
            matmul: |a, b, n, c| {
                wide::check::matmul(a, b, n, &c);
                // SAFETY: as above.
                unsafe { compiled::matmul(a, b, n, c) }
            },
        };

        mod compiled {
            use std::ops::Range;

            use super::super::{Ahead, Folded, Rotate, Weighed, wide};
            use crate::format::codes::Codes;
            use crate::format::packed::Packed;
            use crate::linalg::{Mat, MatMut};
            use crate::tensor::Slice;

            type V = super::$V;

            // SAFETY of all: the features are enabled; sizes are what `check` asserts.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn dot_rows(
                q: Mat<'_>,
                rows: Slice<'_>,
                d: usize,
                out: MatMut<'_>,
                ahead: &mut Ahead<'_>,
            ) {
                unsafe { wide::rows::dot_rows::<V>(q, rows, d, out, ahead) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn add_rows(
                w: Mat<'_>,
                rows: Slice<'_>,
                d: usize,
                acc: MatMut<'_>,
                ahead: &mut Ahead<'_>,
            ) {
                unsafe { wide::rows::add_rows::<V>(w, rows, d, acc, ahead) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn add_packed(
                w: Mat<'_>,
                packed: &Packed<'_>,
                acc: MatMut<'_>,
                folded: &mut Folded,
                ahead: &mut Ahead<'_>,
            ) {
                unsafe { wide::packed::add_packed::<V>(w, packed, acc, folded, ahead) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn unpack(codes: Codes<'_>, lanes: Range<usize>, out: MatMut<'_>) {
                unsafe { wide::codes::unpack::<V>(codes, lanes, out) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn rotate(x: MatMut<'_>, rotate: &Rotate<'_>, n: usize) {
                unsafe { wide::rotate::rotate::<V>(x, rotate, n) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn softmax(x: MatMut<'_>, n: usize, weighed: &mut [Weighed]) {
                unsafe { wide::softmax::softmax::<V>(x, n, weighed) }
            }
            #[target_feature(enable = $features)]
            pub(super) unsafe fn matmul(a: Mat<'_>, b: Mat<'_>, n: usize, c: MatMut<'_>) {
                unsafe { wide::matmul::matmul::<V>(a, b, n, c) }
            }
        }
    };
}
pub(super) use kernels;
