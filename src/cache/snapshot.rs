//! What a layer was like before a forward, so that one that fails leaves no trace.
//!
//! A step of decoding must not pay for that with copies of the exact window: where a forward appends a few tokens to a sequence
//! that is nobody else's, marks are enough; pages and tails only grow behind them. Where tokens may be let go, a long
//! chunk comes, or the sequence is shared anyway or was, the old sequence itself is kept, and a copy changes.

use std::sync::Arc;

use super::head::{HeadMark, KvHead};
use super::layer::{Layer, Sequence, Shape};
use super::memory::{ARC_HEADER, Counter, Memory};

/// What brings a layer back.
pub(super) struct Snapshot {
    shape: Option<Shape>,
    rows: Vec<Row>,
    /// Room in the list of rows.
    room: usize,
    seen: usize,
    final_to: usize,
}

impl Snapshot {
    /// Positions seen then.
    pub(super) fn seen(&self) -> usize {
        self.seen
    }
}

/// A sequence.
enum Row {
    Whole(Arc<Sequence>),
    Marks(Vec<HeadMark>),
}

impl Layer {
    /// What it is like now, before so many tokens come.
    pub(super) fn snapshot(&mut self, new: usize) -> Snapshot {
        let few = !self.is_long(new);
        let goes = |row: &Sequence| {
            self.eviction().is_some_and(|eviction| row.iter().any(|head| head.is_due(eviction)))
                || self.slides(row, self.seen.saturating_add(new))
                || row.iter().any(|head| head.passing(new) > 0)
        };
        let goes: Vec<bool> = self.rows.iter().map(|row| few && goes(row)).collect();
        let save = |(row, goes): (&mut Arc<Sequence>, bool)| match Arc::get_mut(row) {
            Some(heads) if few && !goes && !heads.iter().any(KvHead::lends) => {
                Row::Marks(heads.iter_mut().map(KvHead::mark).collect())
            }
            _ => Row::Whole(Arc::clone(row)),
        };
        Snapshot {
            shape: self.shape,
            room: self.rows.capacity(),
            rows: self.rows.iter_mut().zip(goes).map(save).collect(),
            seen: self.seen,
            final_to: self.final_to,
        }
    }

    /// Makes it what it was. A copy of the layer may be restored as well.
    pub(super) fn restore(&mut self, snapshot: &Snapshot) {
        let Snapshot { shape, rows, room, seen, final_to } = snapshot;
        self.rows.truncate(rows.len());
        for (now, then) in self.rows.iter_mut().zip(rows) {
            match then {
                Row::Whole(row) => now.clone_from(row),
                Row::Marks(marks) => {
                    let heads = Arc::make_mut(now).iter_mut();
                    heads.zip(marks).for_each(|(head, mark)| head.restore(mark, *seen));
                }
            }
        }
        self.rows.shrink_to(*room);
        (self.shape, self.seen, self.final_to) = (*shape, *seen, *final_to);
    }

    /// Gives back what was kept for [`Self::restore`].
    pub(super) fn release(&mut self, snapshot: &Snapshot) {
        for (now, then) in self.rows.iter_mut().zip(&snapshot.rows) {
            if let Row::Marks(_) = then {
                Arc::make_mut(now).iter_mut().for_each(KvHead::release);
            }
        }
    }

    /// Bytes that were allocated then, as [`Self::memory`] counts them.
    pub(super) fn memory_then(&self, snapshot: &Snapshot) -> Memory {
        let mut counter = Counter::default();
        for (now, then) in self.rows.iter().zip(&snapshot.rows) {
            let (row, marks) = match then {
                Row::Whole(row) => (row, None),
                Row::Marks(marks) => (now, Some(marks)),
            };
            if counter.first(row) {
                counter.memory.index += ARC_HEADER + size_of::<Sequence>();
                for (h, head) in row.iter().enumerate() {
                    head.count(marks.map(|marks| &marks[h]), &mut counter);
                }
            }
        }
        counter.memory.index += snapshot.room * size_of::<Arc<Sequence>>();
        counter.memory
    }
}
