//! The attention that every token received, from the weights that an online softmax left behind.

#![forbid(unsafe_code)]

use std::sync::Mutex;

use super::Partial;
use super::kernels::Kernels;
use super::mat::{Mat, MatMut};

/// Weights of some chunks of tokens, each relative to the largest logit when it was read.
#[derive(Clone, Debug, Default)]
pub struct Received {
    /// First token and tokens of each chunk.
    chunks: Vec<(usize, usize)>,
    /// The largest logit of every row so far, chunk by chunk.
    max: Vec<f32>,
    /// `[rows, tokens]`, chunk by chunk.
    weights: Vec<f32>,
}

/// Memory for weights that was used before: fresh memory would cost more than what is written to it.
static SPARE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Pieces of memory that are kept: as many as a step needs, heads times parts of their tokens.
const MOST_SPARE: usize = 64;

impl Drop for Received {
    fn drop(&mut self) {
        if self.weights.capacity() > 0
            && let Ok(mut spare) = SPARE.lock()
            && spare.len() < MOST_SPARE
        {
            self.weights.clear();
            spare.push(std::mem::take(&mut self.weights));
        }
    }
}

impl Received {
    /// Takes the weights `[rows, n]` of the `n` tokens from `at` on, relative to `max`.
    pub(super) fn take(&mut self, at: usize, n: usize, max: &[f32], weights: Mat<'_>) {
        if self.chunks.is_empty() {
            self.weights = SPARE.lock().ok().and_then(|mut spare| spare.pop()).unwrap_or_default();
        }
        self.chunks.push((at, n));
        self.max.extend_from_slice(max);
        (0..weights.rows).for_each(|row| self.weights.extend_from_slice(&weights.row(row)[..n]));
    }

    /// Adds to `out[token]` the attention of all rows, whose softmax over all tokens is `whole`.
    fn add_to(&self, whole: &Partial, kernels: &Kernels, out: &mut [f32]) {
        let rows = whole.rows();
        let mut weights = &self.weights[..];
        for (&(at, n), max) in self.chunks.iter().zip(self.max.chunks_exact(rows)) {
            let (own, rest) = weights.split_at(rows * n);
            weights = rest;
            let share = |(row, &max): (usize, &f32)| {
                if whole.sum[row] > 0.0 { (max - whole.max[row]).exp() / whole.sum[row] } else { 0.0 }
            };
            let shares: Vec<f32> = max.iter().enumerate().map(share).collect();
            (kernels.matmul)(Mat::new(&shares, 1, rows), Mat::new(own, rows, n), n, MatMut::new(&mut out[at..], 1, n));
        }
    }
}

/// What the tokens of one KV head received from one query of its readers.
#[derive(Debug)]
pub struct Attention {
    /// Over all tokens.
    pub whole: Partial,
    /// Of parts of them.
    pub parts: Vec<Received>,
}

impl Attention {
    /// Adds it to `out`, token by token.
    pub fn add_to(&self, kernels: &Kernels, out: &mut [f32]) {
        self.parts.iter().for_each(|part| part.add_to(&self.whole, kernels, out));
    }
}
