//! New tokens: what comes with a forward goes to the exact tails, and methods are told of it.

use std::ops::Range;
use std::sync::Arc;

use super::head::KvHead;
use super::layer::{COPYING, Layer, expect};
use super::observe::At;
use crate::attend::Softmax;
use crate::error::{Error, Result};
use crate::linalg::Map;
use crate::memory;
use crate::pool;
use crate::prune::Streaming;
use crate::quantize::Codecs;
use crate::tensor::{Rows, Slice, View};

/// Tokens of a long prompt that are copied and packed at a time.
const STEP: usize = 256;

/// Tokens to append.
#[derive(Clone, Copy)]
pub struct New<'a> {
    /// Keys `[B, H, n, Dk]`.
    pub k: &'a View<'a>,
    /// Values `[B, H, n, Dv]`.
    pub v: &'a View<'a>,
    /// Which are not pads `[B, n]`; pads are not stored. Without it none is one.
    pub valid: Option<&'a [bool]>,
    /// What attends to them, for methods that want to know it.
    pub queries: Option<LayerQueries<'a>>,
    /// Whether what is due is flushed too, as [`Layer::flush`] does.
    pub flush: bool,
}

/// The queries that come with new tokens.
#[derive(Clone, Copy)]
pub struct LayerQueries<'a> {
    /// `[B, Hq, n, Dk]`, rotated.
    pub query: &'a View<'a>,
    /// Scaling and cap of the logits.
    pub softmax: Softmax,
    /// Learned logits, one a query head, that take weight and add nothing.
    pub sink_logits: Option<&'a [f32]>,
}

impl Layer {
    /// Appends tokens that were [checked](Self::check).
    ///
    /// # Errors
    /// As `check`, apart from the numbers' magnitude, which is not looked at again; [`Error::Shape`] when the queries'
    /// shape does not fit; [`Error::Option`] when an eviction wants to see queries and there are none.
    pub fn append(&mut self, new: &New<'_>) -> Result<()> {
        let New { k, v, valid, queries, flush } = *new;
        let shape = self.shape_of(k, v)?;
        self.check_seen(queries)?;
        let query = queries.map(|queries| queries.query).filter(|_| self.wants_queries());
        if let Some(query) = query {
            let [batch, heads, n, dim] = query.shape();
            expect("query: batch size", batch, k.shape()[0])?;
            expect("query: tokens", n, k.shape()[2])?;
            expect("query: head dim", dim, shape.key_dim)?;
            expect("query: heads beyond a multiple of the KV heads", heads % shape.heads, 0)?;
        }
        let [batch, heads, n, _] = k.shape();
        if let Some(valid) = valid {
            expect("valid: length", valid.len(), batch * n)?;
        }
        let row_valid = |b: usize| valid.map(|valid| &valid[b * n..(b + 1) * n]);
        // Rows of an expanded prompt (beams, returned sequences) arrive as copies: hold them once.
        let source: Vec<usize> = (0..batch)
            .map(|b| {
                let same = |a: usize| row_valid(a) == row_valid(b) && k.same_rows(a, b) && v.same_rows(a, b);
                if self.seen == 0 && b > 0 && same(b - 1) { b - 1 } else { b }
            })
            .collect();
        if self.shape.is_none() {
            self.shape = Some(shape);
            let empty = |h| KvHead::new(h, shape, &self.methods);
            self.rows = (0..batch).map(|_| Arc::new((0..heads).map(empty).collect())).collect();
        }
        let (seen, centers, methods) = (self.seen, self.centers(), Arc::clone(&self.methods));
        // Of a first prompt nobody will read what the window has passed.
        let first = if flush && self.heads().all(|head| head.positions.is_empty()) {
            self.passed(seen + n).saturating_sub(seen)
        } else {
            0
        };
        // With an eviction nothing is packed before it was chosen.
        let codecs = (flush && methods.eviction.is_none()).then_some(&methods.codecs);
        let mut work = Vec::with_capacity(batch * heads);
        for (b, row) in self.rows.iter_mut().enumerate().filter(|&(b, _)| source[b] == b) {
            work.extend(Arc::make_mut(row).iter_mut().enumerate().map(|(h, head)| (b, h, head)));
        }
        let numbers = batch * heads * n * (shape.key_dim + shape.value_dim);
        let appended = pool::map(numbers * codecs.map_or(COPYING, |_| methods.work()), work, |(b, h, head)| {
            let wants = head.codecs(&methods.codecs).keys.wants();
            let place = At { row: b, head: h, heads, valid: row_valid(b), seen };
            if let Some((query, newest)) = query.zip(wants.squares) {
                head.observe_squares(query, newest, &place);
            }
            if wants.keys {
                head.observe_keys(k, &place);
            }
            if let Some(query) = query.filter(|_| wants.moment) {
                head.observe_moment(query, &place);
            }
            let reached = head.append(k, v, &place, first..n, codecs, centers)?;
            if let Some(eviction) = &methods.eviction {
                head.witness(eviction, new, &place);
            }
            Ok(reached)
        });
        let reached = appended.into_iter().collect::<Result<Vec<_>>>()?;
        for (b, &source) in source.iter().enumerate() {
            if source != b {
                self.rows[b] = Arc::clone(&self.rows[source]);
            }
        }
        self.seen += n;
        self.final_to = reached.into_iter().fold(self.final_to, usize::max);
        if first > 0 {
            self.came_to(seen + first);
        }
        if flush && (self.eviction().is_some() || self.is_pruned()) {
            return self.flush();
        }
        self.index();
        Ok(())
    }

