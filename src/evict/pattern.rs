//! Where a token is, whatever it says.

#![forbid(unsafe_code)]

use super::{Observed, Place, Scorer};
use crate::attend::{Head, Scratch};
use crate::linalg::random;
use crate::memory;

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// The newest tokens: with sinks, `StreamingLLM` (Xiao et al. 2023, arXiv 2309.17453).
    Newest,
    /// Every `dilation`-th token, each head at another phase, and no other: the retention mask of `Longformer` (Beltagy et al.
    /// 2020, arXiv 2004.05150).
    Dilated {
        /// Distance of the tokens that stay; 0: none does.
        dilation: usize,
    },
    /// By lot: the control.
    Random {
        /// Of the lots.
        seed: u64,
    },
}

impl Scorer for Pattern {
    fn has_gaps(&self) -> bool {
        matches!(self, Self::Dilated { .. })
    }

    fn fresh(&self) -> Box<dyn Observed> {
        Box::new(*self)
    }
}

impl Observed for Pattern {
    fn scores(&self, head: &Head<'_>, place: Place, _: &mut Scratch) -> Vec<f32> {
        let tokens = head.positions.runs().flat_map(|(start, n)| start..start + n).map(|p| (p - place.origin) as usize);
        let score = |token: usize| match *self {
            Self::Newest => token as f32,
            Self::Dilated { dilation } if dilation > 0 && (token + place.head).is_multiple_of(dilation) => token as f32,
            Self::Dilated { .. } => f32::NEG_INFINITY,
            Self::Random { seed } => lot(seed, place.head as u64, token as u64),
        };
        let mut scores = memory::with_capacity(head.positions.len());
        scores.extend(tokens.map(score));
        scores
    }

    fn fork(&self) -> Box<dyn Observed> {
        Box::new(*self)
    }
}

/// A number from 0 to 1 that looks random.
fn lot(seed: u64, head: u64, token: u64) -> f32 {
    let x = random(random(seed ^ head << 40 ^ token, 0), 0);
    (x >> 40) as f32 / (1u32 << 24) as f32
}
