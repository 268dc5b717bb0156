//! The `evict` family: fewer tokens.
//!
//! A method scores the tokens that a KV head holds, and the best ones stay, as many as the budget has room for. It decides
//! on full precision where it can: when a prompt was read, before anything is packed; and while decoding, if it is to hold
//! its budget there, in blocks, when the budget is exceeded by one. To add a method: one file, and a variant of [`Scorer`].

#![forbid(unsafe_code)]

mod attention;
mod budget;
mod expected;
mod keys;
mod observed;
mod pattern;
mod select;
mod snapkv;

pub use attention::Attention;
pub use budget::{Budget, Pyramid};
pub use expected::{Expected, Moments};
pub use keys::Keys;
pub use observed::{NewQueries, Observed, Queries};
pub use pattern::Pattern;
pub use select::{Candidates, select};
pub use snapkv::{Pooling, SnapKv};

use std::ops::Range;
use std::sync::Arc;

use crate::amount::Amount;
use crate::attend::{Head, Rope, Scratch};
use crate::error::{Error, Result};
use crate::memory;

/// Which tokens stay, and how many.
#[derive(Clone, Debug, PartialEq)]
pub struct Eviction {
    /// What tokens are worth.
    pub scorer: Scorer,
    /// How many stay a KV head.
    pub budget: Budget,
    /// Tokens at the beginning of a sequence that always stay.
    pub sinks: usize,
    /// The newest tokens, which stay as far as the budget has room for them.
    pub recent: Amount,
    /// Whether the budget is held while decoding too, and then by how many tokens it may be exceeded.
    pub block: Option<usize>,
    /// `AdaKV`: whether a layer's heads share one budget, and then the share of a head's own that is left to it.
    pub floor: Option<f32>,
    /// Tokens that always stay, counted from the first of the sequence.
    pub protect: Vec<Range<usize>>,
    /// What keys are turned by so that no position is missing between the tokens that stay; without it they keep theirs.
    pub closing: Option<Arc<Rope>>,
}

/// What a token is worth.
#[derive(Clone, Debug, PartialEq)]
pub enum Scorer {
    /// Votes of the last queries (arXiv 2404.14469).
    SnapKv(SnapKv),
    /// Attention received so far, as much of it as is remembered.
    Attention(Attention),
    /// Attention that queries to come would give (arXiv 2510.00636).
    Expected(Expected),
    /// What keys alone tell.
    Keys(Keys),
    /// Where a token is.
    Pattern(Pattern),
}

/// Where the tokens are that are scored.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Number of the KV head in its layer.
    pub head: usize,
    /// Position of the first token of the sequence.
    pub origin: u32,
}

impl Eviction {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`] for the first that does not fit.
    pub fn checked(self) -> Result<Self> {
        self.budget.check()?;
        self.recent.check("recent", true)?;
        if self.block == Some(0) {
            return refuse("block", 0, "whole numbers from 1");
        }
        if let Some(floor) = self.floor
            && !(0.0..=1.0).contains(&floor)
        {
            return refuse("floor", floor, "0 to 1");
        }
        if let Some(span) = self.protect.iter().find(|span| span.is_empty()) {
            return refuse("protect", format!("({}, {})", span.start, span.end), "spans (first, end) with first < end");
        }
        match &self.scorer {
            Scorer::SnapKv(snapkv) => snapkv.check()?,
            Scorer::Attention(attention) => attention.check()?,
            Scorer::Expected(expected) => expected.check()?,
            Scorer::Keys(_) | Scorer::Pattern(_) => {}
        }
        Ok(self)
    }

    /// Whether queries decide something.
    pub fn wants_queries(&self) -> bool {
        self.queries() != Queries::None
    }

    /// The queries that must be seen.
    pub fn queries(&self) -> Queries {
        match &self.scorer {
            Scorer::SnapKv(snapkv) => Queries::Newest(snapkv.window),
            Scorer::Attention(attention) => attention.queries(),
            Scorer::Expected(_) => Queries::All,
            Scorer::Keys(_) | Scorer::Pattern(_) => Queries::None,
        }
    }

    /// Whether the attention of every step of decoding is wanted.
    pub fn wants_attention(&self) -> bool {
        self.block.is_some() && matches!(self.scorer, Scorer::Attention(_))
    }

    /// The weight that what was received before one more query has from then on.
    pub fn memory(&self) -> f32 {
        if let Scorer::Attention(attention) = &self.scorer { attention.alpha } else { 1.0 }
    }

    /// Whether tokens may go although the budget has room for them.
    pub fn has_gaps(&self) -> bool {
        matches!(self.scorer, Scorer::Pattern(Pattern::Dilated { .. }))
    }

    /// Whether the heads of a layer, or its layers, may hold different numbers of tokens.
    pub fn is_ragged(&self) -> bool {
        self.floor.is_some() || self.has_gaps() || self.budget.pyramid.is_some()
    }

    /// Whether all heads of a layer keep the same tokens, by their mean score.
    pub fn is_shared(&self) -> bool {
        matches!(&self.scorer, Scorer::Attention(attention) if attention.shared)
    }

    /// What each token that `head` holds is worth.
    pub fn scores(&self, head: &Head<'_>, place: Place, observed: &Observed, scratch: &mut Scratch) -> Vec<f32> {
        match &self.scorer {
            Scorer::SnapKv(snapkv) => snapkv.scores(head, observed, scratch),
            Scorer::Attention(_) => observed.scores().to_vec(),
            Scorer::Expected(expected) => expected.scores(head, place, self.sinks, &observed.moments, scratch),
            Scorer::Keys(keys) => keys.scores(head, scratch),
            Scorer::Pattern(pattern) => pattern.scores(head.positions, place),
        }
    }

    /// How strongly the tokens of `head` are kept whatever their scores are, and how many may stay.
    pub fn candidates(&self, head: &Head<'_>, place: Place, prompt: usize, scores: Vec<f32>) -> Candidates {
        let budget = self.budget.tokens(prompt);
        let held = head.positions.len();
        let recent = self.recent.tokens(budget).min(held);
        let mut positions = Vec::new();
        head.positions.collect_into(0, held, &mut positions);
        let fixed = |&p: &u32| {
            let token = (p - place.origin) as usize;
            token < self.sinks || self.protect.iter().any(|span| span.contains(&token))
        };
        Candidates { fixed: memory::collected(positions.iter().map(fixed)), recent, budget, scores }
    }
}

/// Refuses an option.
fn refuse<T>(name: &'static str, given: impl std::fmt::Display, accepted: impl Into<String>) -> Result<T> {
    Err(Error::Option { name, given: given.to_string(), accepted: accepted.into() })
}
