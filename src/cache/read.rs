//! Reading a layer: the work cut into tasks, the results put together.

use std::ops::Range;

use super::cache::Side;
use super::head::KvHead;
use super::layer::{COPYING, Layer, Shape, expect};
use crate::attend::kernels::Kernels;
use crate::attend::mat::Mat;
use crate::attend::{
    Attention, CHUNK, KeyChunk, Mask, Partial, Queries, Received, Scratch, Softmax, Visibility, attend_many,
    attend_one, chunks_in, key_chunks,
};
use crate::error::{Error, Result};
use crate::memory;
use crate::pool;
use crate::tensor::{View, ViewMut};

/// Tokens that are worth a task of their own when one KV head is split over threads: a chunk, as none is cut.
const TOKENS_A_TASK: usize = CHUNK;

/// Queries that are: each task opens the packed pages anew, so fewer are not worth it, and tokens are split instead.
const QUERIES_A_TASK: usize = 128;

/// What is asked of a layer.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// Queries `[B, Hq, Q, Dk]` of the `Q` newest positions, rotated.
    pub query: View<'a>,
    /// Which positions each query sees; without it, causality.
    pub mask: Option<Mask<'a>>,
    /// Scaling and cap of the logits.
    pub softmax: Softmax,
    /// Learned logits, one a query head, that take weight and add nothing.
    pub sinks: Option<&'a [f32]>,
    /// Whether the attention that every token received from one query is wanted too.
    pub received: bool,
}

/// One KV head of one sequence, and a part of its tokens or of the queries.
struct Task {
    row: usize,
    head: usize,
    tokens: Range<usize>,
    queries: Range<usize>,
}

impl Layer {
    /// Attention over all tokens held, or those that are chosen, written to `out` `[B, Q, Hq, Dv]`. Returns, if it is wanted, what
    /// each KV head's tokens received from its readers, row by row and head by head.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Dtype`] when something of the request, or `out`, does not fit.
    pub fn attend(
        &self,
        request: &Request<'_>,
        out: &mut ViewMut<'_>,
        kernels: &'static Kernels,
    ) -> Result<Vec<Attention>> {
        let shape = self.check_request(request, out)?;
        let [_, query_heads, queries, _] = request.query.shape();
        let group = query_heads / shape.heads;
        let chosen = self.choose_pages(request, shape, group, kernels);
        let read = |(head, chosen): (&KvHead, &Option<Vec<KeyChunk<'_>>>)| match chosen {
            Some(chunks) => chunks.iter().map(|chunk| chunk.tokens).sum(),
            None => head.positions.len(),
        };
        let tokens: Vec<usize> = self.heads().zip(&chosen).map(read).collect();
        let work = group * queries * tokens.iter().sum::<usize>() * (shape.key_dim + shape.value_dim);
        let tasks = tasks(&tokens, queries, shape.heads, pool::threads_for(work));
        let places: Vec<_> = tasks.iter().map(|task| (task.row, task.head, task.queries.start)).collect();
        let partials = pool::map(work, tasks, |task| {
            self.run(request, &task, chosen[task.row * shape.heads + task.head].as_deref(), group, kernels)
        });
        let merged = merged(places, partials, request.sinks, group);
        write_out(&merged, group, shape.value_dim, out);
        let attention = |(_, whole, parts)| Attention { whole, parts };
        Ok(if request.received { merged.into_iter().map(attention).collect() } else { Vec::new() })
    }

