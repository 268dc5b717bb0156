//! What one KV head of one sequence holds.

use std::sync::Arc;

use super::column::{Column, ColumnMark};
use super::layer::chosen;
use super::memory::Counter;
use crate::attend::mat::MatMut;
use crate::attend::{
    Bounds, BoundsMark, CHUNK, Head, KeyChunk, Positions, Quest, Scratch, key_chunks, padded, tile_rows,
};
use crate::evict::Observed;
use crate::memory;
use crate::quantize::{Codec, KeyPage, SAMPLES, SHORT, ValuePage};
use crate::tensor::{Dtype, Rows, View};

/// Tokens of a long prompt that are copied and packed at a time.
const APPEND_STEP: usize = 256;

/// Keys, values and positions of the tokens of one KV head.
#[derive(Clone)]
pub struct KvHead {
    pub(super) keys: Column<KeyPage>,
    pub(super) values: Column<ValuePage>,
    pub(super) positions: Positions,
    /// What an eviction remembers; copied before a change, as pages are.
    pub(super) observed: Arc<Observed>,
    /// The pages among which queries choose.
    pub(super) bounds: Bounds,
    /// What keys are held less of, where their codec wants that: the mean of the first ones.
    pub(super) center: Option<Arc<[f32]>>,
}

/// What a head was like: see [`KvHead::mark`].
pub(super) struct HeadMark {
    keys: ColumnMark<KeyPage>,
    values: ColumnMark<ValuePage>,
    runs: usize,
    observed: Arc<Observed>,
    bounds: BoundsMark,
    center: Option<Arc<[f32]>>,
}

impl KvHead {
    /// An empty one, number `head` of its layer.
    pub(super) fn new(head: usize, dtype: Dtype, key_dim: usize, value_dim: usize) -> Self {
        Self {
            keys: Column::new(head, Rows::new(dtype, key_dim)),
            values: Column::new(head, Rows::new(dtype, value_dim)),
            positions: Positions::default(),
            observed: Arc::default(),
            bounds: Bounds::default(),
            center: None,
        }
    }

    /// Remembers what it is like, as [`Column::mark`] does.
    pub(super) fn mark(&mut self) -> HeadMark {
        HeadMark {
            keys: self.keys.mark(),
            values: self.values.mark(),
            runs: self.positions.room(),
            observed: Arc::clone(&self.observed),
            bounds: self.bounds.mark(),
            center: self.center.clone(),
        }
    }

    /// Makes it what it was, when `seen` positions had been seen.
    pub(super) fn restore(&mut self, mark: &HeadMark, seen: usize) {
        self.keys.restore(&mark.keys);
        self.values.restore(&mark.values);
        self.positions.restore(seen, mark.runs);
        self.observed.clone_from(&mark.observed);
        self.bounds.restore(mark.bounds);
        self.center.clone_from(&mark.center);
    }

    /// Gives back what was kept for [`Self::restore`].
    pub(super) fn release(&mut self) {
        self.keys.release();
        self.values.release();
    }

    /// Appends the tokens of head `h` of batch row `b` for which `valid` says true (without it all), at positions
    /// from `seen` on. With a codec it packs what is due as it goes, so that a long prompt is never copied whole.
    #[allow(clippy::too_many_arguments)] // what is new, where it goes, and how
    pub(super) fn append(
        &mut self,
        k: &View<'_>,
        v: &View<'_>,
        [b, h]: [usize; 2],
        valid: Option<&[bool]>,
        seen: usize,
        codec: Option<&Codec>,
        centers: bool,
    ) {
        let n = k.shape()[2];
        if centers && self.positions.is_empty() {
            self.center = Some(mean(k, [b, h], valid));
        }
        let step = if codec.is_some() { APPEND_STEP } else { n };
        for start in (0..n).step_by(step) {
            let tokens = (start..n.min(start + step)).filter(|&t| valid.is_none_or(|valid| valid[t]));
            let kept = tokens.clone().count();
            self.keys.tail.reserve(kept);
            self.values.tail.reserve(kept);
            for t in tokens {
                match &self.center {
                    Some(center) => self.keys.tail.extend_less(k.row(b, h, t), center),
                    None => self.keys.tail.extend(k.row(b, h, t)),
                }
                self.values.tail.extend(v.row(b, h, t));
                self.positions.push(seen + t, 1);
            }
            if let Some(codec) = codec {
                self.settle(codec);
            }
        }
    }

