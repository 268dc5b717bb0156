//! The state of an online softmax.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::TokenWeights;
use crate::format::padded;
use crate::kernels::{Kernels, Weighed};
use crate::linalg::{Map, MatMut};
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
    /// The weight of every token, if that is wanted.
    pub weights: TokenWeights,
    /// Those of values in other coordinates, not yet in `acc`.
    mapped: Option<(Arc<Map>, Vec<f32>)>,
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
            weights: TokenWeights::default(),
            mapped: None,
            stride,
            value_dim,
        }
    }

    /// Queries of all heads.
    pub fn rows(&self) -> usize {
        self.max.len()
    }

    /// Makes weights of the logits `[rows, n]` of the rows from `first` on for `n` further tokens; [`Self::take`] takes
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

    /// The weighted sums, to add to; those in the coordinates of `map` are apart until [`Self::map_back`].
    pub fn acc(&mut self, map: Option<&Arc<Map>>) -> MatMut<'_> {
        let (rows, stride) = (self.max.len(), self.stride);
        let Some(map) = map else {
            return MatMut::new(&mut self.acc, rows, stride);
        };
        if self.mapped.as_ref().is_some_and(|(held, _)| !Arc::ptr_eq(held, map)) {
            self.map_back();
        }
        let (_, acc) = self.mapped.get_or_insert_with(|| (Arc::clone(map), memory::zeros(rows * stride)));
        MatMut::new(acc, rows, stride)
    }

    /// Takes the sums in other coordinates in; every part that is merged has done so.
    pub fn map_back(&mut self) {
        if let Some((map, mapped)) = self.mapped.take() {
            let stored = map.dim(self.value_dim);
            let mut values = memory::zeros(self.value_dim);
            for (acc, mapped) in self.acc.chunks_exact_mut(self.stride).zip(mapped.chunks_exact(self.stride)) {
                map.undo(&mapped[..stored], &mut values);
                acc.iter_mut().zip(&values).for_each(|(a, b)| *a += b);
            }
        }
    }

    /// A logit without a value: it takes weight and adds nothing.
    pub fn add_logit(&mut self, row: usize, logit: f32) {
        self.add(row, logit, &[]);
    }

    /// A logit with its value.
    pub fn add(&mut self, row: usize, logit: f32, value: &[f32]) {
        let max = self.max[row].max(logit);
        self.rescale(row, max);
        let weight = if logit == f32::NEG_INFINITY { 0.0 } else { (logit - max).exp() };
        self.sum[row] += weight;
        self.acc[row * self.stride..].iter_mut().zip(value).for_each(|(a, x)| *a += weight * x);
    }

    fn rescale(&mut self, row: usize, max: f32) {
        if max > self.max[row] {
            let factor = decay(self.max[row], max);
            self.sum[row] *= factor;
            let mapped = self.mapped.as_mut().map(|(_, mapped)| mapped);
            for acc in [Some(&mut self.acc), mapped].into_iter().flatten() {
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
