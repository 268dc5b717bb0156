//! One attention layer's cache: the sequences of a batch.

use std::collections::HashSet;
use std::sync::Arc;

use super::head::KvHead;
use super::memory::{ARC_HEADER, Counter, Memory};
use crate::attend::kernels::Kernels;
use crate::attend::{Mask, Partial, Scratch, Softmax, Visibility, attend_many, attend_one};
use crate::error::{Error, Result};
use crate::pool;
use crate::quantize::Codec;
use crate::tensor::{Dtype, View, ViewMut};

/// Tokens that are worth a task of their own when one KV head is split over threads.
const TOKENS_A_TASK: usize = 2048;

/// What the first keys and values fix for all that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The model's dtype.
    pub dtype: Dtype,
    /// KV heads.
    pub heads: usize,
    /// Numbers of a key.
    pub key_dim: usize,
    /// Numbers of a value.
    pub value_dim: usize,
}

/// The KV heads of one sequence.
type Sequence = Vec<KvHead>;

/// Keys and values of one layer for a batch of sequences. A clone shares everything and copies what changes.
#[derive(Clone)]
pub struct Layer {
    codec: Codec,
    shape: Option<Shape>,
    rows: Vec<Arc<Sequence>>,
    /// Positions seen, pads included: the logical length.
    seen: usize,
}

impl Layer {
    /// An empty layer.
    pub fn new(codec: Codec) -> Self {
        Self { codec, shape: None, rows: Vec::new(), seen: 0 }
    }

    /// How tokens are stored.
    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Heads, dims and dtype, once the first tokens came.
    pub fn shape(&self) -> Option<Shape> {
        self.shape
    }

    /// Positions seen.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Sequences of the batch.
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// A KV head of a sequence.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is none of that number.
    pub fn head(&self, row: usize, head: usize) -> Result<&KvHead> {
        self.rows.get(row).and_then(|heads| heads.get(head)).ok_or_else(|| Error::Shape {
            what: "row and head",
            given: format!("row {row}, head {head}"),
            expected: format!("a row below {} and a head below {}", self.batch(), self.shape.map_or(0, |s| s.heads)),
        })
    }

    /// Checks that keys `[B, H, n, Dk]` and values `[B, H, n, Dv]` can be appended.
    ///
    /// # Errors
    /// The first thing that does not fit; nothing has changed then.
    pub fn check(&self, k: &View<'_>, v: &View<'_>) -> Result<()> {
        let shape = self.shape_of(k, v)?;
        if let Some(held) = self.shape {
            expect("keys: KV heads", shape.heads, held.heads)?;
            expect("keys: head dim", shape.key_dim, held.key_dim)?;
            expect("values: head dim", shape.value_dim, held.value_dim)?;
            if shape.dtype != held.dtype {
                return Err(Error::Dtype {
                    what: "keys and values",
                    given: shape.dtype.name().into(),
                    expected: format!("{}, as this cache holds", held.dtype.name()),
                });
            }
            expect("keys: batch size", k.shape()[0], self.batch())?;
        }
        let n = self.seen + k.shape()[2];
        if u32::try_from(n).is_err() {
            return Err(Error::Shape { what: "sequence length", given: n.to_string(), expected: "less than 2^32".into() });
        }
        k.check_magnitude("keys", self.codec.limit())?;
        v.check_magnitude("values", self.codec.limit())
    }

    fn shape_of(&self, k: &View<'_>, v: &View<'_>) -> Result<Shape> {
        let ([b, heads, n, key_dim], [vb, vh, vn, value_dim]) = (k.shape(), v.shape());
        if [b, heads, n, key_dim, value_dim].contains(&0) {
            return Err(Error::Shape {
                what: "keys and values",
                given: format!("{:?} and {:?}", k.shape(), v.shape()),
                expected: "at least one row, head, token and dim".into(),
            });
        }
        if [vb, vh, vn] != [b, heads, n] {
            return Err(Error::Shape {
                what: "values",
                given: format!("{:?}", v.shape()),
                expected: format!("[{b}, {heads}, {n}, dim], as the keys have"),
            });
        }
        if k.dtype() != v.dtype() {
            return Err(Error::Dtype { what: "values", given: v.dtype().name().into(), expected: k.dtype().name().into() });
        }
        self.codec.check_dims(value_dim)?;
        Ok(Shape { dtype: k.dtype(), heads, key_dim, value_dim })
    }

