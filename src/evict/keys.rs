//! What keys alone tell, for any model: no query is needed.

#![forbid(unsafe_code)]

use super::{Observed, Place, Scorer};
use crate::attend::{Head, Scratch};
use crate::memory;

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// `-|k|` (Devoto et al. 2024, arXiv 2406.11430): small keys draw attention.
    Norm,
    /// `KeyDiff` (Park et al. 2025, arXiv 2504.15364): `-cos(k, m)` with the mean `m` of all keys' directions. Keys that are
    /// unlike the others stay.
    KeyDiff,
}

impl Scorer for Keys {
    fn fresh(&self) -> Box<dyn Observed> {
        Box::new(*self)
    }
}

impl Observed for Keys {
    fn scores(&self, head: &Head<'_>, _: Place, scratch: &mut Scratch) -> Vec<f32> {
        let norms = self.norms(head, scratch);
        if *self == Self::Norm {
            return memory::collected(norms.iter().map(|norm| -norm));
        }
        let mut mean = vec![0.0f32; head.key_dim];
        head.each_key(scratch, |t, key| {
            mean.iter_mut().zip(key).for_each(|(mean, x)| *mean += x / norms[t]);
        });
        let size = mean.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        let mut scores = memory::zeros(norms.len());
        head.each_key(scratch, |t, key| {
            scores[t] = -mean.iter().zip(key).map(|(mean, x)| mean * x).sum::<f32>() / (size * norms[t]);
        });
        scores
    }

    fn fork(&self) -> Box<dyn Observed> {
        Box::new(*self)
    }
}

impl Keys {
    /// The keys' lengths; where they are divided by, at least a tiny number.
    fn norms(self, head: &Head<'_>, scratch: &mut Scratch) -> Vec<f32> {
        let mut norms = memory::zeros(head.positions.len());
        let least = if self == Self::Norm { 0.0 } else { 1e-12 };
        head.each_key(scratch, |t, key| norms[t] = key.iter().map(|x| x * x).sum::<f32>().sqrt().max(least));
        norms
    }
}
