//! Scales folded into queries or weights, which become integers.

use super::super::Folded;
use super::super::vector::Vector;
use super::tiles_of_heads;
use crate::attend::folded::step_of;
use crate::attend::mat::Mat;
use crate::attend::packed::Grid;

/// Folds the grid of a part into all rows of `w`: rows from `first` on of `out`, at word `lead` of each.
#[inline(always)]
pub(super) unsafe fn fold<V: Vector>(
    w: Mat<'_>,
    grid: Grid<'_>,
    largest_word: f32,
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
            let (max, offset) = if n == 4 * V::LANES {
                fold_vectors::<V, G, 4>(w, grid, largest_word, words, stride)
            } else if n == 8 * V::LANES {
                fold_vectors::<V, G, 8>(w, grid, largest_word, words, stride)
            } else {
                fold_any::<V, G>(w, grid, largest_word, words, stride, products)
            };
            for i in 0..G {
                *out.step.get_unchecked_mut(first + g + i) = step_of(max[i], largest_word).0;
                *out.offset.get_unchecked_mut(first + g + i) = offset[i];
            }
        }
    });
}

/// `words[g] = round(w_g scale / step_g)`; returns the largest `|w_g scale|` and `sum w_g zero`, for `N` vectors.
#[inline(always)]
unsafe fn fold_vectors<V: Vector, const G: usize, const N: usize>(
    w: Mat<'_>,
    Grid { scale, zero }: Grid<'_>,
    largest_word: f32,
    words: *mut i16,
    stride: usize,
) -> ([f32; 4], [f32; 4]) {
    // SAFETY: rows of `w`, the grid and `words` have N vectors, by the caller's contract.
    unsafe {
        let mut products = [[V::zero(); N]; G];
        let (mut largest, mut offset) = ([V::zero(); 4], [V::zero(); 4]);
        for v in 0..N {
            let at = v * V::LANES;
            let (scale, zero) = (V::load_f16(scale.as_ptr().add(at)), V::load_f16(zero.as_ptr().add(at)));
            for g in 0..G {
                let x = V::load(w.data.as_ptr().add(g * w.stride + at));
                products[g][v] = V::mul(x, scale);
                largest[g] = V::max(V::abs(products[g][v]), largest[g]);
                offset[g] = V::fma(x, zero, offset[g]);
            }
        }
        let max = V::largest4(largest);
        for g in 0..G {
            let inverse = V::splat(step_of(max[g], largest_word).1);
            for v in 0..N / 2 {
                let [a, b] = [products[g][2 * v], products[g][2 * v + 1]];
                let p = words.add(g * stride + 2 * v * V::LANES);
                V::store_rounded(p, V::mul(a, inverse), V::mul(b, inverse));
            }
        }
        (max, V::sum4(offset))
    }
}

/// As [`fold_vectors`], for any length; `products` has room for `G` rows.
#[inline(always)]
unsafe fn fold_any<V: Vector, const G: usize>(
    w: Mat<'_>,
    Grid { scale, zero }: Grid<'_>,
    largest_word: f32,
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
            let (scale, zero) = (V::load_f16(scale.as_ptr().add(i)), V::load_f16(zero.as_ptr().add(i)));
            for g in 0..G {
                let x = V::load(w.data.as_ptr().add(g * w.stride + i));
                let product = V::mul(x, scale);
                V::store(products.add(g * n + i), product);
                largest[g] = V::max(V::abs(product), largest[g]);
                offset[g] = V::fma(x, zero, offset[g]);
            }
        }
        let (mut max, mut offset) = (V::largest4(largest), V::sum4(offset));
        for i in whole..n {
            for g in 0..G {
                let x = w.data[g * w.stride + i];
                let product = x * scale[i].to_f32();
                *products.add(g * n + i) = product;
                max[g] = product.abs().max(max[g]);
                offset[g] += x * zero[i].to_f32();
            }
        }
        for g in 0..G {
            round::<V>(products.add(g * n), n, step_of(max[g], largest_word).1, words.add(g * stride));
        }
        (max, offset)
    }
}

/// `words = round(products inverse)`.
#[inline(always)]
unsafe fn round<V: Vector>(products: *const f32, n: usize, inverse: f32, words: *mut i16) {
    let whole = n / (2 * V::LANES) * (2 * V::LANES);
    // SAFETY: `words` has room for all products, by the caller's contract.
    unsafe {
        let factor = V::splat(inverse);
        for i in (0..whole).step_by(2 * V::LANES) {
            let p = products.add(i);
            V::store_rounded(words.add(i), V::mul(V::load(p), factor), V::mul(V::load(p.add(V::LANES)), factor));
        }
        for i in whole..n {
            words.add(i).write((*products.add(i) * inverse).round_ties_even() as i16);
        }
    }
}
