//! Scales folded into queries or weights, which become integers.

use half::f16;

use super::super::Folded;
use super::super::vector::Vector;
use super::tiles_of_heads;
use crate::attend::folded::{FINER, step_of};
use crate::attend::mat::Mat;
use crate::attend::packed::Grid;

/// How products become words.
#[derive(Clone, Copy)]
pub(super) struct Rounding {
    pub(super) largest_word: f32,
    pub(super) middle: f32,
}

/// Folds the grid of a part into all rows of `w`: rows from `first` on of `out`, at word `lead` of each.
#[inline(always)]
pub(super) unsafe fn fold<V: Vector>(
    w: Mat<'_>,
    grid: Grid<'_>,
    rounding: Rounding,
    [first, lead]: [usize; 2],
    out: &mut Folded,
) {
    let n = grid.scale.len();
    tiles_of_heads!(w.rows, g, G => {
        let w = w.part(g, G);
        // SAFETY: by the caller's contract; `products` holds four rows.
        unsafe {
            let words = out.words.as_mut_ptr().add((first + g) * out.stride + lead);
            let (stride, products) = (out.stride, out.products.as_mut_ptr());
            let (step, offset) = if n == 4 * V::LANES {
                fold_vectors::<V, G, 4>(w, grid, rounding, words, stride)
            } else if n == 8 * V::LANES {
                fold_vectors::<V, G, 8>(w, grid, rounding, words, stride)
            } else {
                fold_any::<V, G>(w, grid, rounding, words, stride, products)
            };
            for i in 0..G {
                *out.step.get_unchecked_mut(first + g + i) = step[i];
                *out.offset.get_unchecked_mut(first + g + i) = offset[i];
            }
        }
    });
}

/// `words[g] = round(w_g scale / step_g)`; returns the steps and offsets, for `N` vectors.
#[inline(always)]
unsafe fn fold_vectors<V: Vector, const G: usize, const N: usize>(
    w: Mat<'_>,
    Grid { scale, zero }: Grid<'_>,
    Rounding { largest_word, middle }: Rounding,
    words: *mut i16,
    stride: usize,
) -> ([f32; 4], [f32; 4]) {
    // SAFETY: rows of `w`, the grid and `words` have N vectors, by the caller's contract.
    unsafe {
        let mut products = [[V::zero(); N]; G];
        let (mut largest, mut offset) = ([V::zero(); 4], [V::zero(); 4]);
        for v in 0..N {
            let at = v * V::LANES;
            let scale = V::load_f16(scale.as_ptr().add(at));
            let at_middle = V::fma(scale, V::splat(middle), V::load_f16(zero.as_ptr().add(at)));
            for g in 0..G {
                let x = V::load(w.data.as_ptr().add(g * w.stride + at));
                products[g][v] = V::mul(x, scale);
                largest[g] = V::max(V::abs(products[g][v]), largest[g]);
                offset[g] = V::fma(x, at_middle, offset[g]);
            }
        }
        let (max, mut step) = (V::largest4(largest), [0.0; 4]);
        for g in 0..G {
            let inverse;
            (step[g], inverse) = step_of(max[g], largest_word);
            let (inverse, mut sum) = (V::splat(inverse), V::integer_zero());
            for v in 0..N / 2 {
                let [a, b] = [products[g][2 * v], products[g][2 * v + 1]];
                let p = words.add(g * stride + 2 * v * V::LANES);
                sum = V::add_integers(sum, V::store_rounded(p, V::mul(a, inverse), V::mul(b, inverse)));
            }
            offset[g] = V::fma(V::to_float(sum), V::splat(-middle * step[g]), offset[g]);
        }
        (step, V::sum4(offset))
    }
}

