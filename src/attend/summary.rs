//! Summaries: what takes weight in the softmax without being tokens.

#![forbid(unsafe_code)]

use super::{Partial, Softmax};
use crate::kernels::Kernels;
use crate::linalg::Mat;

/// Queries of one KV head's query heads, a row each: head by head, `each` a head.
pub struct SummaryQueries<'a> {
    /// `[heads * each, key dim]`, scaled; without rows where [`Summary::wants_queries`] says no.
    pub q: Mat<'a>,
    /// How logits become weights.
    pub softmax: Softmax,
    /// Queries of a query head.
    pub each: usize,
    /// The first of the query heads.
    pub first_head: usize,
    /// The inner loops.
    pub kernels: &'a Kernels,
}

/// Something that queries attend to beside a head's tokens: learned sink logits, slots that stand for tokens that left, a state of
/// constant size. All queries see it.
pub trait Summary: Send + Sync {
    /// Whether it looks at queries.
    fn wants_queries(&self) -> bool {
        true
    }

    /// Merges what each query finds there into the row of `partial` of the same number; sums of values are in the head's
    /// coordinates.
    fn add_to(&self, queries: &SummaryQueries<'_>, partial: &mut Partial);

    /// Bytes allocated.
    fn bytes(&self) -> usize;
}

/// Learned logits, one a query head, that take weight and add nothing (attention sinks of gpt-oss).
#[derive(Clone, Copy, Debug)]
pub struct SinkLogits<'a>(pub &'a [f32]);

impl Summary for SinkLogits<'_> {
    fn wants_queries(&self) -> bool {
        false
    }

    fn add_to(&self, queries: &SummaryQueries<'_>, partial: &mut Partial) {
        for row in 0..partial.rows() {
            partial.add_logit(row, self.0[queries.first_head + row / queries.each]);
        }
    }

    fn bytes(&self) -> usize {
        size_of_val(self.0)
    }
}
