//! The flush: what is due of a layer's tokens leaves, is compacted, sealed and indexed, in that order.

use std::sync::Arc;

use super::choose::evict_row;
use super::head::KvHead;
use super::layer::{COPYING, Layer, chosen};
use crate::attend::{Attention, Scratch};
use crate::compact::{Compactor, Leaving};
use crate::error::Result;
use crate::evict::Eviction;
use crate::kernels::Kernels;
use crate::linalg::Rope;
use crate::memory;
use crate::pool;
use crate::quantize::{Codecs, KeyPage, Shifted};
use crate::select::Selector;

/// Multiply-adds that take as long as taking in a token's attention score.
const RECEIVING: usize = 128;

impl Layer {
    /// Lets tokens go that the model's window or a streaming head has passed and those that are not chosen, compacts what leaves, seals others, and
    /// indexes what was sealed, as far as that is due.
    ///
    /// # Errors
    /// Those of a scorer or a codec; the layer is between two states then, and its caller brings the old one back.
    pub fn flush(&mut self) -> Result<()> {
        self.slide();
        self.stream();
        self.evict()?;
        self.seal()?;
        self.index();
        Ok(())
    }

    /// Chooses the tokens that leave, where that is due, and lets them go.
    fn evict(&mut self) -> Result<()> {
        let methods = Arc::clone(&self.methods);
        let Some(eviction) = &methods.eviction else { return Ok(()) };
        let (mut went, mut result) = (false, Ok(()));
        self.each_unique(
            |row| row.iter().any(|head| head.is_due(eviction)),
            |rows| {
                for row in rows {
                    match evict_row(eviction, methods.compactor.as_deref(), row) {
                        Ok(some) => went |= some,
                        Err(error) => return result = Err(error),
                    }
                }
            },
        );
        if went {
            self.final_to = self.seen();
        }
        result
    }

    /// Seals what codecs say is due.
    fn seal(&mut self) -> Result<()> {
        let methods = Arc::clone(&self.methods);
        let (codecs, mut result) = (&methods.codecs, Ok(()));
        self.each_unique(
            |row| row.iter().any(|head| head.numbers_due(codecs) > 0),
            |rows| {
                let heads: Vec<_> = rows.into_iter().flatten().collect();
                let due: usize = heads.iter().map(|head| head.numbers_due(codecs)).sum();
                let sealed = pool::map(due * methods.work(), heads, |head| head.seal(codecs));
                result = sealed.into_iter().collect();
            },
        );
        result
    }

    /// Makes new pages known to those who choose among them.
    pub(super) fn index(&mut self) {
        let methods = Arc::clone(&self.methods);
        let Some(selector) = methods.selector.as_deref() else { return };
        let dim = self.shape.map_or(0, |shape| shape.key_dim);
        self.each_unique(
            |row| row.iter().any(|head| head.not_indexed() > 0),
            |rows| {
                let heads: Vec<_> = rows.into_iter().flatten().collect();
                let tokens: usize = heads.iter().map(|head| head.not_indexed()).sum();
                pool::map(tokens * dim * COPYING, heads, |head| head.index(selector));
            },
        );
    }

    /// Takes in the attention scores of the tokens of each head from the newest query, row by row.
    pub fn receive(&mut self, attention: &[Attention], kernels: &'static Kernels) {
        let Some(position) = self.seen().checked_sub(1) else { return };
        let (mut tasks, mut work) = (Vec::new(), 0);
        let heads = self.rows.iter_mut().flat_map(|row| Arc::make_mut(row).iter_mut());
        for (head, attention) in heads.zip(attention) {
            let tokens = head.positions.len();
            let Some(observed) = &mut Arc::make_mut(&mut head.history).observed else { continue };
            let Some(mut rest) = observed.receive(position as u32, tokens) else { continue };
            work += RECEIVING * tokens;
            // The parts of a head are those in which it was read: as many as keep all threads busy.
            for (part, start) in attention.starts(tokens).into_iter().enumerate().rev() {
                tasks.push((attention, part, start, rest.split_off(start)));
            }
        }
        pool::map(work, tasks, |(attention, part, start, mut slot)| {
            slot.fold();
            attention.add_part_to(part, kernels, start, slot.new);
        });
    }
}

