//! Scales folded into queries or weights, which become integers.

use super::super::vector::Vector;
use super::super::{Folded, Grid};
use super::tiles_of_heads;
use crate::attend::folded::step_of;
use crate::attend::mat::Mat;

/// As `Kernels::fold` says.
#[inline(always)]
pub(in super::super) unsafe fn fold<V: Vector>(
    x: Mat<'_>,
    grid: Grid<'_>,
    largest_word: f32,
    lead: usize,
    out: &mut Folded,
) {
    let n = grid.scale.len();
    out.products.resize(out.products.len().max(4 * n), 0.0);
    tiles_of_heads!(x.rows, g, G => {
        // SAFETY: by the caller's contract; `products` holds four rows.
        unsafe {
            let max = multiply::<V, G>(x.part(g, G), grid, g, out);
            for i in 0..G {
                let (step, inverse) = step_of(max[i], largest_word);
                out.step[g + i] = step;
                let words = out.words.as_mut_ptr().add((g + i) * out.stride + lead);
                round::<V>(&out.products[i * n..(i + 1) * n], inverse, words);
            }
        }
    });
}

/// `products = x scale`, `offset = sum x zero` from row `first` on; returns the largest product of each row.
#[inline(always)]
unsafe fn multiply<V: Vector, const G: usize>(x: Mat<'_>, grid: Grid<'_>, first: usize, out: &mut Folded) -> [f32; G] {
    let Grid { scale, zero } = grid;
    let n = scale.len();
    let whole = n / V::LANES * V::LANES;
    // SAFETY: i + LANES <= n, which rows of `x`, the grid and the products have.
    unsafe {
        let mut largest = [V::zero(); G];
        let mut offset = [V::zero(); G];
        for i in (0..whole).step_by(V::LANES) {
            let (scale, zero) = (V::load_f16(scale.as_ptr().add(i)), V::load_f16(zero.as_ptr().add(i)));
            for g in 0..G {
                let x = V::load(x.data.as_ptr().add(g * x.stride + i));
                let product = V::mul(x, scale);
                V::store(out.products.as_mut_ptr().add(g * n + i), product);
                largest[g] = V::max(V::abs(product), largest[g]);
                offset[g] = V::fma(x, zero, offset[g]);
            }
        }
        let mut max = [0.0; G];
        for g in 0..G {
            (max[g], out.offset[first + g]) = (V::largest(largest[g]), V::sum(offset[g]));
        }
        for i in whole..n {
            let (scale, zero) = (scale[i].to_f32(), zero[i].to_f32());
            for g in 0..G {
                let x = x.data[g * x.stride + i];
                out.products[g * n + i] = x * scale;
                max[g] = (x * scale).abs().max(max[g]);
                out.offset[first + g] += x * zero;
            }
        }
        max
    }
}

/// `words = round(products inverse)`.
#[inline(always)]
unsafe fn round<V: Vector>(products: &[f32], inverse: f32, words: *mut i16) {
    let whole = products.len() / (2 * V::LANES) * (2 * V::LANES);
    // SAFETY: `words` has room for all products, by the caller's contract.
    unsafe {
        let factor = V::splat(inverse);
        for i in (0..whole).step_by(2 * V::LANES) {
            let p = products.as_ptr().add(i);
            V::store_rounded(words.add(i), V::mul(V::load(p), factor), V::mul(V::load(p.add(V::LANES)), factor));
        }
        for i in whole..products.len() {
            words.add(i).write((products[i] * inverse).round_ties_even() as i16);
        }
    }
}