    /// Whether so many new tokens are more than are held exactly anyway, and wait for nothing.
    pub(super) fn is_long(&self, new: usize) -> bool {
        new > self.methods.all_codecs().map(Codecs::window).max().unwrap_or(0)
            || self.window.is_some_and(|window| new >= window)
    }

    fn check_seen(&self, queries: Option<LayerQueries<'_>>) -> Result<()> {
        if queries.is_none() && self.methods.all_codecs().any(|codecs| codecs.keys.wants().needed) {
            return Err(Error::Option {
                name: "quantize",
                given: "a codec that chooses channels by the queries that look at them".into(),
                accepted:
                    "another one; or, where the model's kind supports it, attn_implementation='kvpack': this layer's \
                           attention is not kvpack's"
                        .into(),
            });
        }
        match self.eviction() {
            Some(eviction) if eviction.wants_queries() && queries.is_none() => Err(Error::Option {
                name: "evict",
                given: "a method that scores tokens by the queries that attend to them".into(),
                accepted: "KeyDiff, L2Norm, StreamingLLM, Longformer, Random, which look at keys or positions alone; or, where \
                           the model's kind supports it, attn_implementation='kvpack': this layer's attention is not kvpack's"
                    .into(),
            }),
            _ => Ok(()),
        }
    }
}

impl KvHead {
    /// Appends `new` tokens. With codecs it packs what is due as it goes, so that a long prompt is never copied whole. Returns the
    /// length to which a crop may go then.
    fn append(
        &mut self,
        k: &View<'_>,
        v: &View<'_>,
        at: &At<'_>,
        new: Range<usize>,
        codecs: Option<&Codecs>,
        centers: bool,
    ) -> Result<usize> {
        if !self.holds_all()
            && let Some(first) = new.clone().find(|&t| at.holds(t))
        {
            Arc::make_mut(&mut self.history).origin.get_or_insert((at.seen + first) as u32);
        }
        if self.is_gone() {
            return Ok(0);
        }
        if centers && self.positions.is_empty() {
            self.center = Some(mean(k, at));
        }
        self.keys.headless |= new.start > 0;
        self.values.headless |= new.start > 0;
        let step = if codecs.is_some() { STEP } else { new.len().max(1) };
        let as_they_are = self.center.is_none() && self.key_map().is_none() && self.value_map().is_none();
        // Of a first prompt a streaming head need not store what it would let go at once.
        let passed = if codecs.is_some() && self.positions.is_empty() { self.passed_at_once(at, &new) } else { None };
        let passed = passed.unwrap_or(new.end..new.end);
        if !passed.is_empty() {
            self.absorb_new(k, v, at, passed.clone());
        }
        let parts = [new.start..passed.start, passed.end..new.end];
        for tokens in parts.into_iter().flat_map(|part| steps(part, step)) {
            if as_they_are && at.valid.is_none() {
                extend(&mut self.keys.tail, k, at, tokens.clone());
                extend(&mut self.values.tail, v, at, tokens.clone());
                self.positions.push(at.seen + tokens.start, tokens.len());
            } else {
                let tokens: Vec<usize> = tokens.filter(|&t| at.holds(t)).collect();
                self.keys.tail.reserve(tokens.len());
                self.values.tail.reserve(tokens.len());
                for t in tokens {
                    let (key, value) = (k.row(at.row, at.head, t), v.row(at.row, at.head, t));
                    if as_they_are {
                        self.keys.tail.extend(key);
                        self.values.tail.extend(value);
                    } else {
                        self.push(key, value);
                    }
                    self.positions.push(at.seen + t, 1);
                }
            }
            if let Some(codecs) = codecs {
                self.seal(codecs)?;
            }
        }
        let window = self.streaming().map_or(0, |streaming| streaming.window);
        Ok(if passed.is_empty() { 0 } else { at.seen + passed.end + window })
    }