    /// Appends tokens that were [checked](Self::check). `valid` `[B, n]` says which are not pads; pads are not stored.
    ///
    /// # Errors
    /// As `check`, apart from the numbers' magnitude, which is not looked at again.
    pub fn append(&mut self, k: &View<'_>, v: &View<'_>, valid: Option<&[bool]>) -> Result<()> {
        let shape = self.shape_of(k, v)?;
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
            let empty = || Arc::new(vec![KvHead::new(shape.dtype, shape.key_dim, shape.value_dim); heads]);
            self.rows = (0..batch).map(|_| empty()).collect();
        }
        let seen = self.seen;
        let mut work = Vec::with_capacity(batch * heads);
        for (b, row) in self.rows.iter_mut().enumerate().filter(|&(b, _)| source[b] == b) {
            work.extend(Arc::make_mut(row).iter_mut().enumerate().map(|(h, head)| (b, h, head)));
        }
        pool::map(k.shape().iter().product(), work, |(b, h, head)| head.append(k, v, [b, h], row_valid(b), seen));
        for (b, &source) in source.iter().enumerate() {
            if source != b {
                self.rows[b] = Arc::clone(&self.rows[source]);
            }
        }
        self.seen += n;
        Ok(())
    }

    /// Packs what the codec's rule says is due.
    pub fn settle(&mut self) {
        let codec = &self.codec;
        let mut unique: Vec<Arc<Sequence>> = Vec::new();
        let mut which = Vec::with_capacity(self.rows.len());
        for row in self.rows.drain(..) {
            let at = unique.iter().position(|u| Arc::ptr_eq(u, &row));
            which.push(at.unwrap_or(unique.len()));
            if at.is_none() {
                unique.push(row);
            }
        }
        let heads: Vec<&mut KvHead> = unique
            .iter_mut()
            .filter(|row| row.iter().any(|head| head.is_due(codec)))
            .flat_map(|row| Arc::make_mut(row).iter_mut())
            .collect();
        let work = heads.iter().map(|head| head.keys.tail.len() * head.keys.tail.dim()).sum();
        pool::map(work, heads, |head| head.settle(codec));
        self.rows = which.into_iter().map(|i| Arc::clone(&unique[i])).collect();
    }

    /// Attention of `query` `[B, Hq, Q, Dk]`, the `Q` newest positions, over all tokens held; written to `out`
    /// `[B, Q, Hq, Dv]`. `sinks` are learned logits, one a query head, that take weight and add nothing.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Dtype`] when query, mask, sinks or out do not fit.
    pub fn attend(
        &self,
        query: &View<'_>,
        mask: Option<Mask<'_>>,
        softmax: Softmax,
        sinks: Option<&[f32]>,
        out: &ViewMut<'_>,
        kernels: &'static Kernels,
    ) -> Result<()> {
        let shape = self.check_attend(query, mask, sinks, out)?;
        let [batch, query_heads, queries, _] = query.shape();
        let group = query_heads / shape.heads;
        let tokens = self.rows.iter().map(|row| row[0].positions.len()).max().unwrap_or(0);
        let parts = self.parts(tokens, queries, batch * shape.heads);
        let mut tasks = Vec::with_capacity(batch * shape.heads * parts);
        for b in 0..batch {
            for h in 0..shape.heads {
                tasks.extend((0..parts).map(|part| (b, h, part)));
            }
        }
        let work = batch * query_heads * queries * tokens * (shape.key_dim + shape.value_dim) / 2;
        let partials = pool::map(work, tasks, |(b, h, part)| {
            let head = &self.rows[b][h];
            let runs = head.positions.runs();
            let visible = Visibility::new(mask, b, self.seen, queries, runs);
            let mut scratch = Scratch::new(kernels);
            let positions = |first: usize, n: usize, out: &mut Vec<u32>| head.positions.collect(first, n, out);
            let last = head.positions.last().unwrap_or(0);
            if queries == 1 {
                let q = gather(query, b, h * group..(h + 1) * group, 0..1);
                let part_len = tokens.div_ceil(parts);
                let range = part * part_len..(part + 1) * part_len;
                attend_one(&head.view(), &q, softmax, &visible, h * group, last, &positions, range, &mut scratch)
            } else {
                let part_len = queries.div_ceil(parts);
                let range = (part * part_len).min(queries)..((part + 1) * part_len).min(queries);
                let q = gather(query, b, h * group..(h + 1) * group, range.clone());
                attend_many(&head.view(), &q, range.len(), range.start, softmax, &visible, h * group, &positions, &mut scratch)
            }
        });
        let mut row_out = vec![0.0; shape.value_dim];
        let mut partials = partials.into_iter();
        for b in 0..batch {
            for h in 0..shape.heads {
                let mut parts: Vec<Partial> = partials.by_ref().take(parts).collect();
                if queries == 1 {
                    let first = parts.remove(0);
                    parts = vec![parts.iter().fold(first, |mut all, part| {
                        all.merge(part);
                        all
                    })];
                }
                let mut done = 0;
                for mut part in parts {
                    let n = part.max.len() / group;
                    for g in 0..group {
                        for i in 0..n {
                            let (row, head) = (g * n + i, h * group + g);
                            if let Some(sinks) = sinks {
                                part.add_sink(row, sinks[head]);
                            }
                            part.output(row, &mut row_out);
                            // SAFETY: this thread alone writes, after all tasks have ended.
                            unsafe { out.write_row_shared([b, done + i, head], &row_out) };
                        }
                    }
                    done += n;
                }
            }
        }
        Ok(())
    }

    /// In how many tasks one KV head is split, so that few heads use all threads too.
    fn parts(&self, tokens: usize, queries: usize, heads: usize) -> usize {
        let wanted = (2 * pool::threads()).div_ceil(heads);
        let possible = if queries == 1 { tokens / TOKENS_A_TASK } else { queries / 16 };
        if pool::threads() == 1 { 1 } else { wanted.min(possible).max(1) }
    }

    fn check_attend(&self, query: &View<'_>, mask: Option<Mask<'_>>, sinks: Option<&[f32]>, out: &ViewMut<'_>) -> Result<Shape> {
        let [batch, query_heads, queries, dim] = query.shape();
        let shape = self.shape.ok_or_else(|| Error::Shape {
            what: "cache",
            given: "no tokens".into(),
            expected: "at least one token to attend to".into(),
        })?;
        expect("query: batch size", batch, self.batch())?;
        expect("query: head dim", dim, shape.key_dim)?;
        if queries == 0 || queries > self.seen {
            return Err(Error::Shape {
                what: "query: tokens",
                given: queries.to_string(),
                expected: format!("1 to {}, the positions seen", self.seen),
            });
        }
        if query_heads == 0 || !query_heads.is_multiple_of(shape.heads) {
            return Err(Error::Shape {
                what: "query: heads",
                given: query_heads.to_string(),
                expected: format!("a multiple of {} KV heads", shape.heads),
            });
        }
        if let Some(mask) = mask {
            let [mb, mh, mq, mn] = mask.shape();
            let fits = |n: usize, of: usize| n == 1 || n == of;
            if !(fits(mb, batch) && fits(mh, query_heads) && mq == queries && mn == self.seen) {
                return Err(Error::Shape {
                    what: "attention mask",
                    given: format!("{:?}", mask.shape()),
                    expected: format!("[1 or {batch}, 1 or {query_heads}, {queries}, {}]", self.seen),
                });
            }
        }
        if let Some(sinks) = sinks {
            expect("sink logits", sinks.len(), query_heads)?;
        }
        if out.shape() != [batch, queries, query_heads, shape.value_dim] {
            return Err(Error::Shape {
                what: "out",
                given: format!("{:?}", out.shape()),
                expected: format!("{:?}", [batch, queries, query_heads, shape.value_dim]),
            });
        }
        Ok(shape)
    }

    /// Checks that [`Self::crop`] can be done.
    ///
    /// # Errors
    /// [`Error::Crop`] when it can not.
    pub fn check_crop(&self, n: usize, lossy: bool) -> Result<()> {
        let heads = || self.rows.iter().flat_map(|row| row.iter());
        let reachable = if n > self.seen {
            self.seen
        } else if lossy {
            n
        } else {
            heads().map(|head| head.exactly_removable(n, self.seen)).min().unwrap_or(n)
        };
        if reachable < n { Err(Error::Crop { asked: n, reachable }) } else { Ok(()) }
    }

    /// Removes the `n` newest positions. Without `lossy` only tokens that are held exactly are cut; with it a packed
    /// page keeps its codes and a shorter length.
    ///
    /// # Errors
    /// [`Error::Crop`] when that is not possible; nothing has changed then.
    pub fn crop(&mut self, n: usize, lossy: bool) -> Result<()> {
        self.check_crop(n, lossy)?;
        if n > 0 {
            self.seen -= n;
            for row in &mut self.rows {
                for head in Arc::make_mut(row) {
                    head.truncate(self.seen);
                }
            }
        }
        Ok(())
    }

    /// Makes the batch out of the rows at `indices`, which may repeat; rows are shared, not copied.
    ///
    /// # Errors
    /// [`Error::Shape`] when an index is not below the batch size.
    pub fn select(&mut self, indices: &[usize]) -> Result<()> {
        if self.shape.is_none() {
            return Ok(());
        }
        if let Some(&bad) = indices.iter().find(|&&i| i >= self.batch()) {
            return Err(Error::Shape {
                what: "batch index",
                given: bad.to_string(),
                expected: format!("less than the batch size {}", self.batch()),
            });
        }
        if indices.is_empty() {
            return Err(Error::Shape { what: "batch indices", given: "none".into(), expected: "at least one".into() });
        }
        self.rows = indices.iter().map(|&i| Arc::clone(&self.rows[i])).collect();
        Ok(())
    }

    /// Forgets everything but the codec.
    pub fn reset(&mut self) {
        *self = Self::new(self.codec.clone());
    }

    /// Bytes allocated for this layer; what its sequences share is counted once.
    pub fn memory(&self) -> Memory {
        let mut counter = Counter::default();
        let mut seen = HashSet::new();
        for row in &self.rows {
            if seen.insert(Arc::as_ptr(row)) {
                counter.memory.index += ARC_HEADER + size_of::<Sequence>();
                row.iter().for_each(|head| counter.head(head));
            }
        }
        counter.memory.index += self.rows.capacity() * size_of::<Arc<Sequence>>();
        counter.memory
    }

    /// Writes all keys to `out` `[B, H, seen, Dk]`, dequantised, each at its position; other positions are left alone.
    ///
    /// # Errors
    /// [`Error::Shape`] when `out` has another shape.
    pub fn write_keys(&self, out: &ViewMut<'_>, kernels: &'static Kernels) -> Result<()> {
        self.write(out, self.shape.map_or(0, |s| s.key_dim), |head, write| {
            head.each_key(&mut Scratch::new(kernels), write);
        })
    }

    /// Writes all values to `out` `[B, H, seen, Dv]`, as [`Self::write_keys`] does.
    ///
    /// # Errors
    /// [`Error::Shape`] when `out` has another shape.
    pub fn write_values(&self, out: &ViewMut<'_>, kernels: &'static Kernels) -> Result<()> {
        self.write(out, self.shape.map_or(0, |s| s.value_dim), |head, write| {
            head.each_value(&mut Scratch::new(kernels), write);
        })
    }

    fn write(
        &self,
        out: &ViewMut<'_>,
        dim: usize,
        each: impl Fn(&KvHead, &mut dyn FnMut(u32, &[f32])) + Sync + Send,
    ) -> Result<()> {
        let heads = self.shape.map_or(0, |s| s.heads);
        let expected = [self.batch(), heads, self.seen, dim];
        if out.shape() != expected {
            return Err(Error::Shape { what: "out", given: format!("{:?}", out.shape()), expected: format!("{expected:?}") });
        }
        let tasks: Vec<_> = (0..self.batch()).flat_map(|b| (0..heads).map(move |h| (b, h))).collect();
        pool::map(expected.iter().product(), tasks, |(b, h)| {
            // SAFETY: every task writes the rows of its own batch row and head.
            each(&self.rows[b][h], &mut |p, row| unsafe { out.write_row_shared([b, h, p as usize], row) });
        });
        Ok(())
    }
}

/// The queries `range` of query heads `heads` of batch row `b`, as f32 `[heads, queries, dim]`.
fn gather(query: &View<'_>, b: usize, heads: std::ops::Range<usize>, range: std::ops::Range<usize>) -> Vec<f32> {
    let d = query.shape()[3];
    let mut q = vec![0.0; heads.len() * range.len() * d];
    let rows = heads.flat_map(|h| range.clone().map(move |i| (h, i)));
    for (row, (h, i)) in q.chunks_exact_mut(d).zip(rows) {
        query.row(b, h, i).to_f32(row);
    }
    q
}

fn expect(what: &'static str, given: usize, expected: usize) -> Result<()> {
    if given == expected {
        return Ok(());
    }
    Err(Error::Shape { what, given: given.to_string(), expected: expected.to_string() })
}
