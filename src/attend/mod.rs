//! Reading: attention of some queries over the tokens that one KV head holds, in whatever form.
//!
//! The one idea is the segment: keys of consecutive tokens that can give their logits, and values of
//! consecutive tokens that can add their weighted sum. Results over parts of the tokens are [`Partial`]s and
//! merge by log-sum-exp, so that heads, ranges of tokens and threads split freely (flash-decoding,
//! Dao et al. 2023, with the online softmax of Milakov and Gimelshein 2018).

mod basis;
pub mod codes;
mod decode;
pub mod folded;
pub mod kernels;
mod many;
pub mod mat;
pub mod packed;
mod partial;
mod positions;
mod quest;
mod received;
mod rope;
mod visibility;
mod votes;

pub use basis::Basis;
pub use decode::attend_one;
pub use many::attend_many;
pub use partial::Partial;
pub use positions::Positions;
pub use quest::{Bounds, BoundsMark, Quest};
pub use received::{Attention, Received};
pub use rope::{Rope, SPAN};
pub use visibility::{Mask, MaskData, Visibility};
pub use votes::{Voters, add_votes};

use std::ops::Range;
use std::sync::Arc;

use folded::Folded;
use kernels::{Ahead, Kernels};
use mat::{Mat, MatMut};

use crate::memory;

/// Tokens that are scored at once: one softmax step, small enough for the first cache levels.
pub const CHUNK: usize = 256;

/// What rounding queries to integers may add to a logit (root mean square). It changes weights by as much, and outputs, which
/// are averages, by less: below 1e-4 of the largest.
pub const KEY_TOLERANCE: f32 = 4e-5;

/// Weights of a page are rounded to integers relative to its heaviest token, which moves the output by about
/// `3e-5 share` of the values' range. That is nothing, unless a token has so large a share of all weight.
const LARGE_SHARE: f32 = 0.02;

/// The kernels in use, and buffers that segments may need while they are read.
pub struct Scratch {
    /// The inner loops.
    pub kernels: &'static Kernels,
    /// Queries or weights with a page's scales folded in.
    pub folded: Folded,
    /// Codes as f32.
    pub buffer: Vec<f32>,
    /// Numbers that are kept beside codes.
    pub outliers: Vec<f32>,
}

impl Scratch {
    /// Empty buffers.
    pub fn new(kernels: &'static Kernels) -> Self {
        Self { kernels, folded: Folded::default(), buffer: Vec::new(), outliers: Vec::new() }
    }
}

/// Keys of consecutive tokens of one KV head.
pub trait KeySegment: Sync {
    /// Reads start at multiples of this many tokens.
    fn unit(&self) -> usize;

    /// The bytes that a read of `n` tokens from `first` on will want, to be fetched ahead.
    fn bytes(&self, first: usize, n: usize) -> &[u8];

    /// The coordinates of the keys, in which [`Self::scores`] wants its queries; `None` when they are the model's.
    fn basis(&self) -> Option<&Arc<Basis>> {
        None
    }

    /// Logits before scaling: `out[g, t] = q_g . k_(first + t)` for `t < n`; `q` is `[G, dim]`, `out` has room for `n`
    /// rounded up to a whole unit. Meanwhile `ahead` is fetched.
    fn scores(&self, q: Mat<'_>, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch, ahead: &mut Ahead<'_>);

    /// The keys as f32, in their coordinates, transposed: `out[c, t] = k_(first + t)[c]`; `out` has [`tile_rows`] of the dim rows, and columns for
    /// `n` rounded up to whole units.
    fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch);
}

/// Weights of tokens, not yet divided by their sum.
#[derive(Clone, Copy)]
pub struct Weights<'a> {
    /// A row a query head.
    pub of: Mat<'a>,
    /// The largest share of all weight so far that one of them has.
    pub largest_share: f32,
}

impl Weights<'_> {
    /// The error that rounding them to integers may add to a sum ([`packed::Packed::tolerance`]).
    pub fn tolerance(&self) -> f32 {
        if self.largest_share > LARGE_SHARE { 0.0 } else { f32::INFINITY }
    }
}

