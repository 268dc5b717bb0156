//! What is remembered of the queries that met a KV head's tokens.

use super::Moments;
use crate::attend::mat::Mat;
use crate::attend::{Head, Scratch, Voters, add_votes};
use crate::memory;

/// Numbers that there is room for beyond those that are wanted.
const SPARE: usize = 64;

/// Which queries of a forward a method wants to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queries {
    /// None.
    None,
    /// So many of the newest.
    Newest(usize),
    /// All.
    All,
}

/// The newest queries, or what each token received from all queries so far.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// A row a query: token by token, for each the readers' heads. Scaled.
    queries: Vec<f32>,
    /// The tokens' positions.
    positions: Vec<u32>,
    readers: usize,
    softcap: Option<f32>,
    /// What the tokens received, a number a token held.
    scores: Vec<f32>,
    /// What they received from each query of the last forward, which may be taken back, and its position.
    pending: Vec<(u32, Vec<f32>)>,
    /// What is known of the distribution of a prompt's queries.
    pub moments: Moments,
    /// Position of the first token of the sequence.
    pub origin: Option<u32>,
    /// Tokens of prompts, of which a budget may be a share.
    pub prompt: usize,
    /// Whether a prompt was read since tokens were last chosen.
    pub due: bool,
    /// Tokens that stayed then.
    pub kept: usize,
}

/// New queries of one KV head's readers.
#[derive(Clone, Copy)]
pub struct NewQueries<'a> {
    /// `[tokens, readers, dim]`, scaled.
    pub q: &'a [f32],
    /// The tokens' positions.
    pub positions: &'a [u32],
    /// Query heads.
    pub readers: usize,
    /// `s -> c tanh(s / c)` of a logit.
    pub softcap: Option<f32>,
    /// Learned logits, one a reader, that take weight and add nothing.
    pub sinks: Option<&'a [f32]>,
}

impl Observed {
    /// Remembers the `most` newest queries.
    pub fn keep_queries(&mut self, new: &NewQueries<'_>, most: usize) {
        let row = new.q.len() / new.positions.len().max(1);
        memory::append(&mut self.queries, new.q);
        memory::append(&mut self.positions, new.positions);
        let beyond = self.positions.len().saturating_sub(most);
        self.positions.drain(..beyond);
        self.queries.drain(..beyond * row);
        (self.readers, self.softcap) = (new.readers, new.softcap);
    }

    /// Counts what the tokens of `head` receive from new queries; what was received before one more query counts `alpha` of
    /// it. Queries of a forward that may be taken back stay apart for now.
    pub fn count(&mut self, head: &Head<'_>, new: &NewQueries<'_>, alpha: f32, apart: bool, scratch: &mut Scratch) {
        self.fold(alpha);
        let (tokens, n) = (head.positions.len(), new.positions.len());
        let rows = if apart { 1 } else { n };
        let row = new.q.len() / n.max(1);
        for first in (0..n).step_by(rows.max(1)) {
            let (q, positions) = (&new.q[first * row..(first + rows) * row], &new.positions[first..first + rows]);
            let mut received = memory::zeros(tokens);
            let each = |x: &u32| std::iter::repeat_n(*x, new.readers);
            let sinks = new.sinks.map(|sinks| sinks.repeat(rows));
            let ages = (0..rows as i32).rev();
            let voters = Voters {
                q: Mat::new(q, rows * new.readers, row / new.readers),
                positions: &positions.iter().flat_map(each).collect::<Vec<_>>(),
                weights: &ages.flat_map(|age| vec![alpha.powi(age); new.readers]).collect::<Vec<_>>(),
                softcap: new.softcap,
                sinks: sinks.as_deref(),
            };
            add_votes(head, &voters, &mut received, scratch);
            if apart {
                self.pending.push((positions[0], received));
            } else {
                self.add(alpha.powi(rows as i32), &received);
            }
        }
    }

