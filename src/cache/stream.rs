//! KV heads of which less is held: those that hold nothing, and those that let go what lies between their first and their newest
//! tokens.

use std::sync::Arc;

use super::head::KvHead;
use super::layer::{COPYING, Layer, Methods};
use crate::compact::{Compactor, Leaving};
use crate::linalg::Map;
use crate::pool;
use crate::prune::{Streaming, Tokens};
use crate::quantize::Codecs;

impl Layer {
    /// Lets go what streaming heads have passed.
    pub(super) fn stream(&mut self) {
        let mut final_to = self.final_to;
        self.each_unique(
            |row| row.iter().any(|head| head.passing(0) > 0),
            |rows| {
                let heads: Vec<_> = rows.into_iter().flat_map(|row| row.iter_mut().enumerate()).collect();
                let numbers: usize = heads.iter().map(|(_, head)| head.passing(0) * head.keys.tail.dim()).sum();
                let reached = pool::map(numbers * COPYING, heads, |(h, head)| head.pass(h));
                final_to = reached.into_iter().fold(final_to, usize::max);
            },
        );
        self.final_to = final_to;
    }

    /// Whether heads let tokens go that no eviction has chosen.
    pub(super) fn is_pruned(&self) -> bool {
        self.methods.prune.as_ref().is_some_and(|prune| prune.is_ragged())
    }
}

impl Methods {
    /// The codecs of the layer, and those that some heads have of their own.
    pub(super) fn all_codecs(&self) -> impl Iterator<Item = &Codecs> {
        let own = self.prune.iter().flat_map(|prune| prune.codecs());
        std::iter::once(&self.codecs).chain(own)
    }

    /// Multiply-adds that take as long as packing a number; 0 where that has to be done on the caller's thread.
    pub(super) fn work(&self) -> usize {
        let mut work: Vec<usize> = self.all_codecs().map(Codecs::work).collect();
        work.sort_unstable();
        if work[0] == 0 { 0 } else { work[work.len() - 1] }
    }
}

impl KvHead {
    /// What leads to the coordinates of the keys, if they are not the model's.
    pub(super) fn key_map(&self) -> Option<&Arc<Map>> {
        self.pruned.as_ref()?.keys.as_ref()
    }

    /// What leads to the coordinates of the values, if they are not the model's.
    pub(super) fn value_map(&self) -> Option<&Arc<Map>> {
        self.pruned.as_ref()?.values.as_ref()
    }

    /// Its own codecs, else those of the layer.
    pub(super) fn codecs<'a>(&'a self, layer: &'a Codecs) -> &'a Codecs {
        self.pruned.as_ref().and_then(|pruned| pruned.codecs.as_ref()).unwrap_or(layer)
    }

    /// Whether evictions choose its tokens.
    pub(super) fn holds_all(&self) -> bool {
        self.pruned.as_ref().is_none_or(|pruned| matches!(pruned.tokens, Tokens::All))
    }

    /// Whether nothing of it is held.
    pub(super) fn is_gone(&self) -> bool {
        self.pruned.as_ref().is_some_and(|pruned| matches!(pruned.tokens, Tokens::Gone))
    }

    /// What it holds, if that is the first and the newest tokens.
    pub(super) fn streaming(&self) -> Option<&Streaming> {
        match &self.pruned.as_ref()?.tokens {
            Tokens::Streaming(streaming) => Some(streaming),
            _ => None,
        }
    }

    /// How many tokens are to leave once `new` more were stored; 0 where they are too few to do it yet.
    pub(super) fn passing(&self, new: usize) -> usize {
        let Some(streaming) = self.streaming() else { return 0 };
        let passed = self.positions.len().saturating_add(new).saturating_sub(streaming.sinks + streaming.window);
        if passed < streaming.together() { 0 } else { passed }
    }

    /// Lets go what it has passed, in whole granules; returns the length to which a crop may go then.
    fn pass(&mut self, head: usize) -> usize {
        let passed = self.passing(0);
        let Some(streaming) = self.streaming().filter(|_| passed > 0) else { return 0 };
        let (first, end, window) = (streaming.sinks, streaming.sinks + passed, streaming.window);
        let compactor = streaming.compactor.clone();
        let mut keep = vec![true; self.positions.len()];
        let mut at = 0;
        for granule in self.keys.granules() {
            if at >= first && at + granule <= end {
                keep[at..at + granule].fill(false);
            }
            at += granule;
        }
        if let Some(compactor) = compactor {
            self.compact(&*compactor, head, &keep);
        }
        if let Some(observed) = &mut Arc::make_mut(&mut self.history).observed {
            observed.retain(&keep, true);
        }
        let next = keep.iter().rposition(|&keep| !keep).map_or(0, |last| last + 1);
        let mut reached = Vec::new();
        self.positions.collect_into(next.min(keep.len() - 1), 1, &mut reached);
        self.hold(&keep);
        if next == 0 { 0 } else { reached[0] as usize + window }
    }

    /// Has a compactor take in tokens that are never stored, in the head's coordinates.
    pub(super) fn absorb(
        &mut self,
        compactor: &dyn Compactor,
        head: usize,
        [keys, values]: [&[f32]; 2],
        positions: &[u32],
    ) {
        let leaving = Leaving { head, keys, values, positions, queries: None };
        self.summary = compactor.compact(&leaving, self.summary.as_ref());
    }
}
