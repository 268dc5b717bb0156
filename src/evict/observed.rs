//! What scorers are told, and how they remember it.

#![forbid(unsafe_code)]

use crate::attend::{Head, Scratch};
use crate::linalg::Mat;
use crate::memory;

/// Which queries of a forward a scorer wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// None.
    None,
    /// So many of the newest.
    Newest(usize),
    /// All.
    All,
}

impl Wanted {
    /// How many of `n` queries.
    pub fn of(self, n: usize) -> usize {
        match self {
            Self::None => 0,
            Self::Newest(most) => most.min(n),
            Self::All => n,
        }
    }
}

/// New queries of one KV head's query heads.
#[derive(Clone, Copy)]
pub struct NewQueries<'a> {
    /// `[tokens, heads, dim]`, scaled.
    pub q: &'a [f32],
    /// The tokens' positions.
    pub positions: &'a [u32],
    /// Query heads.
    pub heads: usize,
    /// `s -> c tanh(s / c)` of a logit.
    pub softcap: Option<f32>,
    /// Learned logits, one a query head, that take weight and add nothing.
    pub sink_logits: Option<&'a [f32]>,
    /// Whether they are those of a prompt; else they might be rolled back.
    pub prompt: bool,
}

impl<'a> NewQueries<'a> {
    /// Numbers of a query.
    pub fn dim(&self) -> usize {
        self.q.len() / (self.positions.len() * self.heads).max(1)
    }

    /// The queries of `n` tokens from token `first` on, a row each.
    pub fn rows(&self, first: usize, n: usize) -> Mat<'a> {
        let row = self.heads * self.dim();
        Mat::new(&self.q[first * row..(first + n) * row], n * self.heads, self.dim())
    }
}

/// Where the tokens are that are scored.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Number of the KV head in its layer.
    pub head: usize,
    /// Position of the first token of the sequence.
    pub origin: u32,
    /// Tokens from there on that stay anyway.
    pub sinks: usize,
}

/// What a scorer knows of one KV head's tokens. Nothing is remembered unless a scorer says how.
pub trait Observed: Send + Sync {
    /// Takes queries into account that met the tokens of `head`, their own among them.
    fn observe(&mut self, _head: &Head<'_>, _queries: &NewQueries<'_>, _place: Place, _scratch: &mut Scratch) {}

    /// Makes room for the attention scores of `tokens` tokens from the query at `position`, which may be rolled back.
    fn receive(&mut self, _position: u32, _tokens: usize) -> Option<Slot<'_>> {
        None
    }

    /// Counts what was kept apart as it might have been rolled back.
    fn fold(&mut self) {}

    /// What each token that `head` holds is worth; unless a scorer says otherwise, the same.
    fn scores(&self, head: &Head<'_>, _place: Place, _scratch: &mut Scratch) -> Vec<f32> {
        memory::zeros(head.positions.len())
    }

    /// Multiply-adds for each number of a key that [`Self::scores`] takes.
    fn work(&self) -> usize {
        0
    }

    /// Forgets the queries at positions from `end` on, and all but the first `tokens` tokens.
    fn truncate(&mut self, _end: usize, _tokens: usize) {}

    /// Goes on with the tokens that stay; `decoding` says whether queries are wanted from now on.
    fn retain(&mut self, _keep: &[bool], _decoding: bool) {}

    /// The newest queries, if they are remembered.
    fn queries(&self) -> Option<&super::NewestQueries> {
        None
    }

    /// Bytes allocated.
    fn bytes(&self) -> usize {
        0
    }

    /// A copy.
    fn fork(&self) -> Box<dyn Observed>;
}

/// Where consecutive tokens put their attention scores from a query.
pub struct Slot<'a> {
    /// What the scores before count once there are newer ones.
    pub(super) alpha: f32,
    pub(super) scores: &'a mut [f32],
    /// Their scores from the query before, and after [`Self::fold`] nothing.
    pub new: &'a mut [f32],
}

impl Slot<'_> {
    /// The part from token `at` on; the rest stays.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        let (scores, new) = (std::mem::take(&mut self.scores), std::mem::take(&mut self.new));
        let ((scores, later_scores), (new, later)) = (scores.split_at_mut(at), new.split_at_mut(at));
        (self.scores, self.new) = (scores, new);
        Self { alpha: self.alpha, scores: later_scores, new: later }
    }

    /// Counts the scores from the query before.
    pub fn fold(&mut self) {
        count(self.alpha, self.scores, self.new);
        self.new.fill(0.0);
    }
}

/// Counts the scores from one more query; what tokens had before counts `alpha` of it.
pub(super) fn count(alpha: f32, scores: &mut [f32], new: &[f32]) {
    for (score, new) in scores.iter_mut().zip(new) {
        *score = alpha * *score + new;
    }
}
