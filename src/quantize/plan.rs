//! What a column's method has decided from the tokens and queries that it saw.

use std::sync::Arc;

use super::unrotated::HeadGrids;
use super::{Band, KvQuant};
use crate::attend::Basis;

/// Tokens of a forward that may be taken back: what speculation appends.
const SHORT: usize = 16;

/// The least weight of a channel, as a share of the mean.
const DAMPING: f32 = 1e-4;

/// Decisions for the pages to come; pages that are sealed keep their own.
#[derive(Clone, Default)]
pub struct Plan {
    /// The KV head's number.
    pub(super) head: usize,
    /// The coordinates in which pages are stored.
    pub(super) basis: Option<Arc<Basis>>,
    /// Ranges of channels, in those coordinates, that have the same bits.
    pub(super) bands: Option<Arc<[Band]>>,
    /// Static grids of the head's channels.
    grids: Option<Arc<HeadGrids>>,
    /// Tokens of the column before the page to come.
    pub(crate) first: usize,
    /// Sums of the squares of queries, one a channel; empty before the first.
    moments: Vec<f32>,
    /// Those of each token of the last forward, if it was short: tokens that are taken back take theirs along.
    recent: Vec<f32>,
    /// Tokens sealed with any plan.
    pub(super) sealed: usize,
    /// Tokens after which bands are chosen again.
    pub(super) renewal: usize,
}

impl Plan {
    /// Nothing is decided yet for KV head number `head`.
    pub fn new(head: usize) -> Self {
        Self { head, ..Self::default() }
    }

    /// Takes the queries of a forward into account: `squares(token, sums)` adds the squares of the queries of `token`, of all
    /// the column's readers, to `sums`.
    pub fn observe(&mut self, tokens: usize, dim: usize, mut squares: impl FnMut(usize, &mut [f32])) {
        self.moments.resize(dim, 0.0);
        for recent in self.recent.chunks_exact(dim) {
            for (moment, square) in self.moments.iter_mut().zip(recent) {
                *moment += square;
            }
        }
        self.recent = Vec::new();
        if tokens <= SHORT {
            self.recent = vec![0.0; tokens * dim];
            self.recent.chunks_exact_mut(dim).enumerate().for_each(|(t, sums)| squares(t, sums));
        } else {
            (0..tokens).for_each(|t| squares(t, &mut self.moments));
        }
    }

    /// Forgets the queries of the `n` newest tokens, as far as they are known apart.
    pub fn forget(&mut self, n: usize) {
        self.recent.truncate(self.recent.len().saturating_sub(n * self.moments.len()));
    }

    /// What an error in each of `dim` channels weighs: the sum of the squares of the queries that met it, and a little, for
    /// those to come; 1 when no query was seen that reads anything.
    pub(super) fn weights(&self, dim: usize) -> Vec<f32> {
        let mut weights = self.moments.clone();
        for recent in self.recent.chunks_exact(dim) {
            for (weight, square) in weights.iter_mut().zip(recent) {
                *weight += square;
            }
        }
        let mean = weights.iter().sum::<f32>() / dim as f32;
        if mean > 0.0 && mean.is_finite() {
            for weight in &mut weights {
                *weight += DAMPING * mean;
            }
            weights
        } else {
            vec![1.0; dim]
        }
    }

    /// The stored coordinates: `make`s them at the first call.
    pub(super) fn basis(&mut self, make: impl FnOnce() -> Basis) -> Arc<Basis> {
        Arc::clone(self.basis.get_or_insert_with(|| Arc::new(make())))
    }

    /// The bands: `make`s them at the first call.
    pub(super) fn bands(&mut self, make: impl FnOnce() -> Vec<Band>) -> Arc<[Band]> {
        Arc::clone(self.bands.get_or_insert_with(|| make().into()))
    }

    /// The grids of the head's channels: made at the first call.
    pub(super) fn head_grids(&mut self, kvquant: &Arc<KvQuant>) -> Arc<HeadGrids> {
        Arc::clone(self.grids.get_or_insert_with(|| Arc::new(HeadGrids::new(kvquant, self.head))))
    }

    /// Bytes allocated for the plan.
    pub fn bytes(&self) -> usize {
        (self.moments.capacity() + self.recent.capacity()) * size_of::<f32>()
            + self.basis.as_ref().map_or(0, |basis| basis.bytes())
            + self.grids.as_ref().map_or(0, |grids| grids.bytes())
            + self.bands.as_ref().map_or(0, |bands| size_of_val(&**bands))
    }
}