/// Values of consecutive tokens of one KV head.
pub trait ValueSegment: Sync {
    /// The bytes that a read of `n` tokens from `first` on will want, to be fetched ahead.
    fn bytes(&self, first: usize, n: usize) -> &[u8];

    /// The coordinates of the values, in which [`Self::accumulate`] adds; `None` when they are the model's.
    fn basis(&self) -> Option<&Arc<Basis>> {
        None
    }

    /// `acc[g, c] += sum_t w[g, t] v_(first + t)[c]` for `t < n` and the weights `w`; `acc` has room for the dim
    /// rounded up to a multiple of 8. Meanwhile `ahead` is fetched.
    fn accumulate(
        &self,
        weights: Weights<'_>,
        first: usize,
        n: usize,
        acc: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    );

    /// The values as f32, in their coordinates: `out[t, c] = v_(first + t)[c]`; `out` has room for the dim rounded up to a multiple of 8.
    fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch);
}

/// The first `tokens` tokens of a segment.
#[derive(Clone, Copy)]
pub struct Part<'a, S: ?Sized> {
    /// The segment.
    pub segment: &'a S,
    /// Tokens of it to read.
    pub tokens: usize,
}

/// All that one KV head holds, oldest token first; keys and values may be cut into segments differently.
pub struct Head<'a> {
    /// Keys.
    pub keys: Vec<Part<'a, dyn KeySegment>>,
    /// Values of the same tokens.
    pub values: Vec<Part<'a, dyn ValueSegment>>,
    /// Their positions.
    pub positions: &'a Positions,
    /// Numbers of a key.
    pub key_dim: usize,
    /// Numbers of a value.
    pub value_dim: usize,
}

/// Queries of one KV head's query heads.
pub struct Queries<'a> {
    /// `[G, queries, key_dim]`, scaled.
    pub q: Vec<f32>,
    /// Which of the forward's queries these are.
    pub range: std::ops::Range<usize>,
    /// The first of the `G` query heads.
    pub first_head: usize,
    /// How logits become weights.
    pub softmax: Softmax,
    /// Which positions they see.
    pub visible: Visibility<'a>,
    /// Whether one query's attention is wanted token by token too.
    pub received: bool,
}

/// How logits become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Softmax {
    /// Factor of the logits.
    pub scaling: f32,
    /// `s -> c tanh(s / c)` after scaling.
    pub softcap: Option<f32>,
}

impl Softmax {
    /// Caps scaled logits.
    fn cap(&self, scores: &mut [f32]) {
        if let Some(cap) = self.softcap {
            for s in scores {
                *s = cap * (*s / cap).tanh();
            }
        }
    }
}

/// `n` rounded up to a multiple of eight lanes.
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(codes::LANES)
}

/// Rows of a tile of keys of `dim` numbers: whole blocks of codes.
pub fn tile_rows(dim: usize) -> usize {
    dim.next_multiple_of(codes::MOST_OUTER)
}

/// Walks the value segments in step with ranges of tokens that only grow.
#[derive(Clone)]
struct ValueCursor<'a> {
    values: &'a [Part<'a, dyn ValueSegment>],
    part: usize,
    /// The first token of that part.
    base: usize,
}

impl<'a> ValueCursor<'a> {
    fn new(values: &'a [Part<'a, dyn ValueSegment>]) -> Self {
        Self { values, part: 0, base: 0 }
    }

    /// The bytes of the first segment that `read` would come to.
    fn next_bytes(&mut self, start: usize, n: usize) -> &'a [u8] {
        while start - self.base >= self.values[self.part].tokens {
            self.base += self.values[self.part].tokens;
            self.part += 1;
        }
        let (part, first) = (&self.values[self.part], start - self.base);
        part.segment.bytes(first, n.min(part.tokens - first))
    }

    /// Calls `read(segment, first token in it, tokens, offset from `start`)` for the pieces of `start .. start + n`.
    fn read(&mut self, start: usize, n: usize, mut read: impl FnMut(&dyn ValueSegment, usize, usize, usize)) {
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
        let step = CHUNK / segment.unit() * segment.unit();
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
