//! What the method of a side has decided from the tokens and queries that it saw.

use std::sync::Arc;

use super::pages::HeadGrids;
use super::{Band, Factor, Gptq};
use crate::kernels::Kernels;
use crate::linalg::{Map, Mat, MatMut};
use crate::memory;

/// Tokens of a forward that may be rolled back: what speculation appends.
pub(crate) const SHORT: usize = 16;

/// The least weight of a channel, as a share of the mean.
const DAMPING: f32 = 1e-4;

/// Decisions for the pages to come; pages that are sealed keep their own.
#[derive(Clone, Default)]
pub struct Plan {
    /// The KV head's number.
    pub(super) head: usize,
    /// The coordinates in which pages are stored.
    pub(super) map: Option<Arc<Map>>,
    /// Ranges of channels, in those coordinates, that have the same bits.
    pub(super) bands: Option<Arc<[Band]>>,
    /// Static grids of the head's channels.
    grids: Option<Arc<HeadGrids>>,
    /// Tokens of the side before the page to come.
    pub(crate) first: usize,
    /// The queries that were seen, where the codec asks for them.
    squares: Option<Box<Squares>>,
    /// What compensation goes by, where there is any.
    metric: Option<Box<Metric>>,
    /// Tokens sealed with any plan.
    pub(super) sealed: usize,
    /// Tokens after which bands are chosen again.
    pub(super) renewal: usize,
}

/// Squares of queries.
#[derive(Clone, Default)]
struct Squares {
    /// Their sums, one a channel.
    sums: Vec<f32>,
    /// Those of each token of the last forward, if it was short: tokens that are rolled back take theirs along.
    recent: Vec<f32>,
    /// Those of the keys of prompts, one a channel, where a codec asks for them.
    keys: Vec<f32>,
}

/// Compensation: from what, and what it came to.
#[derive(Clone, Default)]
struct Metric {
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
    /// the head's query heads, to `sums`.
    pub fn observe(&mut self, tokens: usize, dim: usize, mut squares: impl FnMut(usize, &mut [f32])) {
        let Squares { sums, recent, .. } = &mut **self.squares.get_or_insert_default();
        memory::resize(sums, dim);
        for recent in recent.chunks_exact(dim) {
            sums.iter_mut().zip(recent).for_each(|(sum, square)| *sum += square);
        }
        *recent = Vec::new();
        if tokens <= SHORT {
            *recent = memory::zeros(tokens * dim);
            recent.chunks_exact_mut(dim).enumerate().for_each(|(t, sums)| squares(t, sums));
        } else {
            (0..tokens).for_each(|t| squares(t, sums));
        }
    }

    /// Takes the keys of a prompt into account: `squares` adds theirs.
    pub fn observe_keys(&mut self, dim: usize, squares: impl FnOnce(&mut [f32])) {
        let keys = &mut self.squares.get_or_insert_default().keys;
        memory::resize(keys, dim);
        squares(keys);
    }

    /// What each of `dim` channels of keys is worth: the mean square of the queries times that of the keys, as far as they were seen,
    /// each up to a factor.
    pub(super) fn importance(&self, dim: usize) -> Vec<f32> {
        let mut importance = self.weights(dim);
        let keys = self.squares.as_ref().map(|squares| &squares.keys).filter(|keys| !keys.is_empty());
        if let Some(keys) = keys {
            importance.iter_mut().zip(keys).for_each(|(importance, key)| *importance *= key);
        }
        importance
    }

    /// Takes queries of a prompt `[rows, dim]` into account for compensation.
    pub fn observe_moment(&mut self, q: &[f32], dim: usize, kernels: &Kernels) {
        let rows = q.len() / dim;
        let metric = self.metric.get_or_insert_default();
        let queries = Arc::make_mut(&mut metric.queries);
        memory::resize(queries, dim * dim);
        metric.rows += rows;
        let mut transposed = memory::zeros(q.len());
        for (t, q) in q.chunks_exact(dim).enumerate() {
            (0..dim).for_each(|c| transposed[c * rows + t] = q[c]);
        }
        let out = MatMut::new(queries, dim, dim);
        (kernels.matmul)(Mat::new(&transposed, dim, rows), Mat::new(q, rows, dim), dim, out);
    }

    /// Whether a prompt's queries are wanted.
    pub fn wants_moment(&self) -> bool {
        self.metric.as_ref().is_none_or(|metric| metric.rows < ENOUGH)
    }

