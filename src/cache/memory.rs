//! Bytes held, from the allocations themselves.

use std::collections::HashSet;
use std::ops::AddAssign;
use std::sync::Arc;

use crate::compact::Compacted;
use crate::evict::History;
use crate::prune::Pruned;
use crate::quantize::{Page, PageBytes, Plan};

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

/// Counts what heads hold, each shared part once.
#[derive(Default)]
pub(super) struct Counter {
    pub(super) memory: Memory,
    counted: HashSet<*const ()>,
}

impl Counter {
    /// Whether this is the first time that it is seen.
    pub(super) fn first<T: ?Sized>(&mut self, shared: &Arc<T>) -> bool {
        self.counted.insert(Arc::as_ptr(shared).cast())
    }

    pub(super) fn page<P: Page>(&mut self, page: &Arc<P>) {
        if self.first(page) {
            self.memory += page.bytes();
            self.memory.index += ARC_HEADER + size_of::<P>();
        }
    }

    pub(super) fn plan(&mut self, plan: &Arc<Plan>) {
        if self.first(plan) {
            self.memory.index += ARC_HEADER + size_of::<Plan>() + plan.bytes();
            for (part, bytes) in plan.shared() {
                if self.counted.insert(part) {
                    self.memory.index += bytes;
                }
            }
        }
    }

    pub(super) fn history(&mut self, history: &Arc<History>) {
        if self.first(history) {
            self.memory.index += ARC_HEADER + size_of::<History>() + history.bytes();
        }
    }

    pub(super) fn summary(&mut self, summary: Option<&Arc<dyn Compacted>>) {
        if let Some(summary) = summary.filter(|summary| self.first(summary)) {
            self.memory.exact += ARC_HEADER + summary.bytes();
        }
    }

    pub(super) fn pruned(&mut self, pruned: Option<&Arc<Pruned>>) {
        let maps = pruned.into_iter().flat_map(|pruned| [&pruned.keys, &pruned.values]).flatten();
        for map in maps {
            if self.first(map) {
                self.memory.scales += ARC_HEADER + map.bytes();
            }
        }
    }

    pub(super) fn center(&mut self, center: Option<&Arc<[f32]>>) {
        if let Some(center) = center.filter(|center| self.first(center)) {
            self.memory.scales += ARC_HEADER + size_of_val(&**center);
        }
    }
}
