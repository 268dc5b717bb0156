//! How much attention held tokens get from some queries.

#![forbid(unsafe_code)]

use super::{
    CHUNK, Head, KeyChunk, Partial, Scratch, SinkLogits, Softmax, Summary, SummaryQueries, add_bias, cap, key_chunks,
};
use crate::format::tile_rows;
use crate::kernels::{Kernels, Weighed};
use crate::linalg::{MappedRows, Mat, MatMut};
use crate::memory;

/// Queries whose logits are held at once.
const BLOCK: usize = 64;

/// Queries of one KV head's query heads that score tokens.
#[derive(Clone, Copy)]
pub struct ScoringQueries<'a> {
    /// A row a query, scaled: token by token, for each its query heads.
    pub q: Mat<'a>,
    /// Their positions: a query sees no token behind its own.
    pub positions: &'a [u32],
    /// What the attention of each counts.
    pub weights: &'a [f32],
    /// `s -> c tanh(s / c)` of a logit.
    pub softcap: Option<f32>,
    /// Query heads.
    pub heads: usize,
}

/// `scores[t] += sum_q weight_q p_q[t]`, where `p_q` is the attention (softmax) of query `q` over the tokens that it sees, and
/// over `sink_logits` and what stands for tokens that left.
pub fn add_scores(
    head: &Head<'_>,
    sink_logits: Option<&[f32]>,
    queries: &ScoringQueries<'_>,
    scores: &mut [f32],
    scratch: &mut Scratch,
) {
    let tokens = head.positions.len();
    if tokens == 0 {
        return;
    }
    let stride = tokens.next_multiple_of(CHUNK);
    let mut logits = memory::zeros(queries.q.rows.min(BLOCK) * stride);
    let mut tile = memory::zeros(tile_rows(head.key_dim) * CHUNK);
    let chunks = key_chunks(&head.keys);
    let sinks = sink_logits.map(SinkLogits);
    let summaries: Vec<&dyn Summary> = sinks.iter().map(|sinks| sinks as _).chain(head.summary).collect();
    let biases: Vec<_> = chunks.iter().filter_map(|chunk| Some((chunk.at, chunk.bias()?))).collect();
    for first in (0..queries.q.rows).step_by(BLOCK) {
        let rows = BLOCK.min(queries.q.rows - first);
        let logits = &mut logits[..rows * stride];
        logits.fill(0.0);
        add_logits(&chunks, queries.q.part(first, rows), MatMut::new(logits, rows, stride), &mut tile, scratch);
        for (row, x) in (first..).zip(logits.chunks_exact_mut(stride)) {
            let seen = head.positions.count_below(queries.positions[row] as usize + 1);
            let x = &mut x[..seen];
            cap(queries.softcap, x);
            for &(at, bias) in biases.iter().take_while(|&&(at, _)| at < seen) {
                add_bias(Some(bias), &mut x[at..]);
            }
            let mut weighed = [Weighed::before(f32::NEG_INFINITY)];
            (scratch.kernels.softmax)(MatMut::new(x, 1, seen), seen, &mut weighed);
            let beside = beside(&summaries, queries, row, head.value_dim, weighed[0].max, scratch.kernels);
            let factor = queries.weights[row] / (weighed[0].sum + beside);
            if factor.is_finite() {
                scores.iter_mut().zip(x).for_each(|(score, p)| *score += factor * *p);
            }
        }
    }
}

/// The weight that summaries take from query `row`, relative to the logit `max`.
fn beside(
    summaries: &[&dyn Summary],
    queries: &ScoringQueries<'_>,
    row: usize,
    value_dim: usize,
    max: f32,
    kernels: &Kernels,
) -> f32 {
    if summaries.is_empty() {
        return 0.0;
    }
    let mut partial = Partial::new(1, value_dim);
    let own = SummaryQueries {
        q: queries.q.part(row, 1),
        softmax: Softmax { scaling: 1.0, softcap: queries.softcap },
        each: 1,
        first_head: row % queries.heads,
        kernels,
    };
    for summary in summaries {
        summary.add_to(&own, &mut partial);
    }
    partial.sum[0] * (partial.max[0] - max).exp()
}

/// Adds the logits of queries for the tokens of all chunks.
fn add_logits(chunks: &[KeyChunk<'_>], q: Mat<'_>, mut logits: MatMut<'_>, tile: &mut [f32], scratch: &mut Scratch) {
    let mut mapped = MappedRows::default();
    for chunk in chunks {
        let q = chunk.segment.map().map_or(q, |map| mapped.through(map, q));
        let rows = tile_rows(q.stride);
        chunk.segment.tile(chunk.first, chunk.tokens, MatMut::new(tile, rows, CHUNK), scratch);
        (scratch.kernels.matmul)(q, Mat::new(tile, q.stride, CHUNK), chunk.tokens, logits.from_column(chunk.at));
    }
}