/// As [`fold_vectors`], for any length; `products` has room for `G` rows.
#[inline(always)]
unsafe fn fold_any<V: Vector, const G: usize>(
    w: Mat<'_>,
    Grid { scale, zero }: Grid<'_>,
    Rounding { largest_word, middle }: Rounding,
    words: *mut i16,
    stride: usize,
    products: *mut f32,
) -> ([f32; 4], [f32; 4]) {
    let n = scale.len();
    let whole = n / V::LANES * V::LANES;
    // SAFETY: i + LANES <= n, which rows of `w`, the grid, the products and the words have.
    unsafe {
        let (mut largest, mut offset) = ([V::zero(); 4], [V::zero(); 4]);
        for i in (0..whole).step_by(V::LANES) {
            let scale = V::load_f16(scale.as_ptr().add(i));
            let at_middle = V::fma(scale, V::splat(middle), V::load_f16(zero.as_ptr().add(i)));
            for g in 0..G {
                let x = V::load(w.data.as_ptr().add(g * w.stride + i));
                let product = V::mul(x, scale);
                V::store(products.add(g * n + i), product);
                largest[g] = V::max(V::abs(product), largest[g]);
                offset[g] = V::fma(x, at_middle, offset[g]);
            }
        }
        let (mut max, mut offset) = (V::largest4(largest), V::sum4(offset));
        for i in whole..n {
            let scale = scale[i].to_f32();
            for g in 0..G {
                let x = w.data[g * w.stride + i];
                *products.add(g * n + i) = x * scale;
                max[g] = (x * scale).abs().max(max[g]);
                offset[g] += x * (zero[i].to_f32() + middle * scale);
            }
        }
        let mut step = [0.0; 4];
        for g in 0..G {
            let inverse;
            (step[g], inverse) = step_of(max[g], largest_word);
            let sum = round::<V>(products.add(g * n), n, inverse, words.add(g * stride));
            offset[g] -= middle * step[g] * sum;
        }
        (step, offset)
    }
}

/// `words = round(products inverse)`; returns their sum.
#[inline(always)]
unsafe fn round<V: Vector>(products: *const f32, n: usize, inverse: f32, words: *mut i16) -> f32 {
    let whole = n / (2 * V::LANES) * (2 * V::LANES);
    // SAFETY: `words` has room for all products, by the caller's contract.
    unsafe {
        let (factor, mut sum) = (V::splat(inverse), V::integer_zero());
        for i in (0..whole).step_by(2 * V::LANES) {
            let [a, b] = [V::load(products.add(i)), V::load(products.add(i + V::LANES))];
            sum = V::add_integers(sum, V::store_rounded(words.add(i), V::mul(a, factor), V::mul(b, factor)));
        }
        let mut sum = V::sum(V::to_float(sum));
        for i in whole..n {
            let word = (*products.add(i) * inverse).round_ties_even() as i16;
            words.add(i).write(word);
            sum += f32::from(word);
        }
        sum
    }
}

/// The words of what rounding left over, finer ones: rows `rest ..` of `out` from those at `first ..`.
#[inline(always)]
pub(super) unsafe fn fold_rest<V: Vector>(
    w: Mat<'_>,
    scale: &[f16],
    middle: f32,
    [first, rest, lead]: [usize; 3],
    out: &mut Folded,
) {
    let (n, stride) = (scale.len(), out.stride);
    let whole = n / (2 * V::LANES) * (2 * V::LANES);
    for g in 0..w.rows {
        let step = out.step[first + g];
        let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
        // SAFETY: by the caller's contract, rows of `w` and of words reach n, and `out` has all these rows.
        unsafe {
            let row = w.data.as_ptr().add(g * w.stride);
            let rounded = out.words.as_ptr().add((first + g) * stride + lead);
            let words = out.words.as_mut_ptr().add((rest + g) * stride + lead);
            let (inverse_all, finer) = (V::splat(inverse), V::splat(FINER));
            let left = |at: usize| {
                let product = V::mul(V::load(row.add(at)), V::load_f16(scale.as_ptr().add(at)));
                let exact = V::mul(product, inverse_all);
                V::mul(V::sub(exact, V::load_words(rounded.add(at))), finer)
            };
            let mut sum = V::integer_zero();
            for i in (0..whole).step_by(2 * V::LANES) {
                sum = V::add_integers(sum, V::store_rounded(words.add(i), left(i), left(i + V::LANES)));
            }
            let mut sum = V::sum(V::to_float(sum));
            for i in whole..n {
                let exact = *row.add(i) * scale[i].to_f32() * inverse;
                let word = ((exact - f32::from(*rounded.add(i))) * FINER).round_ties_even() as i16;
                words.add(i).write(word);
                sum += f32::from(word);
            }
            out.step[rest + g] = step / FINER;
            out.offset[rest + g] = -middle * step / FINER * sum;
        }
    }
}
