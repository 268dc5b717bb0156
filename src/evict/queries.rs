//! The newest queries, remembered.

#![forbid(unsafe_code)]

use super::NewQueries;
use crate::memory;

/// The newest queries of one KV head's query heads.
#[derive(Clone, Debug, Default)]
pub struct NewestQueries {
    /// `[tokens, heads, dim]`, scaled.
    q: Vec<f32>,
    /// The tokens' positions.
    positions: Vec<u32>,
    heads: usize,
    softcap: Option<f32>,
}

impl NewestQueries {
    /// Remembers the `most` newest.
    pub fn add(&mut self, new: &NewQueries<'_>, most: usize) {
        let row = new.q.len() / new.positions.len().max(1);
        memory::append(&mut self.q, new.q);
        memory::append(&mut self.positions, new.positions);
        let beyond = self.positions.len().saturating_sub(most);
        self.positions.drain(..beyond);
        self.q.drain(..beyond * row);
        (self.heads, self.softcap) = (new.heads, new.softcap);
    }

    /// After a choice of tokens: without `decoding` no query is wanted until the next prompt.
    pub fn chosen(&mut self, decoding: bool) {
        if !decoding {
            *self = Self::default();
        }
    }

    /// Forgets those at positions from `end` on, and all where no token is left.
    pub fn truncate(&mut self, end: usize, tokens: usize) {
        if tokens == 0 {
            *self = Self::default();
        }
        let row = self.q.len() / self.positions.len().max(1);
        let kept = self.positions.partition_point(|&p| (p as usize) < end);
        self.positions.truncate(kept);
        self.q.truncate(kept * row);
    }

    /// `[tokens, heads, dim]`, scaled.
    pub fn q(&self) -> &[f32] {
        &self.q
    }

    /// Tokens whose queries are remembered.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Their positions, one a query.
    pub fn positions(&self) -> Vec<u32> {
        self.positions.iter().flat_map(|&p| std::iter::repeat_n(p, self.heads)).collect()
    }

    /// Query heads.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// The cap of logits.
    pub fn softcap(&self) -> Option<f32> {
        self.softcap
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        (self.q.capacity() + self.positions.capacity()) * size_of::<f32>()
    }
}
