//! Where a token is, whatever it says.

use super::Place;
use crate::attend::Positions;
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

impl Pattern {
    pub(super) fn scores(self, positions: &Positions, place: Place) -> Vec<f32> {
        let tokens = positions.runs().flat_map(|(start, n)| start..start + n).map(|p| (p - place.origin) as usize);
        let score = |token: usize| match self {
            Self::Newest => token as f32,
            Self::Dilated { dilation } if dilation > 0 && (token + place.head).is_multiple_of(dilation) => token as f32,
            Self::Dilated { .. } => f32::NEG_INFINITY,
            Self::Random { seed } => lot(seed, place.head as u64, token as u64),
        };
        let mut scores = memory::with_capacity(positions.len());
        scores.extend(tokens.map(score));
        scores
    }
}

/// A number from 0 to 1 that looks random (Steele, Lea and Flood's `SplitMix64`).
fn lot(seed: u64, head: u64, token: u64) -> f32 {
    let mut x = seed ^ head << 40 ^ token;
    for _ in 0..2 {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
    }
    (x >> 40) as f32 / (1u32 << 24) as f32
}
