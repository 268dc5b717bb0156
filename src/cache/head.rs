//! What one KV head of one sequence holds.

use std::sync::Arc;

use super::layer::{Methods, Shape};
use super::memory::Counter;
use super::side::{Segment, Side, SideMark};
use crate::attend::{Head, Positions, Scratch, Summary};
use crate::compact::Compacted;
use crate::evict::History;
use crate::memory;
use crate::prune::Pruned;
use crate::quantize::{KeyPage, ValuePage};
use crate::select::{IndexMark, PageIndex};
use crate::tensor::Rows;

/// Keys, values and positions of the tokens of one KV head.
#[derive(Clone)]
pub struct KvHead {
    pub(super) keys: Side<KeyPage>,
    pub(super) values: Side<ValuePage>,
    pub(super) positions: Positions,
    /// What an eviction remembers; copied before a change, as pages are.
    pub(super) history: Arc<History>,
    /// The pages among which queries choose; `None` before there are any.
    pub(super) index: Option<Box<dyn PageIndex>>,
    /// What keys are held less of, where that is wanted: the mean of the first ones.
    pub(super) center: Option<Arc<[f32]>>,
    /// What is held of the head at all; `None`: all.
    pub(super) pruned: Option<Arc<Pruned>>,
    /// What stands for tokens that left.
    pub(super) summary: Option<Arc<dyn Compacted>>,
}

/// What a head was like: see [`KvHead::mark`].
pub(super) struct HeadMark {
    keys: SideMark<KeyPage>,
    values: SideMark<ValuePage>,
    runs: usize,
    history: Arc<History>,
    index: Option<IndexMark>,
    center: Option<Arc<[f32]>>,
}

impl KvHead {
    /// An empty one, number `head` of its layer.
    pub(super) fn new(head: usize, shape: Shape, methods: &Methods) -> Self {
        let Shape { dtype, key_dim, value_dim, .. } = shape;
        let pruned = methods.prune.as_ref().and_then(|prune| prune.head(head, key_dim, value_dim));
        let maps = pruned.as_ref().map(|pruned| (pruned.keys.as_ref(), pruned.values.as_ref()));
        let (key_map, value_map) = maps.unwrap_or_default();
        let stored_keys = key_map.map_or(key_dim, |map| map.dim(key_dim));
        let stored_values = value_map.map_or(value_dim, |map| map.dim(value_dim));
        Self {
            keys: Side::new(head, Rows::new(dtype, stored_keys)),
            values: Side::new(head, Rows::new(dtype, stored_values)),
            positions: Positions::default(),
            history: Arc::new(History::new(methods.eviction.as_deref())),
            index: None,
            center: None,
            pruned,
            summary: None,
        }
    }

    /// Remembers what it is like, as [`Side::mark`] does.
    pub(super) fn mark(&mut self) -> HeadMark {
        HeadMark {
            keys: self.keys.mark(),
            values: self.values.mark(),
            runs: self.positions.room(),
            history: Arc::clone(&self.history),
            index: self.index.as_ref().map(|index| index.mark()),
            center: self.center.clone(),
        }
    }

    /// Makes it what it was, when `seen` positions had been seen.
    pub(super) fn restore(&mut self, mark: &HeadMark, seen: usize) {
        self.keys.restore(&mark.keys);
        self.values.restore(&mark.values);
        self.positions.restore(seen, mark.runs);
        self.history.clone_from(&mark.history);
        match (&mut self.index, mark.index) {
            (Some(index), Some(mark)) => index.restore(mark),
            (index, _) => *index = None,
        }
        self.center.clone_from(&mark.center);
    }

    /// Gives back what was kept for [`Self::restore`].
    pub(super) fn release(&mut self) {
        self.keys.release();
        self.values.release();
    }

    /// Queries of the model, of `dim` numbers each, for keys in the head's coordinates.
    pub(super) fn in_head(&self, q: Vec<f32>, dim: usize) -> Vec<f32> {
        match self.key_map() {
            Some(map) => map.query_rows(&q, dim),
            None => q,
        }
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
        if kept == 0 {
            self.summary = None;
        }
        Arc::make_mut(&mut self.history).truncate(end, kept);
        if let Some(index) = &mut self.index {
            index.truncate(kept);
        }
    }

    /// Adds what is allocated for it to `counter`: now, or when `mark` was made.
    pub(super) fn count(&self, mark: Option<&HeadMark>, counter: &mut Counter) {
        let index = mark.map_or_else(|| self.index.as_ref().map(|index| index.mark()), |mark| mark.index);
        let index = index.map_or(0, |index| index.bytes);
        let positions = mark.map_or_else(|| self.positions.bytes(), |mark| Positions::bytes_of(mark.runs));
        let history = mark.map_or(&self.history, |mark| &mark.history);
        let center = mark.map_or(&self.center, |mark| &mark.center);
        counter.memory.index += size_of::<Self>() + positions + index;
        counter.history(history);
        counter.center(center.as_ref());
        counter.pruned(self.pruned.as_ref());
        counter.summary(self.summary.as_ref());
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
            summary: self.summary.as_deref().map(|summary| summary as &dyn Summary),
        }
    }

    /// Calls `write(position, key)` for every token held, dequantised.
    pub(super) fn each_key(&self, dim: usize, scratch: &mut Scratch, mut write: impl FnMut(u32, &[f32])) {
        let (positions, mut key) = (self.positions.all(), memory::zeros(dim));
        self.view().each_key(scratch, |token, stored| {
            match self.key_map() {
                Some(map) => map.undo(stored, &mut key),
                None => key.copy_from_slice(stored),
            }
            if let Some(center) = &self.center {
                key.iter_mut().zip(&**center).for_each(|(x, center)| *x += center);
            }
            write(positions[token], &key);
        });
    }

    /// Calls `write(position, value)` for every token held, dequantised.
    pub(super) fn each_value(&self, dim: usize, scratch: &mut Scratch, mut write: impl FnMut(u32, &[f32])) {
        let (positions, mut value) = (self.positions.all(), memory::zeros(dim));
        self.view().each_value(scratch, |token, stored| match self.value_map() {
            Some(map) => {
                map.undo(stored, &mut value);
                write(positions[token], &value);
            }
            None => write(positions[token], stored),
        });
    }

    /// What compensation could gain at most, and whether it is used, for keys and for values.
    pub fn gains(&self) -> [Option<(f32, bool)>; 2] {
        [self.keys.plan().gain(), self.values.plan().gain()]
    }

    /// Positions of the tokens held.
    pub fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The sealed pages of keys and of values, oldest first.
    pub fn pages(&self) -> (&[Segment<KeyPage>], &[Segment<ValuePage>]) {
        (self.keys.sealed(), self.values.sealed())
    }
}
