//! What methods are told of new tokens and of the queries that come with them.

use std::ops::Range;
use std::sync::Arc;

use super::append::New;
use super::head::KvHead;
use super::layer::chosen;
use crate::attend::Scratch;
use crate::evict::{Eviction, NewQueries};
use crate::memory;
use crate::quantize::{SAMPLES, SHORT};
use crate::tensor::View;

/// Where new tokens of one KV head are.
pub(super) struct At<'a> {
    /// The batch row.
    pub(super) row: usize,
    /// The KV head, one of `heads`.
    pub(super) head: usize,
    pub(super) heads: usize,
    /// Which tokens are not pads; without it none is one.
    pub(super) valid: Option<&'a [bool]>,
    /// Positions seen before.
    pub(super) seen: usize,
}

impl At<'_> {
    /// Those of `n` tokens that are not pads.
    fn tokens(&self, n: usize) -> Vec<usize> {
        (0..n).filter(|&t| self.holds(t)).collect()
    }

    pub(super) fn holds(&self, t: usize) -> bool {
        self.valid.is_none_or(|valid| valid[t])
    }

    /// The query heads, of `all`, that read the KV head.
    fn query_heads(&self, all: usize) -> Range<usize> {
        let group = all / self.heads;
        self.head * group..(self.head + 1) * group
    }
}

/// The queries of batch row `row` at `places`, each a query head and a token, as f32 `[n, dim]`, times `scaling`.
pub(super) fn gather(
    query: &View<'_>,
    row: usize,
    places: impl Iterator<Item = (usize, usize)> + Clone,
    scaling: f32,
) -> Vec<f32> {
    let dim = query.shape()[3];
    let mut q = memory::zeros(places.clone().count() * dim);
    for (q, (head, token)) in q.chunks_exact_mut(dim).zip(places) {
        query.row(row, head, token).to_f32(q);
    }
    for x in &mut q {
        *x *= scaling;
    }
    q
}

/// Tokens `tokens`, for each of them all of `heads`.
fn by_token(tokens: &[usize], heads: Range<usize>) -> Vec<(usize, usize)> {
    tokens.iter().flat_map(|&token| heads.clone().map(move |head| (head, token))).collect()
}

fn add_squares(q: &[f32], sums: &mut [f32]) {
    for (sum, q) in sums.iter_mut().zip(q) {
        *sum += q * q;
    }
}

impl KvHead {
    /// Tells the codec of keys of the squares of queries, of a prompt's of the `newest` ones.
    pub(super) fn observe_squares(&mut self, query: &View<'_>, newest: usize, at: &At<'_>) {
        let [_, heads, n, dim] = query.shape();
        let (own, mut q, mut tokens) = (at.query_heads(heads), vec![0.0; dim], at.tokens(n));
        if n > SHORT {
            tokens.drain(..tokens.len().saturating_sub(newest));
        }
        let (map, stored) = (self.key_map().cloned(), self.keys.tail.dim());
        self.keys.plan_mut().observe(tokens.len(), stored, |t, sums| {
            for head in own.clone() {
                query.row(at.row, head, tokens[t]).to_f32(&mut q);
                match &map {
                    Some(map) => add_squares(&map.query_rows(&q, dim), sums),
                    None => add_squares(&q, sums),
                }
            }
        });
    }

    /// Tells the codec of keys of the squares of a prompt's keys, before the first of them is sealed.
    pub(super) fn observe_keys(&mut self, k: &View<'_>, at: &At<'_>) {
        let [_, _, n, dim] = k.shape();
        if n <= SHORT && !self.positions.is_empty() {
            return;
        }
        let (tokens, mut key) = (at.tokens(n), vec![0.0; dim]);
        self.keys.plan_mut().observe_keys(dim, |sums| {
            for t in tokens {
                k.row(at.row, at.head, t).to_f32(&mut key);
                add_squares(&key, sums);
            }
        });
    }

    /// Tells compensation for keys of a prompt's queries.
    pub(super) fn observe_moment(&mut self, query: &View<'_>, at: &At<'_>) {
        let [_, heads, n, _] = query.shape();
        if n <= SHORT && !self.positions.is_empty() || !self.keys.plan().wants_moment() {
            return;
        }
        let tokens = at.tokens(n);
        let step = tokens.len().div_ceil(SAMPLES).max(1);
        let tokens: Vec<usize> = tokens.into_iter().step_by(step).collect();
        let q = gather(query, at.row, by_token(&tokens, at.query_heads(heads)).into_iter(), 1.0);
        let q = self.in_head(q, query.shape()[3]);
        let dim = self.keys.tail.dim();
        self.keys.plan_mut().observe_moment(&q, dim, chosen());
    }

    /// Tells an eviction of the tokens that were just appended, and of their queries.
    pub(super) fn witness(&mut self, eviction: &Eviction, new: &New<'_>, at: &At<'_>) {
        let n = new.k.shape()[2];
        let tokens = at.tokens(n);
        let Some(&first) = tokens.first().filter(|_| !self.is_gone()) else { return };
        let history = Arc::make_mut(&mut self.history);
        history.origin.get_or_insert((at.seen + first) as u32);
        let prompt = n > SHORT || at.seen == 0;
        if prompt {
            history.prompt += tokens.len();
            history.due = true;
        }
        let attention_follows = n == 1 && at.seen > 0 && eviction.wants_attention();
        let newest = eviction.scorer.queries().of(tokens.len());
        let Some(queries) =
            new.queries.filter(|_| newest > 0 && (prompt || eviction.block.is_some()) && !attention_follows)
        else {
            return;
        };
        let tokens = &tokens[tokens.len() - newest..];
        let own = at.query_heads(queries.query.shape()[1]);
        let places = by_token(tokens, own.clone());
        let q = gather(queries.query, at.row, places.into_iter(), queries.softmax.scaling);
        let q = self.in_head(q, queries.query.shape()[3]);
        let queries = NewQueries {
            q: &q,
            positions: &tokens.iter().map(|&t| (at.seen + t) as u32).collect::<Vec<_>>(),
            heads: own.len(),
            softcap: queries.softmax.softcap,
            sink_logits: queries.sink_logits.map(|logits| &logits[own]),
            prompt,
        };
        let place = self.place(eviction, at.head);
        let mut shared = std::mem::take(&mut self.history);
        if let Some(observed) = &mut Arc::make_mut(&mut shared).observed {
            observed.observe(&self.view(), &queries, place, &mut Scratch::new(chosen()));
        }
        self.history = shared;
    }
}
