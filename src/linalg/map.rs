//! Maps from the model's coordinates to others: pages may hold `y = T x`, of as many numbers or of fewer, instead of a key or a
//! value `x`.
//!
//! What `y` stands for is `x' = S y`. So `q . x' = (S^T q) . y`, and `sum w x' = S sum w y`: a query goes in once for all
//! tokens, and a sum comes back once, never a token. Orthogonal maps have `S = T^-1 = T^T`, and `S^T = T`.

#![forbid(unsafe_code)]

use std::sync::Arc;

use ndarray::{Array2, ArrayView1};

use super::mat::Mat;
use super::random;
use super::rope::rotate;
use crate::error::{Error, Result};
use crate::memory;

/// A map of vectors of some dim `D` to vectors of `r <= D` numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum Map {
    /// `y = H D x / sqrt(block)`: random signs `D`, then the Walsh-Hadamard transform of every block of the largest power of
    /// two that divides the dim.
    Hadamard {
        /// `1 / sqrt(block)` and a random sign, one a number.
        signs: Box<[f32]>,
        /// Numbers that are mixed with each other.
        block: usize,
    },
    /// `y_i = x_(order[i])`, of all numbers or some.
    Order(Box<[u16]>),
    /// Pairs of numbers rotated back, as [`super::Rope`] says.
    Rotated {
        /// Which, each number in at most one pair.
        pairs: Arc<[(u16, u16)]>,
        /// Cosine and sine of the angle by which a pair of `x` is ahead of that of `y`.
        angles: Box<[[f32; 2]]>,
    },
    /// One after the other.
    Then(Arc<Self>, Arc<Self>),
    /// Any map to as many numbers or fewer.
    Matrix(Matrix),
}

/// `y = T x` and `x' = S y`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    /// `T`, `[r, D]`.
    down: Array2<f32>,
    /// `S`, `[D, r]`.
    up: Array2<f32>,
}

impl Matrix {
    /// `T` of `[r, D]` and `S` of `[D, r]` numbers.
    ///
    /// # Errors
    /// [`Error::Shape`] when they are no such pair, or `r > D`.
    pub fn new(down: Array2<f32>, up: Array2<f32>) -> Result<Self> {
        let ((r, dim), (back, from)) = (down.dim(), up.dim());
        if r == 0 || r > dim || (back, from) != (dim, r) {
            return Err(Error::Shape {
                what: "map",
                given: format!("[{r}, {dim}] and [{back}, {from}]"),
                expected: "[r, D] and [D, r] with 1 <= r <= D".into(),
            });
        }
        let standard = |matrix: Array2<f32>| matrix.as_standard_layout().into_owned();
        Ok(Self { down: standard(down), up: standard(up) })
    }
}

/// `y = M x`.
fn times(matrix: &Array2<f32>, x: &[f32], y: &mut [f32]) {
    for (y, row) in y.iter_mut().zip(matrix.rows()) {
        *y = row.dot(&ArrayView1::from(x));
    }
}

impl Map {
    /// The randomised Hadamard transform of `dim` numbers; the signs follow from the seed alone.
    pub fn hadamard(dim: usize, seed: u64) -> Self {
        let block = 1 << dim.trailing_zeros();
        let size = 1.0 / (block as f32).sqrt();
        let signs = (0..dim as u64).map(|i| if random(seed, i) >> 63 == 0 { size } else { -size }).collect();
        Self::Hadamard { signs, block }
    }

    /// How many numbers `y` has of an `x` of `dim`.
    pub fn dim(&self, dim: usize) -> usize {
        match self {
            Self::Hadamard { .. } | Self::Rotated { .. } => dim,
            Self::Order(order) => order.len(),
            Self::Then(first, second) => second.dim(first.dim(dim)),
            Self::Matrix(matrix) => matrix.down.nrows(),
        }
    }

    /// Bytes allocated for it.
    pub fn bytes(&self) -> usize {
        size_of::<Self>()
            + match self {
                Self::Hadamard { signs, .. } => size_of_val(&**signs),
                Self::Order(order) => size_of_val(&**order),
                Self::Rotated { angles, .. } => size_of_val(&**angles),
                Self::Then(first, second) => first.bytes() + second.bytes(),
                Self::Matrix(matrix) => 2 * matrix.down.len() * size_of::<f32>(),
            }
    }

