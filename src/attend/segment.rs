//! Segments: consecutive tokens of one KV head, in whatever form.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Positions, Summary};
use crate::format::Folded;
use crate::kernels::{Ahead, Kernels};
use crate::linalg::{Map, Mat, MatMut};

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
    fn granularity(&self) -> usize;

    /// The bytes that a read of `n` tokens from `first` on will want, to be fetched ahead.
    fn bytes(&self, first: usize, n: usize) -> &[u8];

    /// What leads to the coordinates of the keys, in which [`Self::scores`] wants its queries; `None` when they are the head's.
    fn map(&self) -> Option<&Arc<Map>> {
        None
    }

    /// What is added to the capped logits of `n` tokens from `first` on, as the logarithm of how many tokens each stands for;
    /// `None`: nothing.
    fn bias(&self, _first: usize, _n: usize) -> Option<&[f32]> {
        None
    }

    /// Logits before scaling: `out[g, t] = q_g . k_(first + t)` for `t < n`; `q` is `[G, dim]`, `out` has room for `n`
    /// rounded up to whole [granules](Self::granularity). Meanwhile `ahead` is fetched.
    fn scores(&self, q: Mat<'_>, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch, ahead: &mut Ahead<'_>);

    /// The keys as f32, in their coordinates, transposed: `out[c, t] = k_(first + t)[c]`; `out` has [`crate::format::tile_rows`] of the
    /// dim rows, and columns for `n` rounded up to whole granules.
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
    /// The error that rounding them to integers may add to a sum ([`crate::format::Packed::tolerance`]).
    pub fn tolerance(&self) -> f32 {
        if self.largest_share > LARGE_SHARE { 0.0 } else { f32::INFINITY }
    }
}

/// Values of consecutive tokens of one KV head.
pub trait ValueSegment: Sync {
    /// The bytes that a read of `n` tokens from `first` on will want, to be fetched ahead.
    fn bytes(&self, first: usize, n: usize) -> &[u8];

    /// What leads to the coordinates of the values, in which [`Self::accumulate`] adds; `None` when they are the head's.
    fn map(&self) -> Option<&Arc<Map>> {
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
    /// Numbers of a key, in the head's coordinates.
    pub key_dim: usize,
    /// Numbers of a value, in the head's coordinates.
    pub value_dim: usize,
    /// What stands for tokens that left.
    pub summary: Option<&'a dyn Summary>,
}