    /// What one query reads of each head, row by row; `None` where that is all.
    fn choose_pages(
        &self,
        request: &Request<'_>,
        shape: Shape,
        group: usize,
        kernels: &'static Kernels,
    ) -> Vec<Option<Vec<KeyChunk<'_>>>> {
        let Some(quest) = self.quest.filter(|_| request.query.shape()[2] == 1) else {
            return self.heads().map(|_| None).collect();
        };
        let heads: Vec<(usize, usize)> =
            (0..self.batch()).flat_map(|row| (0..shape.heads).map(move |head| (row, head))).collect();
        let pages: usize = self.heads().map(|head| head.bounds.pages()).sum();
        pool::map(2 * group * pages * shape.key_dim, heads, |(row, head)| {
            let q = gather(request, &Task { row, head, tokens: 0..0, queries: 0..1 }, group);
            let (own, q) = (&self.rows[row][head], Mat::new(&q, group, shape.key_dim));
            own.bounds.chosen(quest, &own.keys.parts(), q, &mut Scratch::new(kernels))
        })
    }

    /// What every position receives from the one query of a request, `[B, seen]`, the mean over the query heads; 0 where a head
    /// holds nothing.
    ///
    /// # Errors
    /// As [`Self::attend`].
    pub fn received(&self, request: &Request<'_>, kernels: &'static Kernels) -> Result<Vec<f32>> {
        let [batch, query_heads, queries, _] = request.query.shape();
        expect("query: tokens", queries, 1)?;
        let value_dim = self.shape().map_or(0, |shape| shape.value_dim);
        let mut attended = memory::zeros(batch * query_heads * value_dim);
        let mut attended = ViewMut::of_slice(&mut attended, [batch, 1, query_heads, value_dim]);
        let attention = self.attend(&Request { received: true, ..*request }, &mut attended, kernels)?;
        let (mut means, mut held) = (memory::zeros(self.batch() * self.seen()), Vec::new());
        let heads = (attention.len() / self.batch().max(1)).max(1);
        for (row, (mean, attention)) in means.chunks_mut(self.seen().max(1)).zip(attention.chunks(heads)).enumerate() {
            for (head, attention) in self.rows[row].iter().zip(attention) {
                let mut received = memory::zeros(head.positions.len());
                attention.add_to(kernels, &mut received);
                head.positions.collect_into(0, received.len(), &mut held);
                for (&position, share) in held.iter().zip(received) {
                    mean[position as usize] += share / query_heads as f32;
                }
            }
        }
        Ok(means)
    }

    fn run(
        &self,
        request: &Request<'_>,
        task: &Task,
        chosen: Option<&[KeyChunk<'_>]>,
        group: usize,
        kernels: &'static Kernels,
    ) -> Partial {
        let head: &KvHead = &self.rows[task.row][task.head];
        let queries = Queries {
            q: gather(request, task, group),
            range: task.queries.clone(),
            first_head: task.head * group,
            softmax: request.softmax,
            visible: Visibility::new(request.mask, task.row, self.seen(), request.query.shape()[2], &head.positions),
            received: request.received,
        };
        let (view, mut scratch) = (head.view(), Scratch::new(kernels));
        if request.query.shape()[2] == 1 {
            let all;
            let chunks = if let Some(chunks) = chosen {
                chunks
            } else {
                all = key_chunks(&view.keys);
                &all
            };
            attend_one(&view, &queries, chunks_in(chunks, &task.tokens), chosen.is_some(), &mut scratch)
        } else {
            attend_many(&view, &queries, task.tokens.clone(), &mut scratch)
        }
    }

    fn check_request(&self, request: &Request<'_>, out: &ViewMut<'_>) -> Result<Shape> {
        let [batch, query_heads, queries, dim] = request.query.shape();
        let shape = self.shape().ok_or_else(|| Error::Shape {
            what: "cache",
            given: "no tokens".into(),
            expected: "at least one token to attend to".into(),
        })?;
        expect("query: batch size", batch, self.batch())?;
        expect("query: head dim", dim, shape.key_dim)?;
        let refuse =
            |what, given: String, expected: String| -> Result<Shape> { Err(Error::Shape { what, given, expected }) };
        if queries == 0 || queries > self.seen() {
            return refuse("query: tokens", queries.to_string(), format!("1 to {}, the positions seen", self.seen()));
        }
        if query_heads == 0 || !query_heads.is_multiple_of(shape.heads) {
            let expected = format!("a multiple of {} KV heads", shape.heads);
            return refuse("query: heads", query_heads.to_string(), expected);
        }
        if let Some(mask) = request.mask {
            let [mb, mh, mq, mn] = mask.shape();
            let fits = |n: usize, of: usize| n == 1 || n == of;
            if !(fits(mb, batch) && fits(mh, query_heads) && mq == queries && mn == self.seen()) {
                let expected = format!("[1 or {batch}, 1 or {query_heads}, {queries}, {}]", self.seen());
                return refuse("attention mask", format!("{:?}", mask.shape()), expected);
            }
        }
        if let Some(sinks) = request.sinks {
            expect("sink logits", sinks.len(), query_heads)?;
        }
        let expected = [batch, queries, query_heads, shape.value_dim];
        if out.shape() != expected {
            return refuse("out", format!("{:?}", out.shape()), format!("{expected:?}"));
        }
        Ok(shape)
    }

    /// Writes all keys or values to `out` `[B, H, n, D]`, dequantised: each at its position, or where it is `compact` in the order
    /// of those that are held. The rest of `out` is left alone.
    pub fn write(&self, side: Side, compact: bool, out: ViewMut<'_>, kernels: &'static Kernels) {
        let work = COPYING * out.shape().iter().product::<usize>();
        pool::map(work, self.heads().zip(out.split()).collect(), |(head, mut out)| {
            let (mut scratch, mut order) = (Scratch::new(kernels), 0..);
            let write = |position: u32, row: &[f32]| {
                let order = order.next().unwrap_or(0);
                out.write_row([0, 0, if compact { order } else { position as usize }], row);
            };
            match side {
                Side::Keys => head.each_key(&mut scratch, write),
                Side::Values => head.each_value(&mut scratch, write),
            }
        });
    }
}