impl KvHead {
    /// Has a compactor see the tokens for which `keep` says that they leave.
    pub(super) fn compact(&mut self, compactor: &dyn Compactor, head: usize, keep: &[bool]) {
        if !keep.contains(&false) {
            return;
        }
        let (mut keys, mut values, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        let (view, mut scratch) = (self.view(), Scratch::new(chosen()));
        view.each_key(&mut scratch, |token, key| {
            if !keep[token] {
                memory::append(&mut keys, key);
            }
        });
        view.each_value(&mut scratch, |token, value| {
            if !keep[token] {
                memory::append(&mut values, value);
            }
        });
        self.positions.collect_into(0, keep.len(), &mut positions);
        let mut kept = keep.iter();
        positions.retain(|_| kept.next() == Some(&false));
        let queries = self.history.observed.as_ref().and_then(|observed| observed.queries());
        let leaving = Leaving { head, keys: &keys, values: &values, positions: &positions, queries };
        self.summary = compactor.compact(&leaving, self.summary.as_ref());
    }

    /// Keeps the tokens for which `keep` says so.
    pub(super) fn retain(&mut self, eviction: &Eviction, keep: &[bool]) {
        Arc::make_mut(&mut self.history).chosen(keep, eviction.block.is_some());
        if keep.contains(&false) {
            self.hold(keep);
            if let Some(rope) = &eviction.closing {
                self.close_gaps(rope);
            }
        }
    }

    /// Lets all other tokens go.
    pub(super) fn hold(&mut self, keep: &[bool]) {
        self.keys.retain(keep);
        self.values.retain(keep);
        self.positions = self.positions.take(|token, _| keep[token]);
        self.index = None;
    }

    /// Has keys read as if no position were missing between them and the newest token.
    fn close_gaps(&mut self, rope: &Rope) {
        let (mut end, mut missing, mut next) = (self.positions.len(), 0, None);
        let runs: Vec<(u32, u32)> = self.positions.runs().collect();
        for &(start, n) in runs.iter().rev() {
            missing += next.map_or(0, |next| next - start - n);
            let first = end - n as usize;
            if missing > 0 && n > 0 {
                self.keys.replace(first..end, |page| KeyPage::Shifted(Shifted::new(page, rope, missing)));
            }
            (end, next) = (first, Some(start));
        }
    }

    /// How many numbers the codecs want sealed.
    pub(super) fn numbers_due(&self, codecs: &Codecs) -> usize {
        let codecs = self.codecs(codecs);
        self.keys.numbers_due(&*codecs.keys) + self.values.numbers_due(&*codecs.values)
    }

    /// Seals what is due.
    ///
    /// # Errors
    /// Those of the codecs; the head is between two states then.
    pub(super) fn seal(&mut self, codecs: &Codecs) -> Result<()> {
        let pruned = self.pruned.clone();
        let codecs = pruned.as_ref().and_then(|pruned| pruned.codecs.as_ref()).unwrap_or(codecs);
        self.keys.seal(&*codecs.keys)?;
        self.values.seal(&*codecs.values)
    }

    /// Tokens of whole pages that are not known yet to those who choose.
    fn not_indexed(&self) -> usize {
        self.keys.closed() - self.index.as_ref().map_or(0, |index| index.covered())
    }

    /// Makes them known.
    fn index(&mut self, selector: &dyn Selector) {
        let mut index = self.index.take().unwrap_or_else(|| selector.index());
        let (mut at, covered, dim) = (0, index.covered(), self.keys.tail.dim());
        let closed = self.keys.closed();
        for part in self.keys.parts() {
            let tokens = part.tokens;
            if at >= covered && at < closed {
                index.cover(part, dim, &mut Scratch::new(chosen()));
            }
            at += tokens;
        }
        self.index = Some(index);
    }
}
