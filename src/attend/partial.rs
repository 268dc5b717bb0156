//! The state of an online softmax.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::kernels::{Kernels, Weighed};
use super::mat::MatMut;
use super::{Basis, Received, padded};
use crate::memory;

/// Attention of some rows (queries) over some tokens, not yet divided by the weights' sum.
#[derive(Clone, Debug)]
pub struct Partial {
    /// Largest logit of each row so far.
    pub max: Vec<f32>,
    /// Sum of `exp(logit - max)` of each row.
    pub sum: Vec<f32>,
    /// Weighted sums of values, `stride` apart.
    pub acc: Vec<f32>,
    /// What every token received, if that is wanted.
    pub received: Received,
    /// Those of values in other coordinates, not yet in `acc`.
    turned: Option<(Arc<Basis>, Vec<f32>)>,
    /// The value dim, rounded up to whole vectors.
    pub stride: usize,
    value_dim: usize,
}

impl Partial {
    /// Nothing read yet.
    pub fn new(rows: usize, value_dim: usize) -> Self {
        let stride = padded(value_dim);
        Self {
            max: memory::filled(f32::NEG_INFINITY, rows),
            sum: memory::zeros(rows),
            acc: memory::zeros(rows * stride),
            received: Received::default(),
            turned: None,
            stride,
            value_dim,
        }
    }

    /// Queries of all heads.
    pub fn rows(&self) -> usize {
        self.max.len()
    }

    /// Turns the logits `[rows, n]` of the rows from `first` on for `n` further tokens into weights; [`Self::take`] takes
    /// them in.
    pub fn weigh(&self, first: usize, scores: MatMut<'_>, n: usize, kernels: &Kernels, weighed: &mut Vec<Weighed>) {
        weighed.clear();
        weighed.extend(self.max[first..first + scores.rows].iter().map(|&max| Weighed::before(max)));
        (kernels.softmax)(scores, n, weighed);
    }

    /// Takes the weights of further tokens in, for their values to be added.
    pub fn take(&mut self, row: usize, weighed: Weighed) {
        self.rescale(row, weighed.max);
        self.sum[row] += weighed.sum;
    }

    /// The weighted sums, to add to; those in the coordinates of `basis` are apart until [`Self::turn_back`].
    pub fn acc(&mut self, basis: Option<&Arc<Basis>>) -> MatMut<'_> {
        let (rows, stride) = (self.max.len(), self.stride);
        let Some(basis) = basis else {
            return MatMut::new(&mut self.acc, rows, stride);
        };
        if self.turned.as_ref().is_some_and(|(held, _)| !Arc::ptr_eq(held, basis)) {
            self.turn_back();
        }
        let (_, acc) = self.turned.get_or_insert_with(|| (Arc::clone(basis), memory::zeros(rows * stride)));
        MatMut::new(acc, rows, stride)
    }

    /// Takes the sums in other coordinates in; every part that is merged has done so.
    pub fn turn_back(&mut self) {
        if let Some((basis, mut turned)) = self.turned.take() {
            for (acc, turned) in self.acc.chunks_exact_mut(self.stride).zip(turned.chunks_exact_mut(self.stride)) {
                basis.undo(&mut turned[..self.value_dim]);
                for (a, b) in acc.iter_mut().zip(&turned[..self.value_dim]) {
                    *a += b;
                }
            }
        }
    }

    /// A logit without a value (a learned attention sink): it takes weight and adds nothing.
    pub fn add_sink(&mut self, row: usize, logit: f32) {
        let max = self.max[row].max(logit);
        self.rescale(row, max);
        self.sum[row] += (logit - max).exp();
    }

    fn rescale(&mut self, row: usize, max: f32) {
        if max > self.max[row] {
            let factor = decay(self.max[row], max);
            self.sum[row] *= factor;
            let turned = self.turned.as_mut().map(|(_, turned)| turned);
            for acc in [Some(&mut self.acc), turned].into_iter().flatten() {
                for a in &mut acc[row * self.stride..][..self.stride] {
                    *a *= factor;
                }
            }
            self.max[row] = max;
        }
    }

    /// Adds what another part of the tokens gave for the same rows.
    pub fn merge(&mut self, other: &Self) {
        for row in 0..self.max.len() {
            if other.max[row] == f32::NEG_INFINITY {
                continue;
            }
            self.rescale(row, other.max[row]);
            let factor = decay(other.max[row], self.max[row]);
            self.sum[row] += factor * other.sum[row];
            let at = row * self.stride..(row + 1) * self.stride;
            for (a, b) in self.acc[at.clone()].iter_mut().zip(&other.acc[at]) {
                *a += factor * b;
            }
        }
    }

    /// The attention output of `row`; zeros when no token was visible, NaN when a logit was.
    pub fn output(&self, row: usize, out: &mut [f32]) {
        let factor = if self.sum[row] == 0.0 { 0.0 } else { 1.0 / self.sum[row] };
        for (o, a) in out.iter_mut().zip(&self.acc[row * self.stride..]) {
            *o = a * factor;
        }
    }
}

/// What weights relative to the logit `from` are worth relative to `to`, which is no smaller.
fn decay(from: f32, to: f32) -> f32 {
    if from == to { 1.0 } else { (from - to).exp() }
}