/// Every KV head of every sequence, of which `tokens` says how many are read; few heads are split further, so that all threads
/// have the same share.
fn tasks(tokens: &[usize], queries: usize, heads: usize, threads: usize) -> Vec<Task> {
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

/// A task's queries as f32 `[G, queries, dim]`, scaled.
fn gather(request: &Request<'_>, task: &Task, group: usize) -> Vec<f32> {
    let d = request.query.shape()[3];
    let heads = task.head * group..(task.head + 1) * group;
    let mut q = memory::zeros(group * task.queries.len() * d);
    let rows = heads.flat_map(|h| task.queries.clone().map(move |i| (h, i)));
    for (row, (h, i)) in q.chunks_exact_mut(d).zip(rows) {
        request.query.row(task.row, h, i).to_f32(row);
    }
    for x in &mut q {
        *x *= request.softmax.scaling;
    }
    q
}

/// A head's queries, which task they began with, and what was found.
type Merged = ((usize, usize, usize), Partial, Vec<Received>);

/// Merges partials of the same queries, which follow each other, and adds the sinks.
fn merged(
    places: Vec<(usize, usize, usize)>,
    partials: Vec<Partial>,
    sinks: Option<&[f32]>,
    group: usize,
) -> Vec<Merged> {
    let mut merged: Vec<Merged> = Vec::with_capacity(places.len());
    for (place, mut partial) in places.into_iter().zip(partials) {
        let received = std::mem::take(&mut partial.received);
        match merged.last_mut() {
            Some((last, all, parts)) if *last == place => {
                all.merge(&partial);
                parts.push(received);
            }
            _ => merged.push((place, partial, vec![received])),
        }
    }
    for ((_, head, _), partial, _) in &mut merged {
        let queries = partial.rows() / group;
        for i in 0..partial.rows() {
            if let Some(sinks) = sinks {
                partial.add_sink(i, sinks[*head * group + i / queries]);
            }
        }
    }
    merged
}

/// Writes what was found.
fn write_out(merged: &[Merged], group: usize, value_dim: usize, out: &mut ViewMut<'_>) {
    let mut row_out = vec![0.0; value_dim];
    for &((row, head, first), ref partial, _) in merged {
        let queries = partial.rows() / group;
        for i in 0..partial.rows() {
            partial.output(i, &mut row_out);
            out.write_row([row, first + i % queries, head * group + i / queries], &row_out);
        }
    }
}
