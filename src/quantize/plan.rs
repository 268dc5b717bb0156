//! What a column's method has decided from the tokens and queries that it saw.

use std::sync::Arc;

use super::unrotated::HeadGrids;
use super::{Band, Factor, Gptq, KvQuant, Method};
use crate::attend::Basis;
use crate::attend::kernels::Kernels;
use crate::attend::mat::{Mat, MatMut};
use crate::memory;

/// Tokens of a forward that may be taken back: what speculation appends.
pub(crate) const SHORT: usize = 16;

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
    /// What feedback goes by.
    fed: Fed,
    /// Tokens sealed with any plan.
    pub(super) sealed: usize,
    /// Tokens after which bands are chosen again.
    pub(super) renewal: usize,
}

/// Feedback: from what, and what it came to.
#[derive(Clone, Default)]
struct Fed {
    /// The second moment of prompts' queries `[dim, dim]`, as long as more of them would tell more. Shared, as plans are copied
    /// at every forward.
    queries: Arc<Vec<f32>>,
    /// Queries in it.
    rows: usize,
    /// Queries after which the factor is made again.
    renewal: usize,
    factor: Option<Arc<Factor>>,
    used: bool,
}

/// Queries after which more would change little.
const ENOUGH: usize = 8192;

impl Plan {
    /// Nothing is decided yet for KV head number `head`.
    pub fn new(head: usize) -> Self {
        Self { head, ..Self::default() }
    }

    /// Takes the queries of a forward into account: `squares(token, sums)` adds the squares of the queries of `token`, of all
    /// the column's readers, to `sums`.
    pub fn observe(&mut self, tokens: usize, dim: usize, mut squares: impl FnMut(usize, &mut [f32])) {
        memory::resize(&mut self.moments, dim);
        for recent in self.recent.chunks_exact(dim) {
            for (moment, square) in self.moments.iter_mut().zip(recent) {
                *moment += square;
            }
        }
        self.recent = Vec::new();
        if tokens <= SHORT {
            self.recent = memory::zeros(tokens * dim);
            self.recent.chunks_exact_mut(dim).enumerate().for_each(|(t, sums)| squares(t, sums));
        } else {
            (0..tokens).for_each(|t| squares(t, &mut self.moments));
        }
    }

    /// Takes queries of a prompt `[rows, dim]` into account for feedback.
    pub fn observe_moment(&mut self, q: &[f32], dim: usize, kernels: &Kernels) {
        let rows = q.len() / dim;
        let queries = Arc::make_mut(&mut self.fed.queries);
        memory::resize(queries, dim * dim);
        self.fed.rows += rows;
        let mut turned = memory::zeros(q.len());
        for (t, q) in q.chunks_exact(dim).enumerate() {
            (0..dim).for_each(|c| turned[c * rows + t] = q[c]);
        }
        let out = MatMut::new(queries, dim, dim);
        (kernels.matmul)(Mat::new(&turned, dim, rows), Mat::new(q, rows, dim), dim, out);
    }

    /// Whether a prompt's queries are wanted.
    pub fn wants_moment(&self) -> bool {
        self.fed.rows < ENOUGH
    }

    /// What feedback does: in the model's coordinates and `ordered` where the numbers may be rounded in any order, else in those
    /// of the pages. `None` where it gains too little, or no query was seen. It is decided again when the queries have doubled.
    pub(super) fn factor(&mut self, gptq: &Gptq, ordered: bool) -> Option<Arc<Factor>> {
        let fed = &mut self.fed;
        if fed.factor.is_none() || fed.rows >= fed.renewal {
            let basis = self.basis.as_ref().filter(|_| !ordered);
            let factor = gptq.factor(self.head, &fed.queries, basis, ordered);
            fed.used = factor.as_ref().is_some_and(|factor| gptq.uses(factor));
            fed.factor = factor.map(Arc::new);
            fed.renewal = if fed.rows == 0 || fed.rows >= ENOUGH { usize::MAX } else { 2 * fed.rows };
            if fed.rows >= ENOUGH {
                fed.queries = Arc::default();
            }
        }
        fed.factor.clone().filter(|_| fed.used)
    }

    /// What feedback does for tokens with a grid each, in the coordinates of the pages.
    pub(crate) fn token_feedback(&mut self, method: &Method) -> Option<Arc<Factor>> {
        self.factor(method.feedback()?, false)
    }

    /// What feedback could gain at most, and whether it is used; `None` before that was decided, or where no query was seen.
    pub fn gain(&self) -> Option<(f32, bool)> {
        Some((self.fed.factor.as_ref()?.gain, self.fed.used))
    }

    /// Whether some queries are known apart, so that [`Self::forget`] changes something.
    pub fn remembers(&self) -> bool {
        !self.recent.is_empty()
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

    /// Bytes allocated for the plan alone.
    pub fn bytes(&self) -> usize {
        (self.moments.capacity() + self.recent.capacity()) * size_of::<f32>()
    }

    /// What copies of the plan share: where each part is, and its bytes.
    pub fn shared(&self) -> impl Iterator<Item = (*const (), usize)> {
        fn part<T: ?Sized>(part: &Arc<T>, bytes: impl Fn(&T) -> usize) -> (*const (), usize) {
            (Arc::as_ptr(part).cast(), bytes(part))
        }
        let Fed { queries, factor, .. } = &self.fed;
        [
            Some(part(queries, |queries| queries.capacity() * size_of::<f32>())),
            factor.as_ref().map(|factor| part(factor, Factor::bytes)),
            self.basis.as_ref().map(|basis| part(basis, Basis::bytes)),
            self.grids.as_ref().map(|grids| part(grids, HeadGrids::bytes)),
            self.bands.as_ref().map(|bands| part(bands, size_of_val)),
        ]
        .into_iter()
        .flatten()
    }
}
