//! A packed layer of a cache: the tokens that it stores, those that wait, and what is known of who reads it.

use super::append::{LayerQueries, New};
use super::cache::Counts;
use super::layer::Layer;
use super::read::Request;
use super::snapshot::Snapshot;
use crate::attend::Attention;
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::tensor::{Dtype, Kept, View};

/// A forward's tokens of a layer, which nothing has stored yet.
#[derive(Clone)]
pub(super) struct Pending {
    pub(super) k: Kept,
    pub(super) v: Kept,
}

impl Pending {
    pub(super) fn tokens(&self) -> usize {
        self.k.view().shape()[2]
    }
}

/// What is known of a packed layer besides the tokens that it stores.
#[derive(Clone, Default)]
pub(super) struct State {
    pub(super) pending: Option<Pending>,
    /// Of the positions seen, how many attention of the newest forward does not read: what a window has passed.
    pub(super) missed: usize,
    /// Whether the model's own attention reads it: its tokens were stored without ours having been called.
    pub(super) outside: bool,
    /// Whether what the newest query attends to is wanted.
    pub(super) watched: bool,
    /// What that was, `[B, seen]`.
    pub(super) attention: Option<Vec<f32>>,
    /// Whether our attention read it in the last forward.
    pub(super) attended: bool,
    pub(super) counts: Counts,
}

/// A layer that is packed.
#[derive(Clone)]
pub(super) struct Packed {
    pub(super) layer: Layer,
    pub(super) state: State,
    /// Whether other layers read it too, so that packing waits until the forward is over.
    pub(super) shared: bool,
    pub(super) version: u64,
}

/// What a packed layer was like before a forward.
pub(super) struct Before {
    pub(super) snapshot: Snapshot,
    pub(super) state: State,
}

impl Before {
    /// Positions seen then.
    pub(super) fn seen(&self) -> usize {
        self.snapshot.seen() + self.state.pending.as_ref().map_or(0, Pending::tokens)
    }
}

impl Packed {
    /// An empty one.
    pub(super) fn new(layer: Layer, shared: bool) -> Self {
        Self { layer, state: State::default(), shared, version: 0 }
    }

    /// What it is like, before a forward of so many tokens.
    pub(super) fn before(&mut self, tokens: usize) -> Before {
        // Tokens that other attention has read may make an eviction due: then nothing is known of how much changes.
        let unsure = self.state.pending.is_some() && self.layer.eviction().is_some();
        let snapshot = self.layer.snapshot(if unsure { usize::MAX } else { tokens + self.waiting() });
        Before { snapshot, state: self.state.clone() }
    }

    /// Makes it what it was.
    pub(super) fn restore(&mut self, before: &Before) {
        self.layer.restore(&before.snapshot);
        self.state.clone_from(&before.state);
    }

    /// Tokens that wait to be stored.
    pub(super) fn waiting(&self) -> usize {
        self.state.pending.as_ref().map_or(0, Pending::tokens)
    }

    /// Positions seen, those of tokens that wait among them.
    pub(super) fn seen(&self) -> usize {
        self.layer.seen() + self.waiting()
    }

    /// Batch, KV heads, key dim and value dim, and the dtype, once there are tokens.
    pub(super) fn shape(&self) -> Option<([usize; 4], Dtype)> {
        if let Some(shape) = self.layer.shape() {
            return Some(([self.layer.batch(), shape.heads, shape.key_dim, shape.value_dim], shape.dtype));
        }
        let Pending { k, v } = self.state.pending.as_ref()?;
        let [batch, heads, _, key_dim] = k.view().shape();
        Some(([batch, heads, key_dim, v.view().shape()[3]], k.view().dtype()))
    }

    /// Stores what waits, which was read by other attention than ours.
    pub(super) fn commit_unread(&mut self, recording: bool) -> Result<()> {
        if let Some(pending) = &self.state.pending {
            if self.layer.seen() == 0 {
                self.check_outside(&pending.k.view())?;
                self.state.outside = true; // our attention would have taken them by now
            }
            self.store(None, None, recording)?;
        }
        Ok(())
    }

    /// Stores what waits, and packs and lets go what is due of it: the newest tokens of a forward wait until the next one
    /// comes, so that until then they can be cropped.
    pub(super) fn flush(&mut self, recording: bool) -> Result<()> {
        self.commit_unread(recording)?;
        if !recording {
            self.layer.flush()?;
        }
        Ok(())
    }

    /// Stores what waits. A first prompt is packed at once.
    pub(super) fn store(
        &mut self,
        valid: Option<&[bool]>,
        queries: Option<LayerQueries<'_>>,
        recording: bool,
    ) -> Result<()> {
        let Some(Pending { k, v }) = self.state.pending.take() else { return Ok(()) };
        let (k, v) = (&k.view(), &v.view());
        let flush = !recording && self.layer.seen() == 0;
        let queries = queries.filter(|_| self.layer.wants_queries());
        let query = queries.map(|queries| queries.query.reborrow());
        let queries = queries.zip(query.as_ref()).map(|(queries, query)| LayerQueries { query, ..queries });
        self.layer.append(&New { k, v, valid, queries, flush })
    }