    /// Of the first tokens of a sequence those between the first and the newest ones that a streaming head holds.
    fn passed_at_once(&self, at: &At<'_>, new: &Range<usize>) -> Option<Range<usize>> {
        let Streaming { sinks, window, .. } = self.streaming()?;
        let held: Vec<usize> = new.clone().filter(|&t| at.holds(t)).collect();
        let newest = held.len().checked_sub(*window).filter(|newest| newest > sinks)?;
        Some(held[*sinks]..held[newest])
    }

    /// Has what stands for tokens that leave stand for these, which are not stored at all.
    fn absorb_new(&mut self, k: &View<'_>, v: &View<'_>, at: &At<'_>, tokens: Range<usize>) {
        let Some(compactor) = self.streaming().and_then(|streaming| streaming.compactor.clone()) else { return };
        let (mut keys, mut values, mut positions) = (Vec::new(), Vec::new(), Vec::new());
        for t in tokens.filter(|&t| at.holds(t)) {
            let [key, value] = self.in_coordinates(k.row(at.row, at.head, t), v.row(at.row, at.head, t));
            memory::append(&mut keys, &key);
            memory::append(&mut values, &value);
            positions.push((at.seen + t) as u32);
        }
        self.absorb(&*compactor, at.head, [&keys, &values], &positions);
    }

    /// A key and a value in the head's coordinates.
    fn in_coordinates(&self, key: Slice<'_>, value: Slice<'_>) -> [Vec<f32>; 2] {
        let (mut key, value) = (key.numbers(), value.numbers());
        if let Some(center) = &self.center {
            key.iter_mut().zip(&**center).for_each(|(x, center)| *x -= center);
        }
        let mapped = |map: Option<&Arc<Map>>, x: Vec<f32>| match map {
            Some(map) => map.apply_rows(&x, x.len()),
            None => x,
        };
        [mapped(self.key_map(), key), mapped(self.value_map(), value)]
    }

    /// Appends a token that is not held as it is.
    fn push(&mut self, key: Slice<'_>, value: Slice<'_>) {
        let [key, value] = self.in_coordinates(key, value);
        self.keys.tail.push(&key);
        self.values.tail.push(&value);
    }
}

/// A range, so many at a time.
fn steps(range: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(step).map(move |start| start..range.end.min(start + step))
}

/// Appends the rows of some tokens, at once where they follow each other in memory.
fn extend(tail: &mut Rows, x: &View<'_>, at: &At<'_>, tokens: Range<usize>) {
    tail.reserve(tokens.len());
    match x.run(at.row, at.head, tokens.clone()) {
        Some(run) => tail.extend(run),
        None => tokens.for_each(|t| tail.extend(x.row(at.row, at.head, t))),
    }
}

/// The mean of the keys that are no pads.
fn mean(k: &View<'_>, at: &At<'_>) -> Arc<[f32]> {
    let [_, _, n, dim] = k.shape();
    let (mut sum, mut key, mut tokens) = (vec![0.0f64; dim], vec![0.0; dim], 0);
    for t in (0..n).filter(|&t| at.holds(t)) {
        k.row(at.row, at.head, t).to_f32(&mut key);
        sum.iter_mut().zip(&key).for_each(|(sum, &x)| *sum += f64::from(x));
        tokens += 1;
    }
    sum.into_iter().map(|sum| (sum / f64::from(tokens.max(1))) as f32).collect()
}
