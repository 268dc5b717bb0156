//! The work of reading a layer, cut into tasks for all threads, and what they found put together.

use std::ops::Range;

use crate::attend::{CHUNK, Partial, TokenWeights};

/// Tokens that are worth a task of their own when one KV head is split over threads: a chunk, as none is cut.
const TOKENS_A_TASK: usize = CHUNK;

/// Queries that are: each task opens the packed pages anew, so fewer are not worth it, and tokens are split instead.
const QUERIES_A_TASK: usize = 128;

/// One KV head of one sequence, and a part of its tokens or of the queries.
#[derive(Clone)]
pub(super) struct Task {
    pub(super) row: usize,
    pub(super) head: usize,
    pub(super) tokens: Range<usize>,
    pub(super) queries: Range<usize>,
}

impl Task {
    fn same_queries(&self, other: &Self) -> bool {
        (self.row, self.head, self.queries.start) == (other.row, other.head, other.queries.start)
    }
}

/// Every KV head of every sequence, of which `tokens` says how many are read; few heads are split further, so that all threads
/// have the same share.
pub(super) fn tasks(tokens: &[usize], queries: usize, heads: usize, threads: usize) -> Vec<Task> {
    let wanted = parts(tokens.len(), threads);
    let cut = |n: usize, least: usize| {
        let parts = wanted.min(n / least).max(1);
        let len = n.div_ceil(parts).max(1);
        (0..n.max(1)).step_by(len).map(move |start| start..(start + len).min(n))
    };
    let mut tasks = Vec::new();
    for (i, &tokens) in tokens.iter().enumerate() {
        let (row, head) = (i / heads, i % heads);
        if queries < 2 * QUERIES_A_TASK {
            tasks.extend(cut(tokens, TOKENS_A_TASK).map(|tokens| Task { row, head, tokens, queries: 0..queries }));
        } else {
            tasks.extend(cut(queries, QUERIES_A_TASK).map(|queries| Task { row, head, tokens: 0..tokens, queries }));
        }
    }
    tasks
}

/// In how many parts to cut each of `n` equal pieces of work so that `threads` threads end at about the same time: the
/// fewest with which none is idle for more than an eighth of it, and each has at least two, as some start late.
fn parts(n: usize, threads: usize) -> usize {
    if threads == 1 {
        return 1;
    }
    let fits = |tasks: usize| tasks >= 2 * threads && tasks.next_multiple_of(threads) * 8 <= tasks * 9;
    (1..2 * threads).find(|parts| fits(n * parts)).unwrap_or(2 * threads)
}

/// What was found for a head's queries: by all tasks that have the same of them.
pub(super) struct Merged {
    /// The first of them.
    pub(super) task: Task,
    pub(super) whole: Partial,
    pub(super) parts: Vec<TokenWeights>,
}

/// Merges partials of the same queries, which follow each other.
pub(super) fn merged(places: Vec<Task>, partials: Vec<Partial>) -> Vec<Merged> {
    let mut merged: Vec<Merged> = Vec::with_capacity(places.len());
    for (task, mut whole) in places.into_iter().zip(partials) {
        let weights = std::mem::take(&mut whole.weights);
        match merged.last_mut().filter(|last| last.task.same_queries(&task)) {
            Some(last) => {
                last.whole.merge(&whole);
                last.parts.push(weights);
            }
            None => merged.push(Merged { task, whole, parts: vec![weights] }),
        }
    }
    merged
}
