//! One query a head (decode): attention computed on the packed form.

#![forbid(unsafe_code)]

use super::chunks::ValueCursor;
use super::{CHUNK, Head, KeyChunk, Partial, Queries, Scratch, Weights, add_bias, cap};
use crate::kernels::Ahead;
use crate::linalg::{MappedRows, Mat, MatMut};
use crate::memory;

/// Chunks between the one that is read and the one that is asked for, where they are scattered.
const FAR: usize = 2;

/// Attention of one query for each of the `G` query heads of a KV head, over some chunks of its tokens, in their order; `scattered`
/// says whether they are short and lie apart in memory.
pub fn attend_one(
    head: &Head<'_>,
    queries: &Queries<'_>,
    chunks: &[KeyChunk<'_>],
    scattered: bool,
    scratch: &mut Scratch,
) -> Partial {
    let heads = queries.q.len() / head.key_dim;
    let q = Mat::new(&queries.q, heads, head.key_dim);
    let mut mapped = MappedRows::default();
    let mut partial = Partial::new(heads, head.value_dim);
    let mut cursor = ValueCursor::new(&head.values);
    let mut far = ValueCursor::new(&head.values);
    let mut scores = memory::zeros(heads * CHUNK);
    let (mut held, mut weighed) = (Vec::new(), Vec::with_capacity(heads));
    let [oldest, newest] = [head.positions.first(), head.positions.last()].map(Option::unwrap_or_default);
    let all_visible = queries.visible.all(0, [oldest, newest]);
    for (i, chunk) in chunks.iter().enumerate() {
        let &KeyChunk { segment, first, tokens: n, at } = chunk;
        let mut chunk_visible = all_visible;
        if !all_visible {
            head.positions.collect_into(at, n, &mut held);
            let ends = [held[0], held[n - 1]];
            if queries.visible.none(&(0..1), ends) && !queries.scores {
                continue;
            }
            chunk_visible = queries.visible.all(0, ends);
        }
        // What is wanted next comes from memory while this is computed: values behind scores, the next keys behind values.
        // The work on a short chunk takes less time than memory does.
        if let Some(next) = chunks.get(i + FAR).filter(|_| scattered) {
            Ahead::new(next.segment.bytes(next.first, next.tokens)).fetch_far();
            Ahead::new(far.next_bytes(next.at, next.tokens)).fetch_far();
        }
        let mut ahead = Ahead::new(cursor.next_bytes(at, n));
        let q = segment.map().map_or(q, |map| mapped.through(map, q));
        segment.scores(q, first, n, MatMut::new(&mut scores, heads, CHUNK), scratch, &mut ahead);
        let bias = chunk.bias();
        for (g, scores) in scores.chunks_exact_mut(CHUNK).enumerate() {
            cap(queries.softmax.softcap, &mut scores[..n]);
            add_bias(bias, &mut scores[..n]);
            if !chunk_visible {
                queries.visible.apply(queries.first_head + g, 0, &held, &mut scores[..n]);
            }
        }
        partial.weigh(0, MatMut::new(&mut scores, heads, CHUNK), n, scratch.kernels, &mut weighed);
        let mut largest_share = 0.0f32;
        for (g, &weighed) in weighed.iter().enumerate() {
            partial.take(g, weighed);
            largest_share = largest_share.max(weighed.heaviest / partial.sum[g]);
        }
        if queries.scores {
            partial.weights.take(at, n, &partial.max, Mat::new(&scores, heads, CHUNK));
        }
        let mut ahead = Ahead::new(chunks.get(i + 1).map_or(&[], |next| next.segment.bytes(next.first, next.tokens)));
        let weights = Mat::new(&scores, heads, CHUNK);
        cursor.read(at, n, |values, first, n, offset| {
            let weights = Weights { of: weights.from_column(offset), largest_share };
            values.accumulate(weights, first, n, partial.acc(values.map()), scratch, &mut ahead);
        });
    }
    partial.map_back();
    partial
}
