//! What keys alone tell, for any model: no query is needed.

use crate::attend::mat::MatMut;
use crate::attend::{CHUNK, Head, Scratch, key_chunks, padded, tile_rows};
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

impl Keys {
    pub(super) fn scores(self, head: &Head<'_>, scratch: &mut Scratch) -> Vec<f32> {
        let norms = self.norms(head, scratch);
        if self == Self::Norm {
            return memory::collected(norms.iter().map(|norm| -norm));
        }
        let mut mean = vec![0.0f32; head.key_dim];
        each_key(head, scratch, |t, key| {
            mean.iter_mut().zip(key).for_each(|(mean, x)| *mean += x / norms[t]);
        });
        let size = mean.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        let mut scores = memory::zeros(norms.len());
        each_key(head, scratch, |t, key| {
            scores[t] = -mean.iter().zip(key).map(|(mean, x)| mean * x).sum::<f32>() / (size * norms[t]);
        });
        scores
    }

    /// The keys' lengths; where they are divided by, at least a tiny number.
    fn norms(self, head: &Head<'_>, scratch: &mut Scratch) -> Vec<f32> {
        let mut norms = memory::zeros(head.positions.len());
        let least = if self == Self::Norm { 0.0 } else { 1e-12 };
        each_key(head, scratch, |t, key| norms[t] = key.iter().map(|x| x * x).sum::<f32>().sqrt().max(least));
        norms
    }
}

/// Calls `see(token, key)` for all that `head` holds, dequantised.
pub(super) fn each_key(head: &Head<'_>, scratch: &mut Scratch, mut see: impl FnMut(usize, &[f32])) {
    let mut tile = memory::zeros(tile_rows(head.key_dim) * CHUNK);
    let mut key = vec![0.0; head.key_dim];
    for chunk in key_chunks(&head.keys) {
        chunk.segment.tile(chunk.first, chunk.tokens, MatMut::new(&mut tile, tile_rows(head.key_dim), CHUNK), scratch);
        for t in 0..chunk.tokens {
            key.iter_mut().zip(tile.chunks_exact(CHUNK)).for_each(|(x, row)| *x = row[t]);
            if let Some(basis) = chunk.segment.basis() {
                basis.undo(&mut key);
            }
            see(chunk.at + t, &key);
        }
    }
}

/// Calls `see(token, value)` for all that `head` holds, dequantised.
pub(super) fn each_value(head: &Head<'_>, scratch: &mut Scratch, mut see: impl FnMut(usize, &[f32])) {
    let (dim, stride) = (head.value_dim, padded(head.value_dim));
    let mut tile = memory::zeros(stride * CHUNK);
    let mut at = 0;
    for part in &head.values {
        for first in (0..part.tokens).step_by(CHUNK) {
            let n = CHUNK.min(part.tokens - first);
            part.segment.tile(first, n, MatMut::new(&mut tile, n, stride), scratch);
            for (t, value) in tile.chunks_exact_mut(stride).take(n).enumerate() {
                if let Some(basis) = part.segment.basis() {
                    basis.undo(&mut value[..dim]);
                }
                see(at + first + t, &value[..dim]);
            }
        }
        at += part.tokens;
    }
}
