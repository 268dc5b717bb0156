//! `SnapKV` (Li et al. 2024, arXiv 2404.14469): attention scores from the last queries, pooled over neighbouring tokens.
//!
//! ```text
//! a[t]    = mean over the KV head's query heads of  sum_(q in window) softmax_t(q . k_t)
//! score   = pooling of `kernel` neighbours, stride 1
//! ```

#![forbid(unsafe_code)]

use super::{NewQueries, NewestQueries, Observed, Place, Scorer, Wanted};
use crate::attend::{Head, ScoringQueries, Scratch, add_scores};
use crate::error::{Result, refuse};
use crate::linalg::Mat;
use crate::memory;
use crate::options::Options;

/// How attention scores of neighbours become one score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean; beyond the ends they are 0.
    Mean,
    /// The largest.
    Max,
}

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapKv {
    /// The newest queries, whose attention counts.
    pub window: usize,
    /// Neighbours that are pooled: an odd number.
    pub kernel: usize,
    /// How.
    pub pooling: Pooling,
}

impl SnapKv {
    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let pooling = match options.text("pooling")?.as_str() {
            "avg" => Pooling::Mean,
            "max" => Pooling::Max,
            name => return refuse("pooling", name, "avg, max"),
        };
        Ok(Self { window: options.whole("window")?, kernel: options.whole("kernel")?, pooling })
    }

    fn pool(self, scores: &[f32]) -> Vec<f32> {
        let reach = self.kernel / 2;
        let near = |t: usize| &scores[t.saturating_sub(reach)..scores.len().min(t + reach + 1)];
        let pooled = |t: usize| match self.pooling {
            Pooling::Mean => near(t).iter().sum::<f32>() / self.kernel as f32,
            Pooling::Max => near(t).iter().copied().fold(f32::NEG_INFINITY, f32::max),
        };
        memory::collected((0..scores.len()).map(pooled))
    }
}

impl Scorer for SnapKv {
    fn check(&self) -> Result<()> {
        if self.window == 0 {
            return refuse("window", 0, "whole numbers from 1");
        }
        if self.kernel.is_multiple_of(2) {
            return refuse("kernel", self.kernel, "odd numbers from 1");
        }
        Ok(())
    }

    fn queries(&self) -> Wanted {
        Wanted::Newest(self.window)
    }

    fn fresh(&self) -> Box<dyn Observed> {
        Box::new(Window { snapkv: *self, queries: NewestQueries::default() })
    }
}

/// The observation window: the newest queries.
#[derive(Clone)]
struct Window {
    snapkv: SnapKv,
    queries: NewestQueries,
}

impl Observed for Window {
    fn observe(&mut self, _: &Head<'_>, queries: &NewQueries<'_>, _: Place, _: &mut Scratch) {
        self.queries.add(queries, self.snapkv.window);
    }

    /// The window's own tokens have no score: they stay as recent ones.
    fn scores(&self, head: &Head<'_>, _: Place, scratch: &mut Scratch) -> Vec<f32> {
        let tokens = head.positions.len();
        let prefix = tokens - self.queries.tokens().min(tokens);
        let (positions, heads) = (self.queries.positions(), self.queries.heads().max(1));
        let queries = ScoringQueries {
            q: Mat::new(self.queries.q(), positions.len(), head.key_dim),
            positions: &positions,
            weights: &memory::filled(1.0 / heads as f32, positions.len()),
            softcap: self.queries.softcap(),
            heads,
        };
        let mut scores = memory::zeros(tokens);
        add_scores(head, None, &queries, &mut scores, scratch);
        let mut pooled = self.snapkv.pool(&scores[..prefix]);
        memory::resize(&mut pooled, tokens);
        pooled
    }

    fn work(&self) -> usize {
        self.queries.tokens() * self.queries.heads()
    }

    fn truncate(&mut self, end: usize, tokens: usize) {
        self.queries.truncate(end, tokens);
    }

    fn retain(&mut self, _: &[bool], decoding: bool) {
        self.queries.chosen(decoding);
    }

    fn queries(&self) -> Option<&NewestQueries> {
        Some(&self.queries)
    }

    fn bytes(&self) -> usize {
        self.queries.bytes()
    }

    fn fork(&self) -> Box<dyn Observed> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pooling_is_that_of_torch() {
        let snapkv = |pooling| SnapKv { window: 1, kernel: 3, pooling };
        assert_eq!(snapkv(Pooling::Mean).pool(&[3.0, 0.0, 6.0, 9.0]), [1.0, 3.0, 5.0, 5.0]);
        assert_eq!(snapkv(Pooling::Max).pool(&[3.0, 0.0, 6.0, 9.0]), [3.0, 6.0, 9.0, 9.0]);
    }
}
