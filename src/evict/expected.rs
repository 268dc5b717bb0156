//! Expected attention (Devoto et al. 2025, arXiv 2510.00636): what future queries, as the ones so far are distributed, would give.
//!
//! ```text
//! q ~ N(m, S) before RoPE, R_p the rotation of position p, E the mean over the next `future` positions
//! m' = E[R_p] m,   S' = E[R_p S R_p^T]
//! score[t] = |v_t| (epsilon + mean over the query heads of  softmax_t( m' . k_t + k_t^T S' k_t / 2 ))
//! ```
//!
//! Queries are scaled. The paper's own code has `E[R_p] S E[R_p]^T`, which loses what turns fast; here the mean of the rotated
//! covariance is exact. A pair of channels is a complex number `z`, which a rotation multiplies: of two pairs `E[z w*]` turns with
//! the difference of their angles, and `E[z w]` with the sum.

use std::sync::Arc;

use super::keys::{each_key, each_value};
use super::{NewQueries, Place, refuse};
use crate::attend::kernels::Kernels;
use crate::attend::mat::{Mat, MatMut};
use crate::attend::{CHUNK, Head, Rope, Scratch};
use crate::error::Result;
use crate::memory;

/// Queries that are added to the moments at once.
const BLOCK: usize = 256;

/// The parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Expected {
    /// The layer's rotary embedding.
    pub rope: Arc<Rope>,
    /// Positions over which is averaged.
    pub future: usize,
    /// Whether the covariance counts.
    pub covariance: bool,
    /// Whether scores are multiplied with the lengths of the values.
    pub values: bool,
    /// What is added to the attention before that.
    pub epsilon: f32,
}

/// What is known of the queries of a KV head's readers, before RoPE.
#[derive(Clone, Debug, Default)]
pub struct Moments {
    queries: usize,
    /// Sums `[readers, dim]`.
    sums: Vec<f32>,
    /// Sums of outer products `[readers, dim, dim]`.
    products: Vec<f32>,
}

impl Moments {
    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        (self.sums.capacity() + self.products.capacity()) * size_of::<f32>()
    }

    /// Takes new queries into account, from position `first` on.
    pub fn add(&mut self, new: &NewQueries<'_>, first: u32, expected: &Expected, kernels: &Kernels) {
        let from = new.positions.partition_point(|&p| p < first);
        let dim = new.q.len() / (new.positions.len() * new.readers).max(1);
        memory::resize(&mut self.sums, new.readers * dim);
        memory::resize(&mut self.products, if expected.covariance { new.readers * dim * dim } else { 0 });
        self.queries += new.positions.len() - from;
        for block in (from..new.positions.len()).step_by(BLOCK) {
            let positions = &new.positions[block..new.positions.len().min(block + BLOCK)];
            for reader in 0..new.readers {
                let row = |t: usize| ((block + t) * new.readers + reader) * dim;
                let mut rows: Vec<f32> =
                    (0..positions.len()).flat_map(|t| &new.q[row(t)..row(t) + dim]).copied().collect();
                for (q, &p) in rows.chunks_exact_mut(dim).zip(positions) {
                    expected.rope.turn_back(p, q);
                    self.sums[reader * dim..][..dim].iter_mut().zip(&*q).for_each(|(sum, q)| *sum += q);
                }
                if expected.covariance {
                    let products = &mut self.products[reader * dim * dim..][..dim * dim];
                    add_products(&rows, dim, products, kernels);
                }
            }
        }
    }

    /// Mean and covariance of reader `reader`; the covariance is empty where it is not known.
    fn of(&self, reader: usize, dim: usize) -> (Vec<f32>, Vec<f32>) {
        let n = self.queries.max(1) as f32;
        let mean: Vec<f32> = self.sums[reader * dim..][..dim].iter().map(|sum| sum / n).collect();
        let products = self.products.get(reader * dim * dim..(reader + 1) * dim * dim).unwrap_or_default();
        let covariance = products.iter().enumerate().map(|(i, sum)| sum / n - mean[i / dim] * mean[i % dim]).collect();
        (mean, covariance)
    }
}

