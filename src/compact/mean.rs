//! `RazorAttention`'s compensation token (arXiv 2407.15891): the mean of the tokens that left a head, with their number as weight.

#![forbid(unsafe_code)]

use std::any::Any;
use std::sync::Arc;

use super::{Compacted, Compactor, Leaving};
use crate::attend::{Partial, Summary, SummaryQueries, cap};
use crate::memory;

/// All that left is one slot: their mean key and mean value, and the logarithm of their number added to its logit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mean;

/// That slot.
#[derive(Clone, Debug, PartialEq)]
struct MeanSlot {
    /// Tokens that it stands for.
    tokens: usize,
    key: Vec<f32>,
    value: Vec<f32>,
}

impl MeanSlot {
    fn of(leaving: &Leaving<'_>, before: Option<&Self>) -> Self {
        let (n, old) = (leaving.positions.len(), before.map_or(0, |before| before.tokens));
        let mean = |rows: &[f32], before: Option<&Vec<f32>>| {
            let dim = rows.len() / n;
            let mut sums = memory::zeros::<f64>(dim);
            for row in rows.chunks_exact(dim) {
                sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x));
            }
            if let Some(before) = before {
                sums.iter_mut().zip(before).for_each(|(sum, &x)| *sum += f64::from(x) * old as f64);
            }
            memory::collected(sums.iter().map(|sum| (sum / (n + old) as f64) as f32))
        };
        Self {
            tokens: n + old,
            key: mean(leaving.keys, before.map(|before| &before.key)),
            value: mean(leaving.values, before.map(|before| &before.value)),
        }
    }
}

impl Summary for MeanSlot {
    fn add_to(&self, queries: &SummaryQueries<'_>, partial: &mut Partial) {
        for row in 0..partial.rows() {
            let mut logit = [queries.q.row(row).iter().zip(&self.key).map(|(q, k)| q * k).sum()];
            cap(queries.softmax.softcap, &mut logit);
            partial.add(row, logit[0] + (self.tokens as f32).ln(), &self.value);
        }
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + (self.key.capacity() + self.value.capacity()) * size_of::<f32>()
    }
}

impl Compactor for Mean {
    fn compact(&self, leaving: &Leaving<'_>, before: Option<&Arc<dyn Compacted>>) -> Option<Arc<dyn Compacted>> {
        if leaving.positions.is_empty() {
            return before.cloned();
        }
        let before = before.and_then(|before| (&**before as &dyn Any).downcast_ref());
        Some(Arc::new(MeanSlot::of(leaving, before)))
    }
}
