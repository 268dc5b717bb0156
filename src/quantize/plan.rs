//! What a column's method has decided from the tokens and queries that it saw.

use std::sync::Arc;

use super::Band;
use crate::attend::Basis;

/// Decisions for the pages to come; pages that are sealed keep their own.
#[derive(Clone, Default)]
pub struct Plan {
    /// The coordinates in which pages are stored.
    pub(super) basis: Option<Arc<Basis>>,
    /// Ranges of channels, in those coordinates, that have the same bits.
    pub(super) bands: Option<Arc<[Band]>>,
    /// Sums of the squares of queries, one a channel; empty before the first.
    moments: Vec<f32>,
    /// Tokens sealed with any plan.
    pub(super) sealed: usize,
    /// Tokens after which bands are chosen again.
    pub(super) renewal: usize,
}

impl Plan {
    /// Takes a query of the column's readers into account.
    pub fn observe(&mut self, query: &[f32]) {
        self.moments.resize(query.len(), 0.0);
        for (moment, q) in self.moments.iter_mut().zip(query) {
            *moment += q * q;
        }
    }

    /// What an error in channel `c` weighs: the sum of the squares of the queries that met it, or 1 when none was seen.
    pub(super) fn weight(&self, c: usize) -> f32 {
        self.moments.get(c).copied().unwrap_or(1.0)
    }

    /// The stored coordinates: `make`s them at the first call.
    pub(super) fn basis(&mut self, make: impl FnOnce() -> Basis) -> Arc<Basis> {
        Arc::clone(self.basis.get_or_insert_with(|| Arc::new(make())))
    }

    /// Bytes allocated for the plan.
    pub fn bytes(&self) -> usize {
        self.moments.capacity() * size_of::<f32>()
            + self.basis.as_ref().map_or(0, |basis| basis.bytes())
            + self.bands.as_ref().map_or(0, |bands| size_of_val(&**bands))
    }
}
