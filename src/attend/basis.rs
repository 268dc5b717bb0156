//! Other coordinates: pages may hold `y = T x` instead of a key or a value `x`.
//!
//! `q . k = (T^-T q) . (T k)`, and `sum w v = T^-1 sum w (T v)`: a query is turned once for all tokens, and an output once,
//! never a token. All changes here are orthogonal, so `T^-T = T` and `T^-1 = T^T`.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::mat::Mat;
use crate::memory;

/// An orthogonal change of coordinates of vectors of some dim.
#[derive(Clone, Debug, PartialEq)]
pub enum Basis {
    /// `y = H D x / sqrt(block)`: random signs `D`, then the Walsh-Hadamard transform of every block of the largest power of
    /// two that divides the dim.
    Hadamard {
        /// `1 / sqrt(block)` and a random sign, one a number.
        signs: Box<[f32]>,
        /// Numbers that are mixed with each other.
        block: usize,
    },
    /// `y_i = x_(order[i])`.
    Order(Box<[u16]>),
    /// Pairs of numbers turned back, as [`super::Rope`] says.
    Turned {
        /// Which, each number in at most one pair.
        pairs: Arc<[(u16, u16)]>,
        /// Cosine and sine of the angle by which a pair of `x` is ahead of that of `y`.
        turns: Box<[[f32; 2]]>,
    },
    /// One after the other.
    Both(Arc<Self>, Arc<Self>),
}

impl Basis {
    /// The randomised Hadamard transform of `dim` numbers; the signs follow from the seed alone.
    pub fn hadamard(dim: usize, seed: u64) -> Self {
        let block = 1 << dim.trailing_zeros();
        let size = 1.0 / (block as f32).sqrt();
        let signs = (0..dim as u64).map(|i| if random(seed, i) >> 63 == 0 { size } else { -size }).collect();
        Self::Hadamard { signs, block }
    }

    /// Bytes allocated for it.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Hadamard { signs, .. } => size_of_val(&**signs),
                Self::Order(order) => size_of_val(&**order),
                Self::Turned { turns, .. } => size_of_val(&**turns),
                Self::Both(first, second) => first.bytes() + second.bytes(),
            }
    }

    /// `x <- T x`.
    pub fn apply(&self, x: &mut [f32]) {
        match self {
            Self::Hadamard { signs, block } => {
                for (x, sign) in x.iter_mut().zip(signs) {
                    *x *= sign;
                }
                x.chunks_exact_mut(*block).for_each(transform);
            }
            Self::Order(order) => {
                let old = x.to_vec();
                for (x, &i) in x.iter_mut().zip(order) {
                    *x = old[usize::from(i)];
                }
            }
            Self::Turned { pairs, turns } => {
                for (&(a, b), [cos, sin]) in pairs.iter().zip(turns) {
                    let (a, b) = (usize::from(a), usize::from(b));
                    (x[a], x[b]) = (x[a] * cos + x[b] * sin, x[b] * cos - x[a] * sin);
                }
            }
            Self::Both(first, second) => {
                first.apply(x);
                second.apply(x);
            }
        }
    }

    /// `y <- T^-1 y`.
    pub fn undo(&self, y: &mut [f32]) {
        match self {
            Self::Hadamard { signs, block } => {
                y.chunks_exact_mut(*block).for_each(transform);
                for (y, sign) in y.iter_mut().zip(signs) {
                    *y *= sign;
                }
            }
            Self::Order(order) => {
                let old = y.to_vec();
                for (&i, &old) in order.iter().zip(&old) {
                    y[usize::from(i)] = old;
                }
            }
            Self::Turned { pairs, turns } => {
                for (&(a, b), [cos, sin]) in pairs.iter().zip(turns) {
                    let (a, b) = (usize::from(a), usize::from(b));
                    (y[a], y[b]) = (y[a] * cos - y[b] * sin, y[b] * cos + y[a] * sin);
                }
            }
            Self::Both(first, second) => {
                second.undo(y);
                first.undo(y);
            }
        }
    }
}

/// Queries in other coordinates, the last ones that were asked for.
#[derive(Default)]
pub(super) struct Turned<'a> {
    basis: Option<&'a Arc<Basis>>,
    q: Vec<f32>,
}

impl<'a> Turned<'a> {
    /// The rows of `q` in the coordinates of `basis`.
    pub(super) fn in_basis(&mut self, basis: &'a Arc<Basis>, q: Mat<'_>) -> Mat<'_> {
        if !self.basis.is_some_and(|held| Arc::ptr_eq(held, basis)) {
            self.basis = Some(basis);
            self.q.clear();
            memory::append(&mut self.q, &q.data[..q.rows * q.stride]);
            self.q.chunks_exact_mut(q.stride).for_each(|q| basis.apply(q));
        }
        Mat::new(&self.q, q.rows, q.stride)
    }
}

/// 1, 2, 4, ... below `block`.
fn halves(block: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(1), |half| Some(2 * half)).take_while(move |&half| half < block)
}

/// The Walsh-Hadamard transform, not normalised; its own inverse but for the factor `x.len()`.
fn transform(x: &mut [f32]) {
    for half in halves(x.len()) {
        for pair in x.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
    }
}

/// Number `i` of the stream of random numbers with this seed (`SplitMix64`, Steele et al. 2014).
fn random(seed: u64, i: u64) -> u64 {
    let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn orthogonal(dim in 1usize..130, seed: u64, kind in 0usize..4) {
            let basis = match kind {
                0 => Basis::Order((0..dim as u16).rev().collect()),
                1 => Basis::hadamard(dim, seed),
                2 => Basis::Both(Arc::new(Basis::hadamard(dim, seed)), Arc::new(Basis::Order((0..dim as u16).rev().collect()))),
                _ => {
                    let pairs: Vec<(u16, u16)> = (0..dim as u16 / 2).map(|i| (i, i + dim as u16 / 2)).collect();
                    let frequencies: Vec<f32> = pairs.iter().map(|&(i, _)| 0.9f32.powi(i.into())).collect();
                    Basis::clone(&super::super::Rope::shared(&pairs, &frequencies).basis(seed as usize % 4000))
                }
            };
            let x: Vec<f32> = (0..dim as u64).map(|i| (random(seed, i) >> 40) as f32 / 1e7 - 0.8).collect();
            let mut y = x.clone();
            basis.apply(&mut y);
            let norm = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            prop_assert!((norm(&x) / norm(&y) - 1.0).abs() < 1e-5);
            basis.undo(&mut y);
            for i in 0..dim {
                prop_assert!((x[i] - y[i]).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn hadamard_of_four_is_the_known_one() {
        let mut x = [1.0, 0.0, 0.0, 0.0];
        let basis = Basis::Hadamard { signs: [0.5; 4].into(), block: 4 };
        basis.apply(&mut x);
        assert_eq!(x, [0.5; 4]);
        let mut x = [0.0, 1.0, 0.0, 0.0];
        basis.apply(&mut x);
        assert_eq!(x, [0.5, -0.5, 0.5, -0.5]);
    }
}
