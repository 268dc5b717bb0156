//! What is remembered of one KV head's past: how much there was, and what the scorer observed.

#![forbid(unsafe_code)]

use super::{Eviction, Observed};

/// The past of a KV head's tokens.
#[derive(Default)]
pub struct History {
    /// Position of the first token of the sequence.
    pub origin: Option<u32>,
    /// Tokens of prompts, of which a budget may be a share.
    pub prompt: usize,
    /// Whether a prompt was read since tokens were last chosen.
    pub due: bool,
    /// Tokens that stayed then.
    pub kept: usize,
    /// What the scorer knows; `None` where nothing is evicted.
    pub observed: Option<Box<dyn Observed>>,
}

impl Clone for History {
    fn clone(&self) -> Self {
        let observed = self.observed.as_ref().map(|observed| observed.fork());
        Self { observed, ..*self }
    }
}

impl History {
    /// Of a sequence that begins.
    pub fn new(eviction: Option<&Eviction>) -> Self {
        Self { observed: eviction.map(|eviction| eviction.scorer.fresh()), ..Self::default() }
    }

    /// Forgets the queries at positions from `end` on, and all but the first `tokens` tokens.
    pub fn truncate(&mut self, end: usize, tokens: usize) {
        if let Some(observed) = &mut self.observed {
            observed.truncate(end, tokens);
        }
        if tokens == 0 {
            // A sequence begins anew.
            *self = Self { observed: self.observed.take(), ..Self::default() };
        }
    }

    /// Goes on with the tokens that stay; `decoding` says whether queries are wanted from now on.
    pub fn chosen(&mut self, keep: &[bool], decoding: bool) {
        (self.due, self.kept) = (false, keep.iter().filter(|&&keep| keep).count());
        if let Some(observed) = &mut self.observed {
            observed.retain(keep, decoding);
        }
    }

    /// Bytes allocated beside it.
    pub fn bytes(&self) -> usize {
        self.observed.as_ref().map_or(0, |observed| observed.bytes() + size_of_val(&**observed))
    }
}