    /// Tells the methods of the queries of head `h`'s readers in batch row `b`, `kv_heads` heads in all.
    pub(super) fn observe(&mut self, query: &View<'_>, [b, h]: [usize; 2], kv_heads: usize, valid: Option<&[bool]>) {
        let [_, heads, n, dim] = query.shape();
        let (readers, mut q) = (heads / kv_heads, vec![0.0; dim]);
        let tokens: Vec<usize> = (0..n).filter(|&t| valid.is_none_or(|valid| valid[t])).collect();
        self.keys.plan_mut().observe(tokens.len(), dim, |t, sums| {
            for reader in h * readers..(h + 1) * readers {
                query.row(b, reader, tokens[t]).to_f32(&mut q);
                for (sum, q) in sums.iter_mut().zip(&q) {
                    *sum += q * q;
                }
            }
        });
    }

    /// Tells feedback for keys of a prompt's queries, as [`Self::observe`] does.
    pub(super) fn observe_moment(
        &mut self,
        query: &View<'_>,
        [b, h]: [usize; 2],
        kv_heads: usize,
        valid: Option<&[bool]>,
    ) {
        let [_, heads, n, dim] = query.shape();
        if n <= SHORT && !self.positions.is_empty() || !self.keys.plan().wants_moment() {
            return;
        }
        let tokens: Vec<usize> = (0..n).filter(|&t| valid.is_none_or(|valid| valid[t])).collect();
        let step = tokens.len().div_ceil(SAMPLES).max(1);
        let readers = heads / kv_heads;
        let places = tokens.iter().step_by(step).flat_map(|&t| (h * readers..(h + 1) * readers).map(move |r| (r, t)));
        let mut q = memory::zeros(places.clone().count() * dim);
        q.chunks_exact_mut(dim).zip(places).for_each(|(q, (reader, t))| query.row(b, reader, t).to_f32(q));
        self.keys.plan_mut().observe_moment(&q, dim, chosen());
    }

    /// How many numbers the codec's rule wants packed.
    pub(super) fn numbers_due(&self, codec: &Codec) -> usize {
        self.keys.numbers_due(&codec.keys) + self.values.numbers_due(&codec.values)
    }

    pub(super) fn settle(&mut self, codec: &Codec) {
        self.keys.settle(&codec.keys);
        self.values.settle(&codec.values);
    }

    /// How many of the newest positions can be removed without cutting into a lossy page, at most `asked`, when
    /// `seen` positions were seen.
    pub(super) fn exactly_removable(&self, asked: usize, seen: usize) -> usize {
        let exact = |n: usize| {
            let kept = self.positions.count_below(seen - n);
            self.keys.cuts_exactly(kept) && self.values.cuts_exactly(kept)
        };
        if exact(asked) { asked } else { (0..asked).rev().find(|&n| exact(n)).unwrap_or(0) }
    }

    /// Moves the exact window to where copies share it.
    pub(super) fn lend(&mut self) {
        self.keys.lend();
        self.values.lend();
    }

    /// Whether that would change anything.
    pub(super) fn can_lend(&self) -> bool {
        self.keys.can_lend() || self.values.can_lend()
    }

    /// Whether copies may share some of the exact window.
    pub(super) fn lends(&self) -> bool {
        self.keys.lends() || self.values.lends()
    }

    /// Removes the tokens at positions from `end` on.
    pub(super) fn truncate(&mut self, end: usize) {
        let kept = self.positions.count_below(end);
        self.keys.truncate(kept);
        self.values.truncate(kept);
        self.positions.truncate(end);
        Arc::make_mut(&mut self.observed).truncate(end, kept);
        self.bounds.truncate(kept);
    }

    /// Adds what is allocated for it to `counter`: now, or when `mark` was made.
    pub(super) fn count(&self, mark: Option<&HeadMark>, counter: &mut Counter) {
        let (positions, bounds, observed, center) = match mark {
            Some(mark) => (Positions::bytes_of(mark.runs), mark.bounds.bytes(), &mark.observed, &mark.center),
            None => (self.positions.bytes(), self.bounds.bytes(), &self.observed, &self.center),
        };
        counter.memory.index += size_of::<Self>() + positions + bounds;
        counter.observed(observed);
        counter.center(center.as_ref());
        self.keys.count(mark.map(|mark| &mark.keys), counter);
        self.values.count(mark.map(|mark| &mark.values), counter);
    }

