//! Scales folded into queries or weights, which become integers.
//!
//! Two walks over all parts: sums that go through a whole row wait for themselves, but not for other rows'.

use std::ops::Range;

use half::f16;

use super::super::vector::Vector;
use super::super::{Ahead, Folded};
use super::tiles_of_heads;
use crate::format::folded::{FINER, largest_word, step_of};
use crate::format::packed::{Grid, Packed};
use crate::linalg::Mat;

/// Cache lines that are asked for beside some rows.
const LINES: usize = 4;

/// Folds the grids of all parts into all rows of `w`: row `i w.rows + g` of `out` is part `i`'s and head `g`'s.
#[inline(always)]
pub(super) unsafe fn fold<V: Vector>(w: Mat<'_>, packed: &Packed<'_>, out: &mut Folded, ahead: &mut Ahead<'_>) {
    let (n, rows) = (packed.outer, packed.parts * w.rows);
    let center = packed.center();
    for i in 0..packed.parts {
        ahead.fetch(LINES);
        let grid = packed.grid(i);
        tiles_of_heads!(w.rows, g, G => {
            let first = i * w.rows + g;
            // SAFETY: by the caller's contract; `out` has a row of n products for each part and head.
            unsafe {
                match grid {
                    Grid::Affine(scale, zero) => multiply::<V, G>(w.part(g, G), scale, zero, center, first, out),
                    Grid::Scaled(scale, _) => scale_rows::<V, G>(w.part(g, G), Some(scale), n, first, out),
                    Grid::Plain(_) => scale_rows::<V, G>(w.part(g, G), None, n, first, out),
                }
            };
        });
    }
    let largest_word = largest_word(packed.largest(), n);
    for (step, inverse) in out.step[..rows].iter_mut().zip(&mut out.inverse) {
        (*step, *inverse) = step_of(*step, largest_word);
    }
    tiles_of_heads!(rows, row, G => {
        ahead.fetch(LINES);
        // SAFETY: as above, and of as many words from `lead` on.
        unsafe {
            let words = out.words.as_mut_ptr().add(row * out.stride + packed.lead);
            let scaled = Scaled { x: out.products.as_ptr().add(row * n), n, factor: out.inverse.as_ptr().add(row) };
            let sums = round::<V, G>(scaled, words, out.stride);
            for g in 0..G {
                *out.offset.get_unchecked_mut(row + g) -= center * out.step.get_unchecked(row + g) * sums[g];
            }
        }
    });
}

/// Products, largest magnitudes (as steps), and `sum_o w_o (zero_o + middle scale_o)` (as offsets) of rows `first ..` of `out`.
#[inline(always)]
unsafe fn multiply<V: Vector, const G: usize>(
    w: Mat<'_>,
    scale: &[f16],
    zero: &[f16],
    middle: f32,
    first: usize,
    out: &mut Folded,
) {
    let n = scale.len();
    let whole = n / V::LANES * V::LANES;
    // SAFETY: i + LANES <= n, which rows of `w`, the grid and the products have.
    unsafe {
        let products = out.products.as_mut_ptr().add(first * n);
        let (mut largest, mut offset) = ([V::zero(); 4], [V::zero(); 4]);
        for i in (0..whole).step_by(V::LANES) {
            let scale = V::load_f16(scale.as_ptr().add(i));
            let at_middle = V::fma(scale, V::splat(middle), V::load_f16(zero.as_ptr().add(i)));
            for g in 0..G {
                let x = V::load(w.data.as_ptr().add(g * w.stride + i));
                let product = V::mul(x, scale);
                V::store(products.add(g * n + i), product);
                largest[g] = V::max_magnitude(largest[g], product);
                offset[g] = V::fma(x, at_middle, offset[g]);
            }
        }
        let (mut largest, mut offset) = (V::largest4(largest), V::sum4(offset));
        for i in whole..n {
            let scale = scale[i].to_f32();
            for g in 0..G {
                let x = w.data[g * w.stride + i];
                *products.add(g * n + i) = x * scale;
                largest[g] = (x * scale).abs().max(largest[g]);
                offset[g] += x * (zero[i].to_f32() + middle * scale);
            }
        }
        for g in 0..G {
            *out.step.get_unchecked_mut(first + g) = largest[g];
            *out.offset.get_unchecked_mut(first + g) = offset[g];
        }
    }
}

