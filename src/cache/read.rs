//! Reading a layer: the work cut into tasks, the results put together.

use super::cache::Which;
use super::head::KvHead;
use super::layer::{COPYING, Layer, Shape, expect};
use super::observe::gather;
use super::tasks::{Merged, Task, merged, tasks};
use crate::attend::{
    Attention, KeyChunk, Mask, Partial, Queries, Scratch, Seen, SinkLogits, Softmax, Summary, SummaryQueries,
    Visibility, attend_many, attend_one, chunks_in, key_chunks,
};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::linalg::Mat;
use crate::memory;
use crate::pool;
use crate::tensor::{View, ViewMut};

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
    pub sink_logits: Option<&'a [f32]>,
    /// Whether the attention scores of every token from one query are wanted too.
    pub scores: bool,
}

impl Layer {
    /// Attention over all tokens held, or those that are chosen, written to `out` `[B, Q, Hq, Dv]`. Returns, if they are wanted, the
    /// attention scores of each KV head's tokens from its query heads, row by row and head by head.
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
        let places = tasks.clone();
        let partials = pool::map(work, tasks, |task| {
            self.run(request, &task, chosen[task.row * shape.heads + task.head].as_deref(), group, kernels)
        });
        let mut merged = merged(places, partials);
        self.add_summaries(request, &mut merged, group, kernels);
        self.write_out(&merged, group, shape.value_dim, out);
        let attention = |found: Merged| Attention { whole: found.whole, parts: found.parts };
        Ok(if request.scores { merged.into_iter().map(attention).collect() } else { Vec::new() })
    }

    /// What one query reads of each head, row by row; `None` where that is all.
    fn choose_pages(
        &self,
        request: &Request<'_>,
        shape: Shape,
        group: usize,
        kernels: &'static Kernels,
    ) -> Vec<Option<Vec<KeyChunk<'_>>>> {
        if self.methods.selector.is_none() || request.query.shape()[2] != 1 {
            return self.heads().map(|_| None).collect();
        }
        let heads: Vec<(usize, usize)> =
            (0..self.batch()).flat_map(|row| (0..shape.heads).map(move |head| (row, head))).collect();
        let work = self.heads().filter_map(|head| head.index.as_ref()).map(|index| index.work(shape.key_dim));
        pool::map(group * work.sum::<usize>(), heads, |(row, h)| {
            let head = &self.rows[row][h];
            let index = head.index.as_ref()?;
            let q = queries(request, &Task { row, head: h, tokens: 0..0, queries: 0..1 }, head, group);
            let q = Mat::new(&q, group, head.keys.tail.dim());
            index.chosen(&head.keys.parts(), q, &mut Scratch::new(kernels))
        })
    }

    /// The attention score of every position from the one query of a request, `[B, seen]`, the mean over the query heads; 0 where a
    /// head holds nothing.
    ///
    /// # Errors
    /// As [`Self::attend`].
    pub fn mean_scores(&self, request: &Request<'_>, kernels: &'static Kernels) -> Result<Vec<f32>> {
        let [batch, query_heads, queries, _] = request.query.shape();
        expect("query: tokens", queries, 1)?;
        let value_dim = self.shape().map_or(0, |shape| shape.value_dim);
        let mut out = memory::zeros(batch * query_heads * value_dim);
        let mut out = ViewMut::of_slice(&mut out, [batch, 1, query_heads, value_dim]);
        let attention = self.attend(&Request { scores: true, ..*request }, &mut out, kernels)?;
        Ok(self.mean_of(&attention, query_heads, kernels))
    }

    /// The same from what [`Self::attend`] gave for one query.
    pub(super) fn mean_of(&self, attention: &[Attention], query_heads: usize, kernels: &'static Kernels) -> Vec<f32> {
        let (mut means, mut held) = (memory::zeros(self.batch() * self.seen()), Vec::new());
        let heads = (attention.len() / self.batch().max(1)).max(1);
        for (row, (mean, attention)) in means.chunks_mut(self.seen().max(1)).zip(attention.chunks(heads)).enumerate() {
            for (head, attention) in self.rows[row].iter().zip(attention) {
                let mut scores = memory::zeros(head.positions.len());
                attention.add_to(kernels, &mut scores);
                head.positions.collect_into(0, scores.len(), &mut held);
                for (&position, score) in held.iter().zip(scores) {
                    mean[position as usize] += score / query_heads as f32;
                }
            }
        }
        means
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
            q: queries(request, task, head, group),
            range: task.queries.clone(),
            first_head: task.head * group,
            softmax: request.softmax,
            visible: Visibility::new(
                Seen { mask: request.mask, positions: self.seen(), window: self.window },
                task.row,
                request.query.shape()[2],
                &head.positions,
            ),
            scores: request.scores,
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
        let seen = self.seen();
        if queries == 0 || queries > seen && request.mask.is_none() {
            return refuse(
                "query: tokens",
                queries.to_string(),
                format!("1 to {seen}, the positions seen, without a mask"),
            );
        }
        if query_heads == 0 || !query_heads.is_multiple_of(shape.heads) {
            let expected = format!("a multiple of {} KV heads", shape.heads);
            return refuse("query: heads", query_heads.to_string(), expected);
        }
        if let Some(mask) = request.mask {
            let [mb, mh, mq, mn] = mask.shape();
            let fits = |n: usize, of: usize| n == 1 || n == of;
            // Of what a window hides from all queries, columns may be missing.
            let least = self.window.map_or(seen, |window| seen.min(window - 1 + queries));
            if !(fits(mb, batch) && fits(mh, query_heads) && mq == queries && (least..=seen).contains(&mn)) {
                let expected = format!("[1 or {batch}, 1 or {query_heads}, {queries}, {least}]");
                return refuse("attention mask", format!("{:?}", mask.shape()), expected);
            }
        }
        if let Some(logits) = request.sink_logits {
            expect("sink logits", logits.len(), query_heads)?;
        }
        let expected = [batch, queries, query_heads, shape.value_dim];
        if out.shape() != expected {
            return refuse("out", format!("{:?}", out.shape()), format!("{expected:?}"));
        }
        Ok(shape)
    }

    /// Adds what takes weight beside tokens: learned sink logits, and what stands for tokens that left.
    fn add_summaries(&self, request: &Request<'_>, merged: &mut [Merged], group: usize, kernels: &'static Kernels) {
        let sinks = request.sink_logits.map(SinkLogits);
        for found in merged {
            let head = &self.rows[found.task.row][found.task.head];
            let summaries = sinks.iter().map(|sinks| sinks as &dyn Summary).chain(head.view().summary);
            for summary in summaries {
                let q = if summary.wants_queries() { queries(request, &found.task, head, group) } else { Vec::new() };
                let queries = SummaryQueries {
                    q: Mat::new(&q, q.len() / head.keys.tail.dim(), head.keys.tail.dim()),
                    softmax: request.softmax,
                    each: found.whole.rows() / group,
                    first_head: found.task.head * group,
                    kernels,
                };
                summary.add_to(&queries, &mut found.whole);
            }
        }
    }

    /// Writes what was found.
    fn write_out(&self, merged: &[Merged], group: usize, value_dim: usize, out: &mut ViewMut<'_>) {
        let (mut stored, mut row_out) = (Vec::new(), vec![0.0; value_dim]);
        for Merged { task, whole, .. } in merged {
            let (head, queries) = (&self.rows[task.row][task.head], whole.rows() / group);
            for i in 0..whole.rows() {
                let to = [task.row, task.queries.start + i % queries, task.head * group + i / queries];
                let Some(map) = head.value_map() else {
                    whole.output(i, &mut row_out);
                    out.write_row(to, &row_out);
                    continue;
                };
                stored.resize(map.dim(value_dim), 0.0);
                whole.output(i, &mut stored);
                map.undo(&stored, &mut row_out);
                out.write_row(to, &row_out);
            }
        }
    }

    /// Refuses keys and values for other attention than ours where there is more to attend to than they say.
    ///
    /// # Errors
    /// [`Error::Option`] then.
    pub(super) fn check_materialised(&self) -> Result<()> {
        let biased = |head: &KvHead| {
            let parts = head.keys.parts();
            parts.iter().any(|part| part.tokens > 0 && part.segment.bias(0, part.tokens).is_some())
        };
        if self.methods.compactor.is_some() && self.heads().any(|head| head.summary.is_some() || biased(head)) {
            return Err(Error::Option {
                name: "compact",
                given: "a method that holds weighted slots or a state in place of tokens, while this layer is read by another \
                        attention than kvpack's, which cannot know of them"
                    .into(),
                accepted: "attn_implementation='kvpack' from the first token on".into(),
            });
        }
        Ok(())
    }

    /// Writes all keys or values to `out` `[B, H, n, D]`, dequantised: each at its position, of which `first` is the first that is
    /// wanted, or without that in the order of those that are held. The rest of `out` is left alone.
    pub fn write(&self, which: Which, first: Option<usize>, out: ViewMut<'_>, kernels: &'static Kernels) {
        let [.., dim] = out.shape();
        let work = COPYING * out.shape().iter().product::<usize>();
        pool::map(work, self.heads().zip(out.split()).collect(), |(head, mut out)| {
            let (mut scratch, mut order) = (Scratch::new(kernels), 0..);
            let write = |position: u32, row: &[f32]| {
                let order = order.next().unwrap_or(0);
                if let Some(place) = first.map_or(Some(order), |first| (position as usize).checked_sub(first)) {
                    out.write_row([0, 0, place], row);
                }
            };
            match which {
                Which::Keys => head.each_key(dim, &mut scratch, write),
                Which::Values => head.each_value(dim, &mut scratch, write),
            }
        });
    }
}

/// A task's queries `[G, queries, dim]`, scaled, in the coordinates of its head.
fn queries(request: &Request<'_>, task: &Task, head: &KvHead, group: usize) -> Vec<f32> {
    let heads = task.head * group..(task.head + 1) * group;
    let places = heads.flat_map(|h| task.queries.clone().map(move |i| (h, i)));
    let q = gather(&request.query, task.row, places, request.softmax.scaling);
    head.in_head(q, request.query.shape()[3])
}