    /// The head as the reading side sees it.
    pub(super) fn view(&self) -> Head<'_> {
        Head {
            keys: self.keys.parts(),
            values: self.values.parts(),
            positions: &self.positions,
            key_dim: self.keys.tail.dim(),
            value_dim: self.values.tail.dim(),
        }
    }

    /// Tokens of whole pages that are not known yet to those who choose.
    pub(super) fn uncovered(&self) -> usize {
        self.keys.closed() - self.bounds.covered()
    }

    /// Makes them known.
    pub(super) fn cover(&mut self, quest: Quest) {
        let (mut at, covered, dim) = (0, self.bounds.covered(), self.keys.tail.dim());
        let closed = self.keys.closed();
        for part in self.keys.parts() {
            let tokens = part.tokens;
            if at >= covered && at < closed {
                self.bounds.cover(quest, part, dim, &mut Scratch::new(chosen()));
            }
            at += tokens;
        }
    }

    /// Calls `write(position, key)` for every token held, dequantised.
    pub(super) fn each_key(&self, scratch: &mut Scratch, mut write: impl FnMut(u32, &[f32])) {
        let d = self.keys.tail.dim();
        let (mut tile, mut key) = (memory::zeros(tile_rows(d) * CHUNK), memory::zeros(d));
        let mut positions = Vec::new();
        for KeyChunk { segment, first, tokens: n, at } in key_chunks(&self.keys.parts()) {
            segment.tile(first, n, MatMut::new(&mut tile, tile_rows(d), CHUNK), scratch);
            self.positions.collect_into(at, n, &mut positions);
            for (t, &p) in positions.iter().enumerate() {
                for (c, x) in key.iter_mut().enumerate() {
                    *x = tile[c * CHUNK + t];
                }
                if let Some(basis) = segment.basis() {
                    basis.undo(&mut key);
                }
                if let Some(center) = &self.center {
                    key.iter_mut().zip(&**center).for_each(|(x, center)| *x += center);
                }
                write(p, &key);
            }
        }
    }

    /// Calls `write(position, value)` for every token held, dequantised.
    pub(super) fn each_value(&self, scratch: &mut Scratch, mut write: impl FnMut(u32, &[f32])) {
        let d = self.values.tail.dim();
        let mut tile = memory::zeros(padded(d) * CHUNK);
        let mut positions = Vec::new();
        let mut base = 0;
        for part in self.values.parts() {
            for first in (0..part.tokens).step_by(CHUNK) {
                let n = CHUNK.min(part.tokens - first);
                part.segment.tile(first, n, MatMut::new(&mut tile, n, padded(d)), scratch);
                self.positions.collect_into(base + first, n, &mut positions);
                for (value, &p) in tile.chunks_exact_mut(padded(d)).zip(&positions) {
                    if let Some(basis) = part.segment.basis() {
                        basis.undo(&mut value[..d]);
                    }
                    write(p, &value[..d]);
                }
            }
            base += part.tokens;
        }
    }

    /// What feedback could gain at most, and whether it is used, for keys and for values.
    pub fn gains(&self) -> [Option<(f32, bool)>; 2] {
        [self.keys.plan().gain(), self.values.plan().gain()]
    }

    /// Positions of the tokens held.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The sealed pages of keys and of values, oldest first.
    pub fn pages(&self) -> (&[super::Segment<KeyPage>], &[super::Segment<ValuePage>]) {
        (self.keys.sealed(), self.values.sealed())
    }
}

/// The mean of the keys of head `h` of batch row `b` that are no pads.
fn mean(k: &View<'_>, [b, h]: [usize; 2], valid: Option<&[bool]>) -> Arc<[f32]> {
    let [_, _, n, dim] = k.shape();
    let (mut sum, mut key, mut tokens) = (vec![0.0f64; dim], vec![0.0; dim], 0);
    for t in (0..n).filter(|&t| valid.is_none_or(|valid| valid[t])) {
        k.row(b, h, t).to_f32(&mut key);
        sum.iter_mut().zip(&key).for_each(|(sum, &x)| *sum += f64::from(x));
        tokens += 1;
    }
    sum.into_iter().map(|sum| (sum / f64::from(tokens.max(1))) as f32).collect()
}
