//! Many queries a head (chunked prefill, multi-turn, assisted decoding): every chunk of tokens is decoded
//! once into a tile of f32 and used by all queries.

#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use super::chunks::ValueCursor;
use super::{CHUNK, Head, KeyChunk, Partial, Queries, Scratch, add_bias, cap, key_chunks};
use crate::format::tile_rows;
use crate::linalg::{Map, MappedRows, Mat, MatMut};
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
    let (mut mapped, mut pieces) = (MappedRows::default(), Pieces::default());
    let (mut held, mut weighed) = (Vec::new(), Vec::new());
    for chunk in key_chunks(&head.keys) {
        let KeyChunk { segment, first, tokens: n, at } = chunk;
        if !tokens.contains(&at) {
            continue;
        }
        head.positions.collect_into(at, n, &mut held);
        if queries.visible.none(&queries.range, [held[0], held[n - 1]]) {
            continue;
        }
        let q = Mat::new(&queries.q, rows, dk);
        let q = segment.map().map_or(q, |map| mapped.through(map, q));
        let stored = q.stride;
        segment.tile(first, n, MatMut::new(&mut key_tile, tile_rows(stored), CHUNK), scratch);
        pieces.clear();
        cursor.read(at, n, |values, first, n, offset| {
            add_piece(&mut pieces, values.map(), offset..offset + n);
            values.tile(first, n, MatMut::new(&mut value_tile[offset * stride..], n, stride), scratch);
        });
        for block in (0..rows).step_by(QUERY_BLOCK) {
            let m = QUERY_BLOCK.min(rows - block);
            scores[..m * CHUNK].fill(0.0);
            let keys = Mat::new(&key_tile, stored, CHUNK);
            (scratch.kernels.matmul)(q.part(block, m), keys, n, MatMut::new(&mut scores, m, CHUNK));
            for (scores, row) in scores.chunks_exact_mut(CHUNK).zip(block..block + m) {
                adjust(queries, row, &held, chunk.bias(), &mut scores[..n]);
            }
            partial.weigh(block, MatMut::new(&mut scores, m, CHUNK), n, scratch.kernels, &mut weighed);
            for (row, &weighed) in (block..).zip(&weighed) {
                partial.take(row, weighed);
            }
            for (tokens, map) in &pieces {
                let weights = Mat::new(&scores, m, CHUNK).from_column(tokens.start);
                let values = Mat::new(&value_tile[tokens.start * stride..], tokens.len(), stride);
                let stored = map.map_or(dv, |map| map.dim(dv));
                (scratch.kernels.matmul)(weights, values, stored, partial.acc(*map).part(block, m));
            }
        }
    }
    partial.map_back();
    partial
}

/// Tokens of a chunk whose values have the same coordinates, and which.
type Pieces<'a> = Vec<(Range<usize>, Option<&'a Arc<Map>>)>;

/// Adds tokens that follow the last ones.
fn add_piece<'a>(pieces: &mut Pieces<'a>, map: Option<&'a Arc<Map>>, tokens: Range<usize>) {
    match pieces.last_mut() {
        Some((last, held)) if held.map(Arc::as_ptr) == map.map(Arc::as_ptr) => last.end = tokens.end,
        _ => pieces.push((tokens, map)),
    }
}

/// Caps the logits of row `row` for the tokens at positions `held`, adds their bias, and hides what it may not see.
fn adjust(queries: &Queries<'_>, row: usize, held: &[u32], bias: Option<&[f32]>, scores: &mut [f32]) {
    let (g, i) = (row / queries.range.len(), queries.range.start + row % queries.range.len());
    cap(queries.softmax.softcap, scores);
    add_bias(bias, scores);
    if !queries.visible.all(i, [held[0], held[held.len() - 1]]) {
        queries.visible.apply(queries.first_head + g, i, held, scores);
    }
}