    /// `y = T x`.
    pub fn apply(&self, x: &[f32], y: &mut [f32]) {
        match self {
            Self::Hadamard { signs, block } => {
                for ((y, x), sign) in y.iter_mut().zip(x).zip(signs) {
                    *y = x * sign;
                }
                y.chunks_exact_mut(*block).for_each(transform);
            }
            Self::Order(order) => {
                for (y, &i) in y.iter_mut().zip(order) {
                    *y = x[usize::from(i)];
                }
            }
            Self::Rotated { pairs, angles } => {
                y.copy_from_slice(x);
                for (&pair, &[cos, sin]) in pairs.iter().zip(angles) {
                    rotate(y, pair, [cos, -sin]);
                }
            }
            Self::Then(first, second) => {
                let mut between = memory::zeros(first.dim(x.len()));
                first.apply(x, &mut between);
                second.apply(&between, y);
            }
            Self::Matrix(matrix) => times(&matrix.down, x, y),
        }
    }

    /// `x' = S y`.
    pub fn undo(&self, y: &[f32], x: &mut [f32]) {
        match self {
            Self::Hadamard { signs, block } => {
                x.copy_from_slice(y);
                x.chunks_exact_mut(*block).for_each(transform);
                for (x, sign) in x.iter_mut().zip(signs) {
                    *x *= sign;
                }
            }
            Self::Order(order) => {
                x.fill(0.0);
                for (&i, &y) in order.iter().zip(y) {
                    x[usize::from(i)] = y;
                }
            }
            Self::Rotated { pairs, angles } => {
                x.copy_from_slice(y);
                for (&pair, &angle) in pairs.iter().zip(angles) {
                    rotate(x, pair, angle);
                }
            }
            Self::Then(first, second) => {
                let mut between = memory::zeros(first.dim(x.len()));
                second.undo(y, &mut between);
                first.undo(&between, x);
            }
            Self::Matrix(matrix) => times(&matrix.up, y, x),
        }
    }

    /// `S^T q`, which meets `y` as `q` meets `x'`.
    pub fn query(&self, q: &[f32], out: &mut [f32]) {
        match self {
            Self::Hadamard { .. } | Self::Order(_) | Self::Rotated { .. } => self.apply(q, out),
            Self::Then(first, second) => {
                let mut between = memory::zeros(first.dim(q.len()));
                first.query(q, &mut between);
                second.query(&between, out);
            }
            Self::Matrix(matrix) => {
                out.fill(0.0);
                for (&q, row) in q.iter().zip(matrix.up.rows()) {
                    out.iter_mut().zip(row).for_each(|(out, s)| *out += q * s);
                }
            }
        }
    }

    /// [`Self::apply`], row by row of `dim` numbers.
    pub fn apply_rows(&self, x: &[f32], dim: usize) -> Vec<f32> {
        self.rows(x, dim, |x, y| self.apply(x, y))
    }

    /// [`Self::query`], row by row of `dim` numbers.
    pub fn query_rows(&self, q: &[f32], dim: usize) -> Vec<f32> {
        self.rows(q, dim, |q, out| self.query(q, out))
    }

    fn rows(&self, x: &[f32], dim: usize, each: impl Fn(&[f32], &mut [f32])) -> Vec<f32> {
        let mut y = memory::zeros(x.len() / dim * self.dim(dim));
        x.chunks_exact(dim).zip(y.chunks_exact_mut(self.dim(dim))).for_each(|(x, y)| each(x, y));
        y
    }
}

/// Queries in other coordinates, the last ones that were asked for.
#[derive(Default)]
pub struct MappedRows<'a> {
    map: Option<&'a Arc<Map>>,
    q: Vec<f32>,
    dim: usize,
}

impl<'a> MappedRows<'a> {
    /// The rows of `q` for keys in the coordinates of `map`.
    pub fn through(&mut self, map: &'a Arc<Map>, q: Mat<'_>) -> Mat<'_> {
        if !self.map.is_some_and(|held| Arc::ptr_eq(held, map)) {
            self.map = Some(map);
            self.dim = map.dim(q.stride);
            memory::resize(&mut self.q, q.rows * self.dim);
            for (q, out) in q.data.chunks_exact(q.stride).zip(self.q.chunks_exact_mut(self.dim)) {
                map.query(q, out);
            }
        }
        Mat::new(&self.q[..q.rows * self.dim], q.rows, self.dim)
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
