//! Fewer tokens: what an eviction sees of a forward, and how a layer lets tokens go.

use std::sync::Arc;

use super::head::KvHead;
use super::layer::{Layer, New, Sequence, chosen};
use crate::attend::kernels::Kernels;
use crate::attend::{Attention, Bounds, Rope, Scratch};
use crate::evict::{Candidates, Eviction, NewQueries, Place, Queries, Scorer, select};
use crate::memory;
use crate::pool;
use crate::quantize::{KeyPage, Moved, SHORT};

/// Multiply-adds that take as long as scoring a token for one number of its key.
const SCORING: usize = 8;

/// And as long as taking in what a token received.
const RECEIVING: usize = 128;

impl KvHead {
    /// Tells an eviction of the tokens that were just appended to head `h` of batch row `b`, `seen` positions having been seen
    /// before, and of their queries.
    pub(super) fn witness(
        &mut self,
        eviction: &Eviction,
        new: &New<'_>,
        [b, h]: [usize; 2],
        valid: Option<&[bool]>,
        seen: usize,
    ) {
        let [_, kv_heads, n, _] = new.k.shape();
        let tokens: Vec<usize> = (0..n).filter(|&t| valid.is_none_or(|valid| valid[t])).collect();
        let Some(&first) = tokens.first() else { return };
        let observed = Arc::make_mut(&mut self.observed);
        observed.origin.get_or_insert((seen + first) as u32);
        let prompt = n > SHORT || seen == 0;
        if prompt {
            observed.prompt += tokens.len();
            observed.due = true;
        }
        let attention_follows = n == 1 && seen > 0 && eviction.wants_attention();
        let Some(readers) = new.readers.filter(|_| (prompt || eviction.block.is_some()) && !attention_follows) else {
            return;
        };
        let newest = match eviction.queries() {
            Queries::None => return,
            Queries::Newest(most) => most.min(tokens.len()),
            Queries::All => tokens.len(),
        };
        let tokens = &tokens[tokens.len() - newest..];
        let [_, heads, _, dim] = readers.query.shape();
        let group = heads / kv_heads;
        let mut q = memory::zeros(newest * group * dim);
        let places = tokens.iter().flat_map(|&t| (h * group..(h + 1) * group).map(move |reader| (t, reader)));
        for (q, (t, reader)) in q.chunks_exact_mut(dim).zip(places) {
            readers.query.row(b, reader, t).to_f32(q);
            for q in q {
                *q *= readers.softmax.scaling;
            }
        }
        let queries = NewQueries {
            q: &q,
            positions: &tokens.iter().map(|&t| (seen + t) as u32).collect::<Vec<_>>(),
            readers: group,
            softcap: readers.softmax.softcap,
            sinks: readers.sinks.map(|sinks| &sinks[h * group..(h + 1) * group]),
        };
        let mut shared = std::mem::take(&mut self.observed);
        let observed = Arc::make_mut(&mut shared);
        match &eviction.scorer {
            Scorer::Attention(_) => {
                observed.count(&self.view(), &queries, eviction.memory(), !prompt, &mut Scratch::new(chosen()));
            }
            // Queries of decoding might be taken back again.
            Scorer::Expected(expected) if prompt => {
                let first = observed.origin.unwrap_or(0) + eviction.sinks as u32;
                observed.moments.add(&queries, first, expected, chosen());
            }
            Scorer::Expected(_) => {}
            _ => observed.keep_queries(&queries, newest.max(most_of(eviction))),
        }
        self.observed = shared;
    }

    fn place(&self, head: usize) -> Place {
        Place { head, origin: self.observed.origin.unwrap_or(0) }
    }

    /// Tokens that an eviction let go, of `seen` positions without the `new` newest.
    pub(super) fn gone(&self, seen: usize, new: usize) -> usize {
        let past = seen.saturating_sub(new);
        let origin = self.observed.origin.map_or(past, |origin| origin as usize);
        past.saturating_sub(origin).saturating_sub(self.positions.count_below(past))
    }

    /// Whether tokens are to be chosen: after a prompt, or when the budget is exceeded by a block.
    pub(super) fn is_due(&self, eviction: &Eviction) -> bool {
        let budget = eviction.budget.tokens(self.observed.prompt).max(self.observed.kept);
        self.observed.due || eviction.block.is_some_and(|block| self.positions.len() > budget + block)
    }

