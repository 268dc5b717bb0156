//! Many queries a head (chunked prefill, multi-turn, assisted decoding): every chunk of tokens is decoded
//! once into a tile of f32 and used by all queries.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use super::basis::Turned;
use super::mat::{Mat, MatMut};
use super::{Basis, CHUNK, Head, KeyChunk, Partial, Queries, Scratch, ValueCursor, key_chunks, tile_rows};
use crate::memory;

/// Query rows that share one block of scores.
const QUERY_BLOCK: usize = 64;

/// Attention of some queries for each of the `G` query heads of a KV head, over the chunks of its tokens that start in
/// `tokens`; rows of the result are `[G, queries]`.
pub fn attend_many(head: &Head<'_>, queries: &Queries<'_>, tokens: Range<usize>, scratch: &mut Scratch) -> Partial {
    let (dk, dv) = (head.key_dim, head.value_dim);
    let rows = queries.q.len() / dk;
    let mut partial = Partial::new(rows, dv);
    let stride = partial.stride;
    let mut cursor = ValueCursor::new(&head.values);
    let mut key_tile = memory::zeros(tile_rows(dk) * CHUNK);
    let mut value_tile = memory::zeros(CHUNK * stride);
    let mut scores = memory::zeros(QUERY_BLOCK * CHUNK);
    let (mut turned, mut pieces) = (Turned::default(), Pieces::default());
    let (mut held, mut weighed) = (Vec::new(), Vec::new());
    for KeyChunk { segment, first, tokens: n, at } in key_chunks(&head.keys) {
        if !tokens.contains(&at) {
            continue;
        }
        head.positions.collect_into(at, n, &mut held);
        if queries.visible.none(queries.range.end - 1, held[0]) {
            continue;
        }
        segment.tile(first, n, MatMut::new(&mut key_tile, tile_rows(dk), CHUNK), scratch);
        let q = Mat::new(&queries.q, rows, dk);
        let q = segment.basis().map_or(q, |basis| turned.in_basis(basis, q));
        pieces.clear();
        cursor.read(at, n, |values, first, n, offset| {
            add_piece(&mut pieces, values.basis(), offset..offset + n);
            values.tile(first, n, MatMut::new(&mut value_tile[offset * stride..], n, stride), scratch);
        });
        for block in (0..rows).step_by(QUERY_BLOCK) {
            let m = QUERY_BLOCK.min(rows - block);
            scores[..m * CHUNK].fill(0.0);
            let keys = Mat::new(&key_tile, dk, CHUNK);
            (scratch.kernels.matmul)(q.part(block, m), keys, n, MatMut::new(&mut scores, m, CHUNK));
            for (scores, row) in scores.chunks_exact_mut(CHUNK).zip(block..block + m) {
                adjust(queries, row, &held, &mut scores[..n]);
            }
            partial.weigh(block, MatMut::new(&mut scores, m, CHUNK), n, scratch.kernels, &mut weighed);
            for (row, &weighed) in (block..).zip(&weighed) {
                partial.take(row, weighed);
            }
            for (tokens, basis) in &pieces {
                let weights = Mat::new(&scores, m, CHUNK).from_column(tokens.start);
                let values = Mat::new(&value_tile[tokens.start * stride..], tokens.len(), stride);
                (scratch.kernels.matmul)(weights, values, dv, partial.acc(basis.as_ref()).part(block, m));
            }
        }
    }
    partial.turn_back();
    partial
}

/// Tokens of a chunk whose values have the same coordinates, and which.
type Pieces = Vec<(Range<usize>, Option<Arc<Basis>>)>;

/// Adds tokens that follow the last ones.
fn add_piece(pieces: &mut Pieces, basis: Option<&Arc<Basis>>, tokens: Range<usize>) {
    match pieces.last_mut() {
        Some((last, held)) if held.as_ref().map(Arc::as_ptr) == basis.map(Arc::as_ptr) => last.end = tokens.end,
        _ => pieces.push((tokens, basis.cloned())),
    }
}

/// Caps the logits of row `row` for the tokens at positions `held`, and hides what it may not see.
fn adjust(queries: &Queries<'_>, row: usize, held: &[u32], scores: &mut [f32]) {
    let (g, i) = (row / queries.range.len(), queries.range.start + row % queries.range.len());
    queries.softmax.cap(scores);
    if !queries.visible.all(i, held[held.len() - 1]) {
        queries.visible.apply(queries.first_head + g, i, held, scores);
    }
}