/// `products += rows^T rows` of rows of `dim` numbers.
fn add_products(rows: &[f32], dim: usize, products: &mut [f32], kernels: &Kernels) {
    let n = rows.len() / dim;
    let mut turned = memory::zeros(rows.len());
    for (t, row) in rows.chunks_exact(dim).enumerate() {
        row.iter().enumerate().for_each(|(c, x)| turned[c * n + t] = *x);
    }
    (kernels.matmul)(Mat::new(&turned, dim, n), Mat::new(rows, n, dim), dim, MatMut::new(products, dim, dim));
}

impl Expected {
    pub(super) fn check(&self) -> Result<()> {
        if self.future == 0 {
            return refuse("future", 0, "whole numbers from 1");
        }
        if !(self.epsilon >= 0.0 && self.epsilon.is_finite()) {
            return refuse("epsilon", self.epsilon, "0 and positive numbers");
        }
        Ok(())
    }

    /// The first `sinks` tokens take no part in the softmax: they stay anyway, and would take most of it.
    pub(super) fn scores(
        &self,
        head: &Head<'_>,
        place: Place,
        sinks: usize,
        moments: &Moments,
        scratch: &mut Scratch,
    ) -> Vec<f32> {
        let (tokens, dim) = (head.positions.len(), head.key_dim);
        let mut scores = memory::zeros(tokens);
        let first = head.positions.count_below(place.origin as usize + sinks).min(tokens);
        let readers = moments.sums.len() / dim;
        let next = head.positions.last().map_or(0, |last| last as usize + 1);
        for reader in 0..readers {
            let (mean, covariance) = moments.of(reader, dim);
            let (mean, covariance) = self.ahead(next, &mean, &covariance);
            let logits = expected_logits(head, &mean, &covariance, scratch);
            let max = logits[first..].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits[first..].iter().map(|x| (x - max).exp()).sum();
            for (score, x) in scores[first..].iter_mut().zip(&logits[first..]) {
                *score += (x - max).exp() / sum / readers as f32;
            }
        }
        if self.values {
            each_value(head, scratch, |t, value| {
                scores[t] = (scores[t] + self.epsilon) * value.iter().map(|x| x * x).sum::<f32>().sqrt();
            });
        }
        scores
    }

    /// Mean and covariance of queries at the `future` positions from `next` on.
    fn ahead(&self, next: usize, mean: &[f32], covariance: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (pairs, dim) = (self.rope.pairs(), mean.len());
        let turn = |frequency: f64| mean_turn(frequency, next, self.future);
        let mut turned = mean.to_vec();
        for &(a, b, f) in &pairs {
            (turned[a], turned[b]) = times(turn(f), (mean[a], mean[b]));
        }
        let mut out = covariance.to_vec();
        if out.is_empty() {
            return (turned, out);
        }
        let alone: Vec<usize> = (0..dim).filter(|c| pairs.iter().all(|(a, b, _)| a != c && b != c)).collect();
        for &(a, b, f) in &pairs {
            for &c in &alone {
                let (x, y) = times(turn(f), (covariance[a * dim + c], covariance[b * dim + c]));
                (out[a * dim + c], out[b * dim + c]) = (x, y);
                (out[c * dim + a], out[c * dim + b]) = (x, y);
            }
            for &(c, d, g) in &pairs {
                let [ac, ad, bc, bd] = [(a, c), (a, d), (b, c), (b, d)].map(|(i, j)| covariance[i * dim + j]);
                let (re, im) = times(turn(f - g), (ac + bd, bc - ad));
                let (re_sum, im_sum) = times(turn(f + g), (ac - bd, bc + ad));
                (out[a * dim + c], out[b * dim + d]) = halves(re, re_sum);
                (out[b * dim + c], out[a * dim + d]) = halves(im_sum, im);
            }
        }
        (turned, out)
    }
}

/// The mean of `e^(i frequency p)` over `n` positions from `first` on: a geometric series.
fn mean_turn(frequency: f64, first: usize, n: usize) -> (f64, f64) {
    let half = frequency / 2.0;
    let ratio = if half.sin().abs() < 1e-9 { 1.0 } else { (half * n as f64).sin() / (half.sin() * n as f64) };
    let (sin, cos) = (frequency * first as f64 + half * (n - 1) as f64).sin_cos();
    (ratio * cos, ratio * sin)
}