    /// The tokens, with what each is worth.
    fn candidates(&mut self, eviction: &Eviction, h: usize) -> Candidates {
        Arc::make_mut(&mut self.observed).fold(eviction.memory());
        let (view, place) = (self.view(), self.place(h));
        let budget = eviction.budget.tokens(self.observed.prompt);
        let mut scores = if self.positions.len() <= budget && !eviction.has_gaps() {
            Vec::new() // all stay
        } else {
            eviction.scores(&view, place, &self.observed, &mut Scratch::new(chosen()))
        };
        memory::resize(&mut scores, self.positions.len());
        eviction.candidates(&view, place, self.observed.prompt, scores)
    }

    /// Keeps the tokens for which `keep` says so.
    fn retain(&mut self, eviction: &Eviction, keep: &[bool]) {
        Arc::make_mut(&mut self.observed).chosen(keep, eviction.block.is_some());
        if keep.contains(&false) {
            self.keys.retain(keep);
            self.values.retain(keep);
            self.positions = self.positions.take(|token, _| keep[token]);
            self.bounds = Bounds::default();
            if let Some(rope) = &eviction.closing {
                self.close_gaps(rope);
            }
        }
    }

    /// Has keys read as if no position were missing between them and the newest token.
    fn close_gaps(&mut self, rope: &Rope) {
        let (mut end, mut missing, mut next) = (self.positions.len(), 0, None);
        let runs: Vec<(u32, u32)> = self.positions.runs().collect();
        for &(start, n) in runs.iter().rev() {
            missing += next.map_or(0, |next| next - start - n);
            let first = end - n as usize;
            if missing > 0 && n > 0 {
                self.keys.turn(first..end, |page| KeyPage::Moved(Moved::new(page, rope, missing)));
            }
            (end, next) = (first, Some(start));
        }
    }
}

/// The most queries that an eviction wants to remember.
fn most_of(eviction: &Eviction) -> usize {
    if let Queries::Newest(most) = eviction.queries() { most } else { 0 }
}

impl Layer {
    /// Lets tokens go, where that is due.
    pub(super) fn evict(&mut self) {
        let Some(eviction) = self.eviction.clone() else { return };
        let mut went = false;
        self.each_unique(
            |row| row.iter().any(|head| head.is_due(&eviction)),
            |rows| rows.into_iter().for_each(|row| went |= evict_row(&eviction, row)),
        );
        if went {
            self.final_to = self.seen();
        }
    }

    /// Takes in what the tokens of each head received from the newest query, row by row.
    pub fn receive(&mut self, attention: &[Attention], kernels: &'static Kernels) {
        let (Some(eviction), position) = (self.eviction.clone(), self.seen() as u32 - 1) else { return };
        let (mut tasks, mut work) = (Vec::new(), 0);
        let heads = self.rows.iter_mut().flat_map(|row| Arc::make_mut(row).iter_mut());
        for (head, attention) in heads.zip(attention) {
            let tokens = head.positions.len();
            work += RECEIVING * tokens;
            // The parts of a head are those in which it was read: as many as keep all threads busy.
            let mut rest = Arc::make_mut(&mut head.observed).receive(position, tokens, eviction.memory());
            for (part, start) in attention.starts(tokens).into_iter().enumerate().rev() {
                tasks.push((attention, part, start, rest.split_off(start)));
            }
        }
        pool::map(work, tasks, |(attention, part, start, mut slot)| {
            slot.fold();
            attention.add_part_to(part, kernels, start, slot.received);
        });
    }
}

/// Chooses the tokens of a sequence's heads; says whether any went.
fn evict_row(eviction: &Eviction, row: &mut Sequence) -> bool {
    let numbers = |row: &Sequence| row.iter().map(|head| head.positions.len() * head.keys.tail.dim()).sum::<usize>();
    let queries = row.first().map_or(0, |head| head.observed.tokens() * head.observed.readers());
    let work = numbers(row) * (SCORING + queries);
    let mut heads = pool::map(work, row.iter_mut().enumerate().collect(), |(h, head)| head.candidates(eviction, h));
    if eviction.is_shared() {
        share(&mut heads);
    }
    let units: Vec<_> = row.iter().map(|head| head.keys.units()).collect();
    let keep = select(&heads, &units, eviction.floor);
    let went = keep.iter().flatten().any(|keep| !keep);
    let work = if went { numbers(row) * SCORING } else { 0 };
    pool::map(work, row.iter_mut().zip(keep).collect(), |(head, keep)| head.retain(eviction, &keep));
    went
}

/// Gives every token the mean of the heads' scores.
fn share(heads: &mut [Candidates]) {
    let mut mean = memory::zeros(heads[0].scores.len());
    for head in heads.iter() {
        mean.iter_mut().zip(&head.scores).for_each(|(mean, score)| *mean += score / heads.len() as f32);
    }
    for head in heads {
        head.scores.clone_from(&mean);
    }
}