    /// Makes room for what `tokens` tokens receive from the query at `position`, which may be taken back.
    pub fn receive(&mut self, position: u32, tokens: usize, alpha: f32) -> Slot<'_> {
        let last = self.pending.pop();
        self.fold(alpha);
        let alpha = if last.is_some() { alpha } else { 1.0 };
        let (_, mut received) = last.unwrap_or_default();
        grow(&mut received, tokens);
        grow(&mut self.scores, tokens);
        self.pending.push((position, received));
        let received = self.pending.last_mut().map_or(&mut [][..], |(_, received)| received);
        Slot { alpha, scores: &mut self.scores, received }
    }

    /// Counts what was kept apart.
    pub fn fold(&mut self, alpha: f32) {
        for (_, received) in std::mem::take(&mut self.pending) {
            self.add(alpha, &received);
        }
    }

    fn add(&mut self, alpha: f32, received: &[f32]) {
        grow(&mut self.scores, received.len());
        count(alpha, &mut self.scores, received);
    }

    /// Forgets the queries at positions from `end` on, and all but the first `tokens` tokens.
    pub fn truncate(&mut self, end: usize, tokens: usize) {
        if tokens == 0 {
            *self = Self::default(); // a sequence begins anew
            return;
        }
        let row = self.queries.len() / self.positions.len().max(1);
        let kept = self.positions.partition_point(|&p| (p as usize) < end);
        self.positions.truncate(kept);
        self.queries.truncate(kept * row);
        self.pending.retain(|&(p, _)| (p as usize) < end);
        self.pending.iter_mut().for_each(|(_, received)| received.truncate(tokens));
        self.scores.truncate(tokens);
    }

    /// Goes on with the tokens that stay; `decoding` says whether queries are wanted from now on.
    pub fn chosen(&mut self, keep: &[bool], decoding: bool) {
        let kept = keep.iter().filter(|&&keep| keep).count();
        if !decoding {
            *self = Self { origin: self.origin, prompt: self.prompt, kept, ..Self::default() };
            return;
        }
        (self.due, self.kept) = (false, kept);
        let mut kept = keep.iter();
        self.scores.retain(|_| *kept.next().unwrap_or(&true));
        self.scores.shrink_to_fit();
    }

    /// What each token received, from all queries.
    pub fn scores(&self) -> &[f32] {
        &self.scores
    }

    /// The newest queries `[tokens, readers, dim]`.
    pub fn queries(&self) -> &[f32] {
        &self.queries
    }

    /// Tokens whose queries are remembered.
    pub fn tokens(&self) -> usize {
        self.positions.len()
    }

    /// Their positions, one a query.
    pub fn query_positions(&self) -> Vec<u32> {
        self.positions.iter().flat_map(|&p| std::iter::repeat_n(p, self.readers)).collect()
    }

    /// Query heads.
    pub fn readers(&self) -> usize {
        self.readers
    }

    /// The cap of logits.
    pub fn softcap(&self) -> Option<f32> {
        self.softcap
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        let pending: usize = self.pending.iter().map(|(_, received)| received.capacity()).sum();
        (self.queries.capacity() + self.positions.capacity() + self.scores.capacity() + pending) * size_of::<f32>()
            + self.moments.bytes()
            + self.pending.capacity() * size_of::<(u32, Vec<f32>)>()
    }
}

/// Where consecutive tokens put what they receive from a query.
pub struct Slot<'a> {
    alpha: f32,
    scores: &'a mut [f32],
    /// What they received from the query before, and after [`Self::fold`] nothing.
    pub received: &'a mut [f32],
}

impl Slot<'_> {
    /// The part from token `at` on; the rest stays.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        let (scores, received) = (std::mem::take(&mut self.scores), std::mem::take(&mut self.received));
        let ((scores, later_scores), (received, later)) = (scores.split_at_mut(at), received.split_at_mut(at));
        (self.scores, self.received) = (scores, received);
        Self { alpha: self.alpha, scores: later_scores, received: later }
    }

    /// Counts what was received from the query before.
    pub fn fold(&mut self) {
        count(self.alpha, self.scores, self.received);
        self.received.fill(0.0);
    }
}

/// Counts what tokens received from one more query; what they had before counts `alpha` of it.
fn count(alpha: f32, scores: &mut [f32], received: &[f32]) {
    for (score, received) in scores.iter_mut().zip(received) {
        *score = alpha * *score + received;
    }
}

/// Adds zeros until there are `n` numbers, with some room for the next tokens.
fn grow(numbers: &mut Vec<f32>, n: usize) {
    if numbers.capacity() < n {
        memory::reserve(numbers, n + SPARE - numbers.len());
    }
    numbers.resize(n, 0.0);
}