/// Half the sum and half the difference.
fn halves(x: f32, y: f32) -> (f32, f32) {
    (0.5 * (x + y), 0.5 * (x - y))
}

/// The product of two complex numbers.
fn times((re, im): (f64, f64), (x, y): (f32, f32)) -> (f32, f32) {
    let (x, y) = (f64::from(x), f64::from(y));
    ((re * x - im * y) as f32, (re * y + im * x) as f32)
}

/// `mean . k + k^T covariance k / 2` for every key.
fn expected_logits(head: &Head<'_>, mean: &[f32], covariance: &[f32], scratch: &mut Scratch) -> Vec<f32> {
    let dim = mean.len();
    let mut keys = memory::with_capacity(head.positions.len() * dim);
    each_key(head, scratch, |_, key| keys.extend_from_slice(key));
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let mut logits = memory::collected(keys.chunks_exact(dim).map(|key| dot(mean, key)));
    if covariance.is_empty() {
        return logits;
    }
    let mut products = memory::zeros(CHUNK * dim);
    for (keys, logits) in keys.chunks(CHUNK * dim).zip(logits.chunks_mut(CHUNK)) {
        let products = &mut products[..keys.len()];
        products.fill(0.0);
        let (n, out) = (keys.len() / dim, MatMut::new(products, keys.len() / dim, dim));
        (scratch.kernels.matmul)(Mat::new(keys, n, dim), Mat::new(covariance, dim, dim), dim, out);
        for ((logit, key), product) in logits.iter_mut().zip(keys.chunks_exact(dim)).zip(products.chunks_exact(dim)) {
            *logit += dot(key, product) / 2.0;
        }
    }
    logits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_ahead_are_those_of_queries_that_were_turned() {
        let (future, next, dim) = (37, 11, 6);
        let rope = Rope::shared(&[(0, 2), (1, 3)], &[0.7, 0.05]); // channels 4 and 5 are not turned
        let expected = Expected { rope, future, covariance: true, values: false, epsilon: 0.0 };
        let number = |i: usize| ((i * 7919 + 13) % 101) as f32 / 50.0 - 1.0;
        let mean: Vec<f32> = (0..dim).map(number).collect();
        let root: Vec<f32> = (0..dim * dim).map(|i| number(i + 50)).collect();
        let entry = |i: usize, j: usize| (0..dim).map(|k| root[i * dim + k] * root[j * dim + k]).sum::<f32>();
        let covariance: Vec<f32> = (0..dim * dim).map(|i| entry(i / dim, i % dim)).collect();
        let (mut want_mean, mut want) = (vec![0.0f64; dim], vec![0.0f64; dim * dim]);
        for p in next..next + future {
            let mut turn = vec![0.0f64; dim * dim];
            (0..dim).for_each(|c| turn[c * dim + c] = 1.0);
            for (a, b, f) in expected.rope.pairs() {
                let (sin, cos) = (f * p as f64).sin_cos();
                (turn[a * dim + a], turn[a * dim + b]) = (cos, -sin);
                (turn[b * dim + a], turn[b * dim + b]) = (sin, cos);
            }
            for i in 0..dim {
                want_mean[i] += (0..dim).map(|j| turn[i * dim + j] * f64::from(mean[j])).sum::<f64>() / future as f64;
                for j in 0..dim {
                    let all = (0..dim * dim).map(|kl| (kl / dim, kl % dim));
                    let sum: f64 = all
                        .map(|(k, l)| turn[i * dim + k] * f64::from(covariance[k * dim + l]) * turn[j * dim + l])
                        .sum();
                    want[i * dim + j] += sum / future as f64;
                }
            }
        }
        let (mean, covariance) = expected.ahead(next, &mean, &covariance);
        let close = |x: &[f32], y: &[f64]| x.iter().zip(y).all(|(x, y)| (f64::from(*x) - y).abs() < 1e-5);
        assert!(close(&mean, &want_mean) && close(&covariance, &want), "{covariance:?} {want:?}");
    }
}