    /// Refuses first tokens of which some are to go, where other attention than ours reads them.
    pub(super) fn check_outside(&self, keys: &View<'_>) -> Result<()> {
        const OURS: &str = "a model that was loaded with attn_implementation='kvpack'";
        if self.layer.selects() {
            return Err(Error::Option {
                name: "select",
                given: "Quest, while this layer's attention does not run in kvpack, and reads everything".into(),
                accepted: format!("None, or {OURS}"),
            });
        }
        if self.layer.methods().compactor.is_some() {
            return Err(Error::Option {
                name: "compact",
                given: "a method that holds something else in place of tokens, while this layer's attention does not run in kvpack, \
                        which alone can read it"
                    .into(),
                accepted: format!("None, or {OURS}"),
            });
        }
        if self.layer.is_pruned() {
            return Err(Error::Option {
                name: "prune",
                given: "heads that hold some of their tokens, while this layer's attention does not run in kvpack, which alone \
                        can read them"
                    .into(),
                accepted: format!("None, or {OURS}"),
            });
        }
        let Some(eviction) = self.layer.eviction() else { return Ok(()) };
        if eviction.is_ragged() {
            return Err(Error::Option {
                name: "evict",
                given: "a method whose heads or layers hold different numbers of tokens, which only kvpack's own attention can \
                        read"
                    .into(),
                accepted: format!("here KeyDiff, L2Norm, StreamingLLM, Random, or {OURS}"),
            });
        }
        let rows = keys.shape()[0];
        if (1..rows).any(|row| !keys.same_rows(0, row)) {
            return Err(Error::Option {
                name: "evict",
                given: format!(
                    "a method for a batch of {rows} different sequences, while this layer's attention does not run in kvpack, and \
                     which tokens are pads is not known"
                ),
                accepted: format!("here one sequence at a time, or {OURS}"),
            });
        }
        Ok(())
    }

    /// Refuses attention that would change if all keys shifted.
    pub(super) fn check_center(&self, queries: &LayerQueries<'_>) -> Result<()> {
        if self.layer.centers() && (queries.softmax.softcap.is_some() || queries.sink_logits.is_some()) {
            return Err(Error::Option {
                name: "center",
                given: "True, for a model with learned sinks or capped logits, which do not move with the keys".into(),
                accepted: "False".into(),
            });
        }
        Ok(())
    }

    /// Remembers what the newest of these queries attends to, if that is wanted; `known` are the attention scores, where there is but
    /// one query and they were made.
    pub(super) fn watch(
        &mut self,
        queries: &LayerQueries<'_>,
        known: &[Attention],
        kernels: &'static Kernels,
    ) -> Result<()> {
        if self.state.watched {
            let (newest, softmax, sink_logits) = (queries.query.newest(), queries.softmax, queries.sink_logits);
            self.state.attention = Some(if known.is_empty() {
                let request = Request { query: newest, mask: None, softmax, sink_logits, scores: true };
                self.layer.mean_scores(&request, kernels)?
            } else {
                self.layer.mean_of(known, queries.query.shape()[1], kernels)
            });
        }
        Ok(())
    }

    /// Positions stored that attention of the next tokens does not read: those that the window has passed or, where the model's own
    /// attention reads them, that were let go.
    pub(super) fn gone(&self) -> usize {
        if self.layer.window.is_some() {
            return self.layer.passed(self.layer.seen());
        }
        let held = || self.layer.head(0, 0).map_or(0, |head| head.positions().len());
        if self.state.outside && self.layer.eviction().is_some() { self.layer.seen() - held() } else { 0 }
    }

    /// Tokens that every head holds, for other attention than ours.
    pub(super) fn held_by_all(&self) -> Result<usize> {
        self.layer.check_materialised()?;
        if self.layer.window.is_some() {
            return Ok(self.seen() - self.state.missed);
        }
        if self.layer.eviction().is_none() && !self.layer.is_pruned() || self.layer.seen() == 0 {
            return Ok(self.seen());
        }
        let mut held = self.layer.heads().map(|head| head.positions().len());
        let first = held.next().unwrap_or(0);
        let equal = held.all(|n| n == first);
        if equal && (first == self.layer.seen() || self.state.outside) {
            return Ok(first + self.waiting());
        }
        Err(Error::Option {
            name: "evict",
            given: "a method that let tokens go, while this layer is read by another attention than kvpack's, which cannot know \
                    of it"
                .into(),
            accepted: "attn_implementation='kvpack' from the first token on".into(),
        })
    }

    /// Refuses a crop that cannot be done.
    pub(super) fn check_crop(&self, n: usize, lossy: bool) -> Result<()> {
        let waiting = self.waiting();
        if n <= waiting {
            return Ok(());
        }
        self.layer.check_crop(n - waiting, lossy).map_err(|error| match error {
            Error::Crop { reachable, seen, .. } => {
                Error::Crop { asked: n, reachable: reachable + waiting, seen: seen + waiting }
            }
            error => error,
        })
    }

    /// Removes the `n` newest positions.
    pub(super) fn crop(&mut self, n: usize, lossy: bool, recording: bool) -> Result<()> {
        self.commit_unread(recording)?;
        self.layer.crop(n, lossy)?;
        if recording {
            self.layer.flush()?;
        }
        Ok(())
    }
}
