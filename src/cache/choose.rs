//! Which tokens of a sequence an eviction chooses, and which of its heads it may choose among.

use std::sync::Arc;

use super::head::KvHead;
use super::layer::{Sequence, chosen};
use crate::attend::Scratch;
use crate::compact::Compactor;
use crate::error::Result;
use crate::evict::{Candidates, Eviction, Place, keep};
use crate::memory;
use crate::pool;

/// Multiply-adds that take as long as scoring a token for one number of its key.
const SCORING: usize = 8;

/// Chooses the tokens of a sequence's heads; says whether any went.
pub(super) fn evict_row(eviction: &Eviction, compactor: Option<&dyn Compactor>, row: &mut Sequence) -> Result<bool> {
    let numbers = |row: &Sequence| row.iter().map(|head| head.positions.len() * head.keys.tail.dim()).sum::<usize>();
    let mut heads = candidates(eviction, row, numbers(row))?;
    if eviction.scorer.is_shared() {
        share(&mut heads);
    }
    let granules: Vec<_> = row.iter().map(|head| head.keys.granules()).collect();
    let keep = keep(&heads, &granules, eviction.floor);
    let went = keep.iter().flatten().any(|keep| !keep);
    let work = if went { numbers(row) * SCORING } else { 0 };
    pool::map(work, row.iter_mut().zip(keep).enumerate().collect(), |(h, (head, keep))| {
        if let Some(compactor) = compactor {
            head.compact(compactor, h, &keep);
        }
        head.retain(eviction, &keep);
    });
    Ok(went)
}

/// The tokens of all heads, with what each is worth.
fn candidates(eviction: &Eviction, row: &mut Sequence, numbers: usize) -> Result<Vec<Candidates>> {
    for head in row.iter_mut() {
        if let Some(observed) = &mut Arc::make_mut(&mut head.history).observed {
            observed.fold();
        }
    }
    let row = &*row;
    let some = row.iter().any(|head| head.holds_all() && !head.stays_whole(eviction));
    if some && let Some(scores) = score_together(eviction, row) {
        let each = row.iter().enumerate().zip(scores?);
        return Ok(each.map(|((h, head), scores)| head.candidates(eviction, h, scores)).collect());
    }
    let work = row.first().and_then(|head| head.history.observed.as_ref()).map_or(0, |observed| observed.work());
    Ok(pool::map(numbers * (SCORING + work), row.iter().enumerate().collect(), |(h, head)| {
        let place = head.place(eviction, h);
        let scores = match &head.history.observed {
            // Heads that share a budget are compared with each other, those with room for all of theirs too.
            Some(observed) if head.holds_all() && (!head.stays_whole(eviction) || some && eviction.floor.is_some()) => {
                observed.scores(&head.view(), place, &mut Scratch::new(chosen()))
            }
            _ => Vec::new(),
        };
        head.candidates(eviction, h, scores)
    }))
}

/// The scores of the tokens of all heads among which it chooses, of a scorer that sees them together; of other heads none.
fn score_together(eviction: &Eviction, row: &Sequence) -> Option<Result<Vec<Vec<f32>>>> {
    let heads: Option<Vec<_>> = row
        .iter()
        .enumerate()
        .filter(|(_, head)| head.holds_all())
        .map(|(h, head)| Some((head.view(), head.history.observed.as_deref()?, head.place(eviction, h))))
        .collect();
    let found = eviction.scorer.score_together(&heads?)?;
    Some(found.map(|found| {
        let mut found = found.into_iter();
        row.iter().map(|head| if head.holds_all() { found.next().unwrap_or_default() } else { Vec::new() }).collect()
    }))
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

impl KvHead {
    /// Where the head's tokens are.
    pub(super) fn place(&self, eviction: &Eviction, head: usize) -> Place {
        Place { head, origin: self.history.origin.unwrap_or(0), sinks: eviction.sinks }
    }

    /// Tokens that an eviction let go, of `seen` positions without the `new` newest.
    pub(super) fn gone(&self, seen: usize, new: usize) -> usize {
        let past = seen.saturating_sub(new);
        let origin = self.history.origin.map_or(past, |origin| origin as usize);
        past.saturating_sub(origin).saturating_sub(self.positions.count_below(past))
    }

    /// Whether tokens are to be chosen: after a prompt, or when the budget is exceeded by a block.
    pub(super) fn is_due(&self, eviction: &Eviction) -> bool {
        if !self.holds_all() {
            return false;
        }
        let budget = eviction.budget.tokens(self.history.prompt).max(self.history.kept);
        self.history.due || eviction.block.is_some_and(|block| self.positions.len() > budget + block)
    }

    /// Whether there is room for all tokens, and none goes.
    fn stays_whole(&self, eviction: &Eviction) -> bool {
        self.positions.len() <= eviction.budget.tokens(self.history.prompt) && !eviction.scorer.has_gaps()
    }

    /// The tokens, with their scores; without scores all are worth the same.
    fn candidates(&self, eviction: &Eviction, h: usize, mut scores: Vec<f32>) -> Candidates {
        memory::resize(&mut scores, self.positions.len());
        if !self.holds_all() {
            // What it holds was decided before.
            let held = scores.len();
            return Candidates { fixed: memory::filled(true, held), recent: 0, budget: held, scores };
        }
        eviction.candidates(&self.view(), self.place(eviction, h), self.history.prompt, scores)
    }
}
