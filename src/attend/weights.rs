//! Attention scores of tokens, from the weights that an online softmax left behind.

#![forbid(unsafe_code)]

use std::sync::Mutex;

use super::Partial;
use crate::kernels::Kernels;
use crate::linalg::{Mat, MatMut};
use crate::memory;

/// Weights of some chunks of tokens, each relative to the largest logit when it was read.
#[derive(Clone, Debug, Default)]
pub struct TokenWeights {
    /// First token and tokens of each chunk.
    chunks: Vec<(usize, usize)>,
    /// The largest logit of every row so far, chunk by chunk.
    max: Vec<f32>,
    /// `[rows, tokens]`, chunk by chunk.
    weights: Vec<f32>,
}

/// Memory for weights that was used before: fresh memory would cost more than what is written to it.
static SPARE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Pieces of memory that are kept, as many as a step needs, heads times parts of their tokens; and how long they may be, all in
/// all.
const MOST_SPARE: usize = 64;
const MOST_SPARE_NUMBERS: usize = 1 << 20;

impl Drop for TokenWeights {
    fn drop(&mut self) {
        if self.weights.capacity() > 0
            && let Ok(mut spare) = SPARE.lock()
            && spare.len() < MOST_SPARE
            && spare.iter().map(Vec::capacity).sum::<usize>() + self.weights.capacity() <= MOST_SPARE_NUMBERS
        {
            self.weights.clear();
            spare.push(std::mem::take(&mut self.weights));
        }
    }
}

impl TokenWeights {
    /// Takes the weights `[rows, n]` of the `n` tokens from `at` on, relative to `max`.
    pub(super) fn take(&mut self, at: usize, n: usize, max: &[f32], weights: Mat<'_>) {
        if self.chunks.is_empty() {
            self.weights = SPARE.lock().ok().and_then(|mut spare| spare.pop()).unwrap_or_default();
        }
        self.chunks.push((at, n));
        memory::append(&mut self.max, max);
        (0..weights.rows).for_each(|row| memory::append(&mut self.weights, &weights.row(row)[..n]));
    }

    /// Adds to `out`, of the tokens from `first` on, the attention of all rows, whose softmax over all tokens is `whole`.
    fn add_to(&self, whole: &Partial, kernels: &Kernels, first: usize, out: &mut [f32]) {
        let rows = whole.rows();
        let mut weights = &self.weights[..];
        for (&(at, n), max) in self.chunks.iter().zip(self.max.chunks_exact(rows)) {
            let (own, rest) = weights.split_at(rows * n);
            weights = rest;
            let share = |(row, &max): (usize, &f32)| {
                if whole.sum[row] > 0.0 { (max - whole.max[row]).exp() / whole.sum[row] } else { 0.0 }
            };
            let shares: Vec<f32> = max.iter().enumerate().map(share).collect();
            let out = MatMut::new(&mut out[at - first..], 1, n);
            (kernels.matmul)(Mat::new(&shares, 1, rows), Mat::new(own, rows, n), n, out);
        }
    }
}

/// Attention scores of the tokens of one KV head, from one query of each of its query heads.
#[derive(Debug)]
pub struct Attention {
    /// Over all tokens.
    pub whole: Partial,
    /// Of parts of them, in their order.
    pub parts: Vec<TokenWeights>,
}

impl Attention {
    /// Where each part of `tokens` tokens begins, the first at 0: what is before the next one belongs to a part.
    pub fn starts(&self, tokens: usize) -> Vec<usize> {
        let mut starts = vec![tokens; self.parts.len()];
        let mut next = tokens;
        for (start, part) in starts.iter_mut().zip(&self.parts).rev() {
            next = part.chunks.first().map_or(next, |&(at, _)| at);
            *start = next;
        }
        starts.iter_mut().take(1).for_each(|first| *first = 0);
        starts
    }

    /// Adds part `part` to `out`, of the tokens from `first` on.
    pub fn add_part_to(&self, part: usize, kernels: &Kernels, first: usize, out: &mut [f32]) {
        self.parts[part].add_to(&self.whole, kernels, first, out);
    }

    /// Adds all to `out`, token by token.
    pub fn add_to(&self, kernels: &Kernels, out: &mut [f32]) {
        (0..self.parts.len()).for_each(|part| self.add_part_to(part, kernels, 0, out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_all_tokens() {
        let part =
            |chunks: &[(usize, usize)]| TokenWeights { chunks: chunks.to_vec(), max: Vec::new(), weights: Vec::new() };
        let starts = |parts: Vec<TokenWeights>| Attention { whole: Partial::new(1, 1), parts }.starts(9);
        assert_eq!(starts(vec![part(&[(2, 3)]), part(&[(5, 1), (6, 3)])]), [0, 5]);
        assert_eq!(starts(vec![part(&[(0, 4)]), part(&[]), part(&[(4, 5)]), part(&[])]), [0, 4, 4, 9]);
        assert_eq!(starts(vec![part(&[])]), [0]);
    }
}
