//! `SnapKV` (Li et al. 2024, arXiv 2404.14469): the last queries vote, and a token's neighbours are heard with it.
//!
//! ```text
//! vote[t] = mean over the readers' query heads of  sum_(q in window) softmax_t(q . k_t)
//! score   = pooling of `kernel` neighbouring votes, stride 1
//! ```

use super::{Observed, refuse};
use crate::attend::{Head, Scratch, Voters, add_votes, mat::Mat};
use crate::error::Result;
use crate::memory;

/// How neighbouring votes become a score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean; beyond the ends votes are 0.
    Mean,
    /// The largest.
    Max,
}

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapKv {
    /// Queries that vote.
    pub window: usize,
    /// Neighbours that are pooled: an odd number.
    pub kernel: usize,
    /// How.
    pub pooling: Pooling,
}

impl SnapKv {
    pub(super) fn check(self) -> Result<()> {
        if self.window == 0 {
            return refuse("window", 0, "whole numbers from 1");
        }
        if self.kernel.is_multiple_of(2) {
            return refuse("kernel", self.kernel, "odd numbers from 1");
        }
        Ok(())
    }

    /// The window's own tokens get no votes: they stay as recent ones.
    pub(super) fn scores(self, head: &Head<'_>, observed: &Observed, scratch: &mut Scratch) -> Vec<f32> {
        let tokens = head.positions.len();
        let prefix = tokens - observed.tokens().min(tokens);
        let mut votes = memory::zeros(tokens);
        let positions = observed.query_positions();
        let voters = Voters {
            q: Mat::new(observed.queries(), positions.len(), head.key_dim),
            positions: &positions,
            weights: &memory::filled(1.0 / observed.readers().max(1) as f32, positions.len()),
            softcap: observed.softcap(),
            sinks: None,
        };
        add_votes(head, &voters, &mut votes, scratch);
        let mut scores = self.pool(&votes[..prefix]);
        memory::resize(&mut scores, tokens);
        scores
    }

    fn pool(self, votes: &[f32]) -> Vec<f32> {
        let reach = self.kernel / 2;
        let near = |t: usize| &votes[t.saturating_sub(reach)..votes.len().min(t + reach + 1)];
        let pooled = |t: usize| match self.pooling {
            Pooling::Mean => near(t).iter().sum::<f32>() / self.kernel as f32,
            Pooling::Max => near(t).iter().copied().fold(f32::NEG_INFINITY, f32::max),
        };
        memory::collected((0..votes.len()).map(pooled))
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
