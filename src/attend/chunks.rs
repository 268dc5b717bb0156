//! Segments cut into chunks that are read at once, and all that is held as f32.

#![forbid(unsafe_code)]

use std::ops::Range;

use super::segment::{Head, KeySegment, Part, Scratch, ValueSegment};
use crate::format::{padded, tile_rows};
use crate::linalg::MatMut;
use crate::memory;

/// Tokens that are scored at once: one softmax step, small enough for the first cache levels.
pub const CHUNK: usize = 256;

/// Walks the value segments in step with ranges of tokens that only grow.
#[derive(Clone)]
pub(super) struct ValueCursor<'a> {
    values: &'a [Part<'a, dyn ValueSegment>],
    part: usize,
    /// The first token of that part.
    base: usize,
}

impl<'a> ValueCursor<'a> {
    pub(super) fn new(values: &'a [Part<'a, dyn ValueSegment>]) -> Self {
        Self { values, part: 0, base: 0 }
    }

    /// The bytes of the first segment that `read` would come to.
    pub(super) fn next_bytes(&mut self, start: usize, n: usize) -> &'a [u8] {
        while start - self.base >= self.values[self.part].tokens {
            self.base += self.values[self.part].tokens;
            self.part += 1;
        }
        let (part, first) = (&self.values[self.part], start - self.base);
        part.segment.bytes(first, n.min(part.tokens - first))
    }

    /// Calls `read(segment, first token in it, tokens, offset from `start`)` for the pieces of `start .. start + n`.
    pub(super) fn read(
        &mut self,
        start: usize,
        n: usize,
        mut read: impl FnMut(&'a dyn ValueSegment, usize, usize, usize),
    ) {
        let mut done = 0;
        while done < n {
            let part = &self.values[self.part];
            let first = start + done - self.base;
            if first >= part.tokens {
                self.base += part.tokens;
                self.part += 1;
                continue;
            }
            let take = (n - done).min(part.tokens - first);
            read(part.segment, first, take, done);
            done += take;
        }
    }
}

/// Some consecutive keys of a segment.
#[derive(Clone, Copy)]
pub struct KeyChunk<'a> {
    /// The segment.
    pub segment: &'a dyn KeySegment,
    /// First token in the segment.
    pub first: usize,
    /// Tokens, at most [`CHUNK`].
    pub tokens: usize,
    /// First token in the head.
    pub at: usize,
}

impl<'a> KeyChunk<'a> {
    /// What is added to the tokens' logits.
    pub fn bias(&self) -> Option<&'a [f32]> {
        self.segment.bias(self.first, self.tokens)
    }
}

/// Those of consecutive chunks that begin in `tokens`, a range of all that are in them.
pub fn chunks_in<'c, 'a>(chunks: &'c [KeyChunk<'a>], tokens: &Range<usize>) -> &'c [KeyChunk<'a>] {
    let (mut first, mut end, mut start) = (0, 0, 0);
    for chunk in chunks {
        first += usize::from(start < tokens.start);
        end += usize::from(start < tokens.end);
        start += chunk.tokens;
    }
    &chunks[first..end]
}

/// All keys, cut into chunks.
pub fn key_chunks<'a>(keys: &[Part<'a, dyn KeySegment>]) -> Vec<KeyChunk<'a>> {
    let mut chunks = memory::with_capacity(2 * keys.len());
    let mut base = 0;
    for &Part { segment, tokens } in keys {
        let step = CHUNK / segment.granularity() * segment.granularity();
        let firsts = (0..tokens).step_by(step);
        chunks.extend(firsts.map(|first| KeyChunk {
            segment,
            first,
            tokens: step.min(tokens - first),
            at: base + first,
        }));
        base += tokens;
    }
    chunks
}

impl Head<'_> {
    /// Calls `see(token, key)` for all that is held, dequantised, in the head's coordinates.
    pub fn each_key(&self, scratch: &mut Scratch, mut see: impl FnMut(usize, &[f32])) {
        let dim = self.key_dim;
        let mut tile = memory::zeros(tile_rows(dim) * CHUNK);
        let (mut stored, mut key) = (memory::zeros(dim), memory::zeros(dim));
        for chunk in key_chunks(&self.keys) {
            let map = chunk.segment.map();
            let stored = &mut stored[..map.map_or(dim, |map| map.dim(dim))];
            let rows = tile_rows(stored.len());
            chunk.segment.tile(chunk.first, chunk.tokens, MatMut::new(&mut tile, rows, CHUNK), scratch);
            for t in 0..chunk.tokens {
                stored.iter_mut().zip(tile.chunks_exact(CHUNK)).for_each(|(x, row)| *x = row[t]);
                if let Some(map) = map {
                    map.undo(stored, &mut key);
                    see(chunk.at + t, &key);
                } else {
                    see(chunk.at + t, stored);
                }
            }
        }
    }

    /// Calls `see(token, value)` for all that is held, dequantised, in the head's coordinates.
    pub fn each_value(&self, scratch: &mut Scratch, mut see: impl FnMut(usize, &[f32])) {
        let dim = self.value_dim;
        let mut tile = memory::zeros(padded(dim) * CHUNK);
        let mut value = memory::zeros(dim);
        let mut base = 0;
        for part in &self.values {
            let map = part.segment.map();
            let stored = map.map_or(dim, |map| map.dim(dim));
            let stride = padded(stored);
            for first in (0..part.tokens).step_by(CHUNK) {
                let n = CHUNK.min(part.tokens - first);
                part.segment.tile(first, n, MatMut::new(&mut tile, n, stride), scratch);
                for (t, row) in tile.chunks_exact(stride).take(n).enumerate() {
                    if let Some(map) = map {
                        map.undo(&row[..stored], &mut value);
                        see(base + first + t, &value);
                    } else {
                        see(base + first + t, &row[..dim]);
                    }
                }
            }
            base += part.tokens;
        }
    }
}
