//! How much attention held tokens get from some queries.

#![forbid(unsafe_code)]

use super::basis::Turned;
use super::kernels::Weighed;
use super::mat::{Mat, MatMut};
use super::{CHUNK, Head, Scratch, key_chunks, tile_rows};
use crate::memory;

/// Queries whose logits are held at once.
const BLOCK: usize = 64;

/// Queries of one KV head's readers that vote for tokens.
#[derive(Clone, Copy)]
pub struct Voters<'a> {
    /// A row a query, scaled.
    pub q: Mat<'a>,
    /// Their positions: a query sees no token behind its own.
    pub positions: &'a [u32],
    /// What each vote counts.
    pub weights: &'a [f32],
    /// `s -> c tanh(s / c)` of a logit.
    pub softcap: Option<f32>,
    /// Learned logits, one a row, that take weight and add nothing.
    pub sinks: Option<&'a [f32]>,
}

/// `votes[t] += sum_q weight_q p_q[t]`, where `p_q` is the attention (softmax) of query `q` over the tokens that it sees.
pub fn add_votes(head: &Head<'_>, voters: &Voters<'_>, votes: &mut [f32], scratch: &mut Scratch) {
    let tokens = head.positions.len();
    let stride = tokens.next_multiple_of(CHUNK);
    let mut logits = memory::zeros(voters.q.rows.min(BLOCK) * stride);
    let mut tile = memory::zeros(tile_rows(head.key_dim) * CHUNK);
    for first in (0..voters.q.rows).step_by(BLOCK) {
        let rows = BLOCK.min(voters.q.rows - first);
        let logits = &mut logits[..rows * stride];
        logits.fill(0.0);
        score(head, voters.q.part(first, rows), MatMut::new(logits, rows, stride), &mut tile, scratch);
        for (row, x) in (first..).zip(logits.chunks_exact_mut(stride)) {
            let seen = head.positions.count_below(voters.positions[row] as usize + 1);
            let x = &mut x[..seen];
            if let Some(cap) = voters.softcap {
                for x in x.iter_mut() {
                    *x = cap * (*x / cap).tanh();
                }
            }
            let mut weighed = [Weighed::before(f32::NEG_INFINITY)];
            (scratch.kernels.softmax)(MatMut::new(x, 1, seen), seen, &mut weighed);
            let sink = voters.sinks.map_or(0.0, |sinks| (sinks[row] - weighed[0].max).exp());
            let factor = voters.weights[row] / (weighed[0].sum + sink);
            if factor.is_finite() {
                votes.iter_mut().zip(x).for_each(|(vote, p)| *vote += factor * *p);
            }
        }
    }
}

/// The logits of queries for all tokens; `logits` is 0 before.
fn score(head: &Head<'_>, q: Mat<'_>, mut logits: MatMut<'_>, tile: &mut [f32], scratch: &mut Scratch) {
    let mut turned = Turned::default();
    let (rows, dim) = (q.rows, head.key_dim);
    for chunk in key_chunks(&head.keys) {
        chunk.segment.tile(chunk.first, chunk.tokens, MatMut::new(tile, tile_rows(dim), CHUNK), scratch);
        let q = chunk.segment.basis().map_or(q, |basis| turned.in_basis(basis, q));
        let out = logits.from_column(chunk.at);
        debug_assert_eq!(out.rows, rows);
        (scratch.kernels.matmul)(q, Mat::new(tile, dim, CHUNK), chunk.tokens, out);
    }
}