    /// What compensation does: in the model's coordinates and `ordered` where the numbers may be rounded in any order, else in those
    /// of the pages. `None` where it gains too little, or no query was seen. It is decided again when the queries have doubled.
    pub(super) fn factor(&mut self, gptq: &Gptq, ordered: bool) -> Option<Arc<Factor>> {
        let metric = self.metric.get_or_insert_default();
        if metric.factor.is_none() || metric.rows >= metric.renewal {
            let map = self.map.as_ref().filter(|_| !ordered);
            let factor = gptq.factor(self.head, &metric.queries, map, ordered);
            metric.used = factor.as_ref().is_some_and(|factor| gptq.uses(factor));
            metric.factor = factor.map(Arc::new);
            metric.renewal = if metric.rows == 0 || metric.rows >= ENOUGH { usize::MAX } else { 2 * metric.rows };
            if metric.rows >= ENOUGH {
                metric.queries = Arc::default();
            }
        }
        metric.factor.clone().filter(|_| metric.used)
    }

    /// What compensation does for tokens with a grid each, in the coordinates of the pages.
    pub(crate) fn compensation(&mut self, gptq: Option<&Arc<Gptq>>) -> Option<Arc<Factor>> {
        self.factor(gptq?, false)
    }

    /// What compensation could gain at most, and whether it is used; `None` before that was decided, or where no query was seen.
    pub fn gain(&self) -> Option<(f32, bool)> {
        let metric = self.metric.as_ref()?;
        Some((metric.factor.as_ref()?.gain, metric.used))
    }

    /// Whether some queries are known apart, so that [`Self::forget`] changes something.
    pub fn remembers(&self) -> bool {
        self.squares.as_ref().is_some_and(|squares| !squares.recent.is_empty())
    }

    /// Forgets the queries of the `n` newest tokens, as far as they are known apart.
    pub fn forget(&mut self, n: usize) {
        if let Some(Squares { sums, recent, .. }) = self.squares.as_deref_mut() {
            recent.truncate(recent.len().saturating_sub(n * sums.len()));
        }
    }

    /// What an error in each of `dim` channels weighs: the sum of the squares of the queries that met it, and a little, for
    /// those to come; 1 when no query was seen that reads anything.
    pub(super) fn weights(&self, dim: usize) -> Vec<f32> {
        let Some(Squares { sums, recent, .. }) = self.squares.as_deref() else { return vec![1.0; dim] };
        let mut weights = sums.clone();
        for recent in recent.chunks_exact(dim) {
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
    pub(super) fn map(&mut self, make: impl FnOnce() -> Map) -> Arc<Map> {
        Arc::clone(self.map.get_or_insert_with(|| Arc::new(make())))
    }

    /// The bands: `make`s them at the first call.
    pub(super) fn bands(&mut self, make: impl FnOnce() -> Vec<Band>) -> Arc<[Band]> {
        Arc::clone(self.bands.get_or_insert_with(|| make().into()))
    }

    /// The grids of the head's channels: `make`s them at the first call.
    pub(super) fn head_grids(&mut self, make: impl FnOnce(usize) -> HeadGrids) -> Arc<HeadGrids> {
        Arc::clone(self.grids.get_or_insert_with(|| Arc::new(make(self.head))))
    }

    /// Bytes allocated for the plan alone.
    pub fn bytes(&self) -> usize {
        let squares = self.squares.as_ref().map_or(0, |squares| {
            size_of::<Squares>()
                + [&squares.sums, &squares.recent, &squares.keys]
                    .iter()
                    .map(|x| x.capacity() * size_of::<f32>())
                    .sum::<usize>()
        });
        squares + self.metric.as_ref().map_or(0, |_| size_of::<Metric>())
    }

    /// What copies of the plan share: where each part is, and its bytes.
    pub fn shared(&self) -> impl Iterator<Item = (*const (), usize)> {
        fn part<T: ?Sized>(part: &Arc<T>, bytes: impl Fn(&T) -> usize) -> (*const (), usize) {
            (Arc::as_ptr(part).cast(), bytes(part))
        }
        let metric = self.metric.as_ref();
        [
            metric.map(|metric| part(&metric.queries, |queries| queries.capacity() * size_of::<f32>())),
            metric.and_then(|metric| Some(part(metric.factor.as_ref()?, Factor::bytes))),
            self.map.as_ref().map(|map| part(map, Map::bytes)),
            self.grids.as_ref().map(|grids| part(grids, HeadGrids::bytes)),
            self.bands.as_ref().map(|bands| part(bands, size_of_val)),
        ]
        .into_iter()
        .flatten()
    }
}