/// Products with `scale`, or just the `n` numbers, and largest magnitudes (as steps) of rows `first ..` of `out`, whose offsets
/// become 0.
#[inline(always)]
unsafe fn scale_rows<V: Vector, const G: usize>(
    w: Mat<'_>,
    scale: Option<&[f16]>,
    n: usize,
    first: usize,
    out: &mut Folded,
) {
    let whole = n / V::LANES * V::LANES;
    // SAFETY: i + LANES <= n, which rows of `w`, the scales and the products have.
    unsafe {
        let products = out.products.as_mut_ptr().add(first * n);
        let mut largest = [V::zero(); 4];
        for i in (0..whole).step_by(V::LANES) {
            let scale = match scale {
                Some(scale) => V::load_f16(scale.as_ptr().add(i)),
                None => V::splat(1.0),
            };
            for g in 0..G {
                let product = V::mul(V::load(w.data.as_ptr().add(g * w.stride + i)), scale);
                V::store(products.add(g * n + i), product);
                largest[g] = V::max_magnitude(largest[g], product);
            }
        }
        let mut largest = V::largest4(largest);
        for i in whole..n {
            let scale = scale.map_or(1.0, |scale| scale[i].to_f32());
            for g in 0..G {
                let product = w.data[g * w.stride + i] * scale;
                *products.add(g * n + i) = product;
                largest[g] = product.abs().max(largest[g]);
            }
        }
        for g in 0..G {
            *out.step.get_unchecked_mut(first + g) = largest[g];
            *out.offset.get_unchecked_mut(first + g) = 0.0;
        }
    }
}

/// Rows of `n` numbers, and a factor for each row.
#[derive(Clone, Copy)]
struct Scaled {
    x: *const f32,
    n: usize,
    factor: *const f32,
}

/// `words = round(factor x)` of `G` rows; returns their sums.
#[inline(always)]
unsafe fn round<V: Vector, const G: usize>(
    Scaled { x, n, factor }: Scaled,
    words: *mut i16,
    stride: usize,
) -> [f32; 4] {
    let whole = n / (2 * V::LANES) * (2 * V::LANES);
    // SAFETY: all rows have n numbers, words, and a factor, by the caller's contract.
    unsafe {
        let mut sums = [V::zero(); 4];
        for g in 0..G {
            let (x, words, factor) = (x.add(g * n), words.add(g * stride), V::splat(*factor.add(g)));
            let mut sum = V::integer_zero();
            for i in (0..whole).step_by(2 * V::LANES) {
                let [a, b] = [V::load(x.add(i)), V::load(x.add(i + V::LANES))];
                sum = V::add_integers(sum, V::store_rounded(words.add(i), V::mul(a, factor), V::mul(b, factor)));
            }
            sums[g] = V::to_float(sum);
        }
        let mut sums = V::sum4(sums);
        for i in whole..n {
            for g in 0..G {
                let word = (*x.add(g * n + i) * *factor.add(g)).round_ties_even() as i16;
                words.add(g * stride + i).write(word);
                sums[g] += f32::from(word);
            }
        }
        sums
    }
}

/// The words of what rounding `rows` left over, finer ones: as many rows of `out` from `rest` on.
#[inline(always)]
pub(super) unsafe fn fold_rest<V: Vector>(packed: &Packed<'_>, rows: Range<usize>, rest: usize, out: &mut Folded) {
    let (n, lead, center) = (packed.outer, packed.lead, packed.center());
    let whole = n / V::LANES * V::LANES;
    for (row, rest) in rows.zip(rest..) {
        let (step, inverse) = (out.step[row], out.inverse[row]);
        // SAFETY: by the caller's contract, rows of products and of words reach n, and `out` has all these rows.
        unsafe {
            let products = out.products.as_mut_ptr().add(row * n);
            let rounded = out.words.as_ptr().add(row * out.stride + lead);
            for i in (0..whole).step_by(V::LANES) {
                let exact = V::mul(V::load(products.add(i)), V::splat(inverse));
                V::store(products.add(i), V::sub(exact, V::load_words(rounded.add(i))));
            }
            for i in whole..n {
                *products.add(i) = *products.add(i) * inverse - f32::from(*rounded.add(i));
            }
            let words = out.words.as_mut_ptr().add(rest * out.stride + lead);
            out.inverse[rest] = FINER;
            let scaled = Scaled { x: products, n, factor: out.inverse.as_ptr().add(rest) };
            let [sum, ..] = round::<V, 1>(scaled, words, out.stride);
            out.step[rest] = step / FINER;
            out.offset[rest] = -center * step / FINER * sum;
        }
    }
}
