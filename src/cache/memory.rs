//! Bytes held, from the allocations themselves.

use std::collections::HashSet;
use std::ops::AddAssign;
use std::sync::Arc;

use super::column::Column;
use super::head::KvHead;
use crate::quantize::{Page, PageBytes};

/// Bytes allocated, part by part; what several sequences share is counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Packed codes.
    pub codes: usize,
    /// Scales and zero-points.
    pub scales: usize,
    /// Numbers in the model's dtype: sinks, recent window, exact pages.
    pub exact: usize,
    /// Positions, lists of pages and the pages' own headers.
    pub index: usize,
}

impl Memory {
    /// All parts.
    pub fn total(&self) -> usize {
        self.codes + self.scales + self.exact + self.index
    }
}

impl AddAssign<PageBytes> for Memory {
    fn add_assign(&mut self, page: PageBytes) {
        self.codes += page.codes;
        self.scales += page.scales;
        self.exact += page.exact;
    }
}

/// The two counters that an `Arc` allocates beside its value.
pub(super) const ARC_HEADER: usize = 2 * size_of::<usize>();

/// Counts heads, every page once.
#[derive(Default)]
pub(super) struct Counter {
    pub(super) memory: Memory,
    pages: HashSet<*const ()>,
}

impl Counter {
    pub(super) fn head(&mut self, head: &KvHead) {
        self.memory.index += size_of::<KvHead>() + head.positions.bytes() + head.observed.bytes() + head.bounds.bytes();
        self.column(&head.keys);
        self.column(&head.values);
    }

    fn column<P: Page>(&mut self, column: &Column<P>) {
        self.memory.exact += column.tail.bytes();
        self.memory.index += column.index_bytes() + column.plan.bytes();
        for segment in &column.segments {
            if self.pages.insert(Arc::as_ptr(&segment.page).cast()) {
                self.memory += segment.page.bytes();
                self.memory.index += ARC_HEADER + size_of::<P>();
            }
        }
    }
}
