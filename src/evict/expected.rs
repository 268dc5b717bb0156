//! Expected attention (Devoto et al. 2025, arXiv 2510.00636): what future queries, as the ones so far are distributed, would give.
//!
//! ```text
//! q ~ N(m, S) before RoPE, R_p the rotation of position p, E the mean over the next `future` positions
//! m' = E[R_p] m,   S' = E[R_p S R_p^T]
//! score[t] = |v_t| (epsilon + mean over the query heads of  softmax_t( m' . k_t + k_t^T S' k_t / 2 ))
//! ```
//!
//! Queries are scaled. The paper's own code has `E[R_p] S E[R_p]^T`, which loses what rotates fast; here the mean of the rotated
//! covariance is exact. A pair of channels is a complex number `z`, which a rotation multiplies: of two pairs `E[z w*]` rotates with
//! the difference of their angles, and `E[z w]` with the sum.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::moments::Moments;
use super::{NewQueries, Observed, Place, Scorer, Wanted};
use crate::attend::{CHUNK, Head, Scratch};
use crate::error::{Result, refuse};
use crate::linalg::{Mat, MatMut, Rope};
use crate::memory;
use crate::options::Options;

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

impl Expected {
    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let rope = Rope::of(&mut options.options("rotation")?.unwrap_or_default())?;
        let (future, epsilon) = (options.whole("future")?, options.number("epsilon")?);
        Ok(Self { rope, future, covariance: options.flag("covariance")?, values: options.flag("values")?, epsilon })
    }

    /// Mean and covariance of queries at the `future` positions from `next` on.
    fn ahead(&self, next: usize, mean: &[f32], covariance: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (pairs, dim) = (self.rope.pairs(), mean.len());
        let rotation = |frequency: f64| mean_rotation(frequency, next, self.future);
        let mut rotated = mean.to_vec();
        for &(a, b, f) in &pairs {
            (rotated[a], rotated[b]) = times(rotation(f), (mean[a], mean[b]));
        }
        let mut out = covariance.to_vec();
        if out.is_empty() {
            return (rotated, out);
        }
        let alone: Vec<usize> = (0..dim).filter(|c| pairs.iter().all(|(a, b, _)| a != c && b != c)).collect();
        for &(a, b, f) in &pairs {
            for &c in &alone {
                let (x, y) = times(rotation(f), (covariance[a * dim + c], covariance[b * dim + c]));
                (out[a * dim + c], out[b * dim + c]) = (x, y);
                (out[c * dim + a], out[c * dim + b]) = (x, y);
            }
            for &(c, d, g) in &pairs {
                let [ac, ad, bc, bd] = [(a, c), (a, d), (b, c), (b, d)].map(|(i, j)| covariance[i * dim + j]);
                let (re, im) = times(rotation(f - g), (ac + bd, bc - ad));
                let (re_sum, im_sum) = times(rotation(f + g), (ac - bd, bc + ad));
                (out[a * dim + c], out[b * dim + d]) = halves(re, re_sum);
                (out[b * dim + c], out[a * dim + d]) = halves(im_sum, im);
            }
        }
        (rotated, out)
    }
}

impl Scorer for Expected {
    fn check(&self) -> Result<()> {
        if self.future == 0 {
            return refuse("future", 0, "whole numbers from 1");
        }
        if !(self.epsilon >= 0.0 && self.epsilon.is_finite()) {
            return refuse("epsilon", self.epsilon, "0 and positive numbers");
        }
        Ok(())
    }

    fn queries(&self) -> Wanted {
        Wanted::All
    }

    fn fresh(&self) -> Box<dyn Observed> {
        Box::new(Distribution { expected: self.clone(), moments: Moments::default() })
    }
}

/// What is known of queries to come.
#[derive(Clone)]
struct Distribution {
    expected: Expected,
    moments: Moments,
}

impl Observed for Distribution {
    /// Queries of decoding might be rolled back, and do not count.
    fn observe(&mut self, _: &Head<'_>, queries: &NewQueries<'_>, place: Place, scratch: &mut Scratch) {
        if queries.prompt {
            let Expected { rope, covariance, .. } = &self.expected;
            self.moments.add(queries, place.origin + place.sinks as u32, rope, *covariance, scratch.kernels);
        }
    }

    /// The sinks take no part in the softmax: they stay anyway, and would take most of it.
    fn scores(&self, head: &Head<'_>, place: Place, scratch: &mut Scratch) -> Vec<f32> {
        let Self { expected, moments } = self;
        let (tokens, dim) = (head.positions.len(), head.key_dim);
        let mut scores = memory::zeros(tokens);
        let first = head.positions.count_below(place.origin as usize + place.sinks).min(tokens);
        let heads = moments.heads(dim);
        let next = head.positions.last().map_or(0, |last| last as usize + 1);
        for query_head in 0..heads {
            let (mean, covariance) = moments.of(query_head, dim);
            let (mean, covariance) = expected.ahead(next, &mean, &covariance);
            let logits = expected_logits(head, &mean, &covariance, scratch);
            let max = logits[first..].iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = logits[first..].iter().map(|x| (x - max).exp()).sum();
            for (score, x) in scores[first..].iter_mut().zip(&logits[first..]) {
                *score += (x - max).exp() / sum / heads as f32;
            }
        }
        if expected.values {
            head.each_value(scratch, |t, value| {
                scores[t] = (scores[t] + expected.epsilon) * value.iter().map(|x| x * x).sum::<f32>().sqrt();
            });
        }
        scores
    }

    fn truncate(&mut self, _: usize, tokens: usize) {
        if tokens == 0 {
            self.moments = Moments::default();
        }
    }

    fn retain(&mut self, _: &[bool], decoding: bool) {
        if !decoding {
            self.moments = Moments::default();
        }
    }

    fn bytes(&self) -> usize {
        self.moments.bytes()
    }

    fn fork(&self) -> Box<dyn Observed> {
        Box::new(self.clone())
    }
}

/// The mean of `e^(i frequency p)` over `n` positions from `first` on: a geometric series.
fn mean_rotation(frequency: f64, first: usize, n: usize) -> (f64, f64) {
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
    head.each_key(scratch, |_, key| keys.extend_from_slice(key));
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
    fn moments_ahead_are_those_of_queries_that_were_rotated() {
        let (future, next, dim) = (37, 11, 6);
        let rope = Rope::shared(&[(0, 2), (1, 3)], &[0.7, 0.05]); // channels 4 and 5 are not rotated
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
