//! The `evict` family: fewer tokens.
//!
//! A method scores the tokens that a KV head holds, and the best ones stay, as many as the budget has room for. It decides
//! on full precision where it can: when a prompt was read, before anything is packed; and while decoding, if it is to hold
//! its budget there, in blocks, when the budget is exceeded by one. To add a method: one file with a [`Scorer`] and what it
//! remembers, and a row in [`make`].

#![forbid(unsafe_code)]

mod attention;
mod budget;
mod expected;
mod history;
mod keep;
mod keys;
mod moments;
mod observed;
mod pattern;
mod queries;
mod snapkv;

pub use attention::Attention;
pub use budget::{Budget, Pyramid};
pub use expected::Expected;
pub use history::History;
pub use keep::{Candidates, keep};
pub use keys::Keys;
pub use observed::{NewQueries, Observed, Place, Slot, Wanted};
pub use pattern::Pattern;
pub use queries::NewestQueries;
pub use snapkv::{Pooling, SnapKv};

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use crate::amount::Amount;
use crate::attend::Head;
use crate::error::{Result, refuse};
use crate::linalg::Rope;
use crate::memory;
use crate::options::Options;

/// What a token is worth.
pub trait Scorer: Debug + Send + Sync {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// The queries that must be seen.
    fn queries(&self) -> Wanted {
        Wanted::None
    }

    /// Whether the attention scores of every step of decoding are wanted.
    fn wants_attention(&self) -> bool {
        false
    }

    /// Whether tokens may go although the budget has room for them.
    fn has_gaps(&self) -> bool {
        false
    }

    /// Whether all heads of a layer keep the same tokens, by their mean score.
    fn is_shared(&self) -> bool {
        false
    }

    /// What is known of a KV head's tokens before the first one.
    fn fresh(&self) -> Box<dyn Observed>;

    /// The scores of the tokens of all of a sequence's heads, on the caller's thread; `None`: heads are scored one by one, by what is
    /// [observed](Observed::scores) of each.
    fn score_together(&self, _heads: &[(Head<'_>, &dyn Observed, Place)]) -> Option<Result<Vec<Vec<f32>>>> {
        None
    }
}

/// Which tokens stay, and how many.
#[derive(Clone, Debug)]
pub struct Eviction {
    /// What tokens are worth.
    pub scorer: Arc<dyn Scorer>,
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
    /// What keys are rotated by so that no position is missing between the tokens that stay; without it they keep theirs.
    pub closing: Option<Arc<Rope>>,
}

/// Makes a scorer from its options.
type Maker = fn(&mut Options) -> Result<Arc<dyn Scorer>>;

/// The methods by name.
const METHODS: &[(&str, Maker)] = &[
    ("snapkv", |options| Ok(Arc::new(SnapKv::from_options(options)?))),
    ("attention", |options| Ok(Arc::new(Attention::from_options(options)?))),
    ("expected", |options| Ok(Arc::new(Expected::from_options(options)?))),
    ("keydiff", |_| Ok(Arc::new(Keys::KeyDiff))),
    ("norm", |_| Ok(Arc::new(Keys::Norm))),
    ("newest", |_| Ok(Arc::new(Pattern::Newest))),
    ("dilated", |options| Ok(Arc::new(Pattern::Dilated { dilation: options.whole("dilation")? }))),
    ("random", |options| Ok(Arc::new(Pattern::Random { seed: options.whole("seed")? }))),
];

/// The scorer of that name.
///
/// # Errors
/// [`Error::Option`](crate::error::Error::Option) when there is none, or an option is not accepted.
pub fn make(name: &str, options: &mut Options) -> Result<Arc<dyn Scorer>> {
    match METHODS.iter().find(|(known, _)| *known == name) {
        Some((_, make)) => make(options),
        None => refuse("evict", name, METHODS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")),
    }
}

impl Eviction {
    /// An eviction by `scorer`, with the options that all have.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(scorer: Arc<dyn Scorer>, options: &mut Options) -> Result<Self> {
        let pyramid = options.options("pyramid")?.map(|own| own.all(Pyramid::from_options)).transpose()?;
        let protect: Vec<(usize, usize)> = options.pairs("protect")?;
        let closing = options.options("closing")?.map(|own| own.all(Rope::of)).transpose()?;
        let eviction = Self {
            scorer,
            budget: Budget { amount: options.amount("budget")?, pyramid },
            sinks: options.whole("sinks")?,
            recent: options.amount("recent")?,
            block: options.maybe_whole("block")?,
            floor: options.maybe_number("floor")?,
            protect: protect.into_iter().map(|(first, end)| first..end).collect(),
            closing,
        };
        eviction.checked()
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
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
        self.scorer.check()?;
        Ok(self)
    }

    /// Whether queries decide something.
    pub fn wants_queries(&self) -> bool {
        self.scorer.queries() != Wanted::None
    }

    /// Whether the attention scores of every step of decoding are wanted.
    pub fn wants_attention(&self) -> bool {
        self.block.is_some() && self.scorer.wants_attention()
    }

    /// Whether the heads of a layer, or its layers, may hold different numbers of tokens.
    pub fn is_ragged(&self) -> bool {
        self.floor.is_some() || self.scorer.has_gaps() || self.budget.pyramid.is_some()
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
