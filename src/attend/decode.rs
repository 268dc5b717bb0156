//! One query a head (decode): attention computed on the packed form.

use std::ops::Range;

use super::{CHUNK, Head, Partial, Scratch, Softmax, ValueCursor, Visibility, key_chunks};

/// Attention of the `G` query heads of one KV head over its tokens in `range` (multiples of chunks that
/// [`Head`] is read in; anything that starts outside is left to others).
///
/// `q` is `[G, key_dim]`, not yet scaled; `first_head` is the index of the first of these query heads;
/// `positions(first, n, out)` gives the positions of held tokens.
#[allow(clippy::too_many_arguments)]
pub fn attend_one(
    head: &Head<'_>,
    q: &[f32],
    softmax: Softmax,
    visible: &Visibility<'_>,
    first_head: usize,
    last_position: u32,
    positions: &dyn Fn(usize, usize, &mut Vec<u32>),
    range: Range<usize>,
    scratch: &mut Scratch,
) -> Partial {
    let heads = q.len() / head.key_dim;
    let q: Vec<f32> = q.iter().map(|x| x * softmax.scaling).collect();
    let mut partial = Partial::new(heads, head.value_dim);
    let mut cursor = ValueCursor::new(&head.values);
    let mut scores = vec![0.0; heads * CHUNK];
    let mut held = Vec::new();
    let all_visible = visible.all(0, last_position);
    key_chunks(&head.keys, |segment, first, n, at| {
        if !range.contains(&at) {
            return;
        }
        segment.scores(&q, first, n, &mut scores, CHUNK, scratch);
        if !all_visible {
            held.clear();
            positions(at, n, &mut held);
        }
        for g in 0..heads {
            let scores = &mut scores[g * CHUNK..][..n];
            softmax.cap(scores);
            if !all_visible {
                visible.apply(first_head + g, 0, &held, scores);
            }
            partial.weigh(g, scores, scratch.kernels);
        }
        let stride = partial.stride;
        cursor.read(at, n, |values, first, n, offset| {
            values.accumulate(&scores[offset..], CHUNK, first, n, &mut partial.acc, stride, scratch);
        });
    });
    partial
}
