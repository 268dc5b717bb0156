//! Attention received so far, older queries' fading: `A <- alpha A + sum over the query heads of softmax(q . k)`, query by query.
//!
//! | `alpha` | method |
//! |---|---|
//! | 1 | H2O (Zhang et al. 2023, arXiv 2306.14048): heavy hitters |
//! | between | A2SF (Jo and Shin 2024, arXiv 2407.20485), the forgetting factor |
//! | 0, one decision for all heads | TOVA (Oren et al. 2024, arXiv 2401.06104): the last query alone |

#![forbid(unsafe_code)]

use super::observed::count;
use super::{NewQueries, Observed, Place, Scorer, Slot, Wanted};
use crate::attend::{Head, ScoringQueries, Scratch, add_scores};
use crate::error::{Result, refuse};
use crate::memory;
use crate::options::Options;

/// Queries of less weight change no choice.
const FORGOTTEN: f32 = 1e-6;

/// Numbers that there is room for beyond those that are wanted.
const SPARE: usize = 64;

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// What a query counts once there is a newer one.
    pub alpha: f32,
    /// Whether all heads of a layer keep the same tokens.
    pub shared: bool,
}

impl Attention {
    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        Ok(Self { alpha: options.number("alpha")?, shared: options.flag("shared")? })
    }
}

impl Scorer for Attention {
    fn check(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.alpha) {
            return refuse("alpha", self.alpha, "0 to 1");
        }
        Ok(())
    }

    /// The queries of a prompt that still count at its end.
    fn queries(&self) -> Wanted {
        if self.alpha >= 1.0 {
            return Wanted::All;
        }
        let newest = if self.alpha <= 0.0 { 1.0 } else { (FORGOTTEN.ln() / self.alpha.ln()).ceil().max(1.0) };
        Wanted::Newest(newest as usize)
    }

    fn wants_attention(&self) -> bool {
        true
    }

    fn is_shared(&self) -> bool {
        self.shared
    }

    fn fresh(&self) -> Box<dyn Observed> {
        Box::new(Accumulated { alpha: self.alpha, scores: Vec::new(), pending: Vec::new() })
    }
}

/// The attention scores of a KV head's tokens so far.
#[derive(Clone)]
struct Accumulated {
    alpha: f32,
    /// A number a token held.
    scores: Vec<f32>,
    /// Those from each query of the last forward, which may be rolled back, and its position.
    pending: Vec<(u32, Vec<f32>)>,
}

impl Accumulated {
    fn add(&mut self, alpha: f32, new: &[f32]) {
        grow(&mut self.scores, new.len());
        count(alpha, &mut self.scores, new);
    }
}

impl Observed for Accumulated {
    /// Queries that may be rolled back stay apart for now.
    fn observe(&mut self, head: &Head<'_>, queries: &NewQueries<'_>, _: Place, scratch: &mut Scratch) {
        self.fold();
        let (tokens, n, heads) = (head.positions.len(), queries.positions.len(), queries.heads);
        let rows = if queries.prompt { n } else { 1 };
        for first in (0..n).step_by(rows.max(1)) {
            let positions = &queries.positions[first..first + rows];
            let mut scores = memory::zeros(tokens);
            let ages = (0..rows as i32).rev();
            let scoring = ScoringQueries {
                q: queries.rows(first, rows),
                positions: &positions.iter().flat_map(|p| std::iter::repeat_n(*p, heads)).collect::<Vec<_>>(),
                weights: &ages.flat_map(|age| vec![self.alpha.powi(age); heads]).collect::<Vec<_>>(),
                softcap: queries.softcap,
                heads,
            };
            add_scores(head, queries.sink_logits, &scoring, &mut scores, scratch);
            if queries.prompt {
                self.add(self.alpha.powi(rows as i32), &scores);
            } else {
                self.pending.push((positions[0], scores));
            }
        }
    }

    fn receive(&mut self, position: u32, tokens: usize) -> Option<Slot<'_>> {
        let last = self.pending.pop();
        self.fold();
        let alpha = if last.is_some() { self.alpha } else { 1.0 };
        let (_, mut new) = last.unwrap_or_default();
        grow(&mut new, tokens);
        grow(&mut self.scores, tokens);
        self.pending.push((position, new));
        let (_, new) = self.pending.last_mut()?;
        Some(Slot { alpha, scores: &mut self.scores, new })
    }

    fn fold(&mut self) {
        for (_, new) in std::mem::take(&mut self.pending) {
            self.add(self.alpha, &new);
        }
    }

    fn scores(&self, _: &Head<'_>, _: Place, _: &mut Scratch) -> Vec<f32> {
        self.scores.clone()
    }

    fn truncate(&mut self, end: usize, tokens: usize) {
        if tokens == 0 {
            (self.scores, self.pending) = (Vec::new(), Vec::new());
            return;
        }
        self.pending.retain(|&(p, _)| (p as usize) < end);
        self.pending.iter_mut().for_each(|(_, new)| new.truncate(tokens));
        self.scores.truncate(tokens);
    }

    fn retain(&mut self, keep: &[bool], decoding: bool) {
        if !decoding {
            (self.scores, self.pending) = (Vec::new(), Vec::new());
            return;
        }
        let mut kept = keep.iter();
        self.scores.retain(|_| *kept.next().unwrap_or(&true));
        self.scores.shrink_to_fit();
    }

    fn bytes(&self) -> usize {
        let pending: usize = self.pending.iter().map(|(_, new)| new.capacity()).sum();
        (self.scores.capacity() + pending) * size_of::<f32>() + self.pending.capacity() * size_of::<(u32, Vec<f32>)>()
    }

    fn fork(&self) -> Box<dyn Observed> {
        Box::new(self.clone())
    }
}

/// Adds zeros until there are `n` numbers, with some room for the next tokens.
fn grow(numbers: &mut Vec<f32>, n: usize) {
    if numbers.capacity() < n {
        memory::reserve(numbers, n + SPARE - numbers.len());
    }
    numbers.resize(n, 0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgetting_bounds_the_queries() {
        let queries = |alpha| Attention { alpha, shared: false }.queries();
        assert_eq!(queries(0.0), Wanted::Newest(1));
        assert_eq!(queries(0.95), Wanted::Newest(270));
        assert_eq!(queries(1.0), Wanted::All);
    }
}
