//! Many queries a head (chunked prefill, multi-turn, assisted decoding): every chunk of tokens is decoded
//! once into a tile of f32 and used by all queries.

use super::kernels::Matmul;
use super::{CHUNK, Head, Partial, Scratch, Softmax, ValueCursor, Visibility, key_chunks, padded};

/// Query rows that share one block of scores.
const QUERY_BLOCK: usize = 64;

/// Attention of `queries` queries for each of the `G` query heads of one KV head over all its tokens.
///
/// `q` is `[G, queries, key_dim]`, not yet scaled, the queries being numbers `first_query ..` of the forward;
/// rows of the result are in the same order.
#[allow(clippy::too_many_arguments)]
pub fn attend_many(
    head: &Head<'_>,
    q: &[f32],
    queries: usize,
    first_query: usize,
    softmax: Softmax,
    visible: &Visibility<'_>,
    first_head: usize,
    positions: &dyn Fn(usize, usize, &mut Vec<u32>),
    scratch: &mut Scratch,
) -> Partial {
    let (dk, dv) = (head.key_dim, head.value_dim);
    let rows = q.len() / dk;
    let q: Vec<f32> = q.iter().map(|x| x * softmax.scaling).collect();
    let mut partial = Partial::new(rows, dv);
    let stride = partial.stride;
    let mut cursor = ValueCursor::new(&head.values);
    let mut key_tile = vec![0.0; padded(dk) * CHUNK];
    let mut value_tile = vec![0.0; CHUNK * stride];
    let mut scores = vec![0.0; QUERY_BLOCK * CHUNK];
    let mut held = Vec::new();
    key_chunks(&head.keys, |segment, first, n, at| {
        held.clear();
        positions(at, n, &mut held);
        let (oldest, newest) = (held[0], held[n - 1]);
        if visible.none(first_query + queries - 1, oldest) {
            return;
        }
        segment.tile(first, n, &mut key_tile, CHUNK, scratch);
        cursor.read(at, n, |values, first, n, offset| {
            values.tile(first, n, &mut value_tile[offset * stride..], stride, scratch);
        });
        for block in (0..rows).step_by(QUERY_BLOCK) {
            let m = QUERY_BLOCK.min(rows - block);
            scores[..m * CHUNK].fill(0.0);
            (scratch.kernels.matmul)(Matmul {
                m,
                k: dk,
                n,
                a: (&q[block * dk..], dk),
                b: (&key_tile, CHUNK),
                c: (&mut scores, CHUNK),
            });
            for row in block..block + m {
                let (g, i) = (row / queries, first_query + row % queries);
                let scores = &mut scores[(row - block) * CHUNK..][..n];
                softmax.cap(scores);
                if !visible.all(i, newest) {
                    visible.apply(first_head + g, i, &held, scores);
                }
                partial.weigh(row, scores, scratch.kernels);
            }
            (scratch.kernels.matmul)(Matmul {
                m,
                k: n,
                n: dv,
                a: (&scores, CHUNK),
                b: (&value_tile, stride),
                c: (&mut partial.acc[block * stride..], stride),
            });
        }
    });
    partial
}
