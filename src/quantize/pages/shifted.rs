//! A page of keys that are read as if they were at later positions than they were cached at.

use std::sync::Arc;

use super::{KeyPage, Page};
use crate::attend::{KeySegment, Scratch};
use crate::kernels::Ahead;
use crate::linalg::{Map, Mat, MatMut, Rope};

/// The page, and what rotates a query back by as many positions: no key is changed, whatever its codec.
#[derive(Clone)]
pub struct Shifted {
    page: Arc<KeyPage>,
    map: Arc<Map>,
}

impl Shifted {
    /// The keys of `page` shifted by `distance` positions from where they were cached, however they were shifted before.
    pub fn new(page: &Arc<KeyPage>, rope: &Rope, distance: u32) -> Self {
        let page = if let KeyPage::Shifted(shifted) = &**page { &shifted.page } else { page };
        let rotated = Arc::new(rope.shifted(distance));
        let map = match page.segment().map() {
            Some(own) => Arc::new(Map::Then(rotated, Arc::clone(own))),
            None => rotated,
        };
        Self { page: Arc::clone(page), map }
    }

    /// The page as it was cached.
    pub fn page(&self) -> &KeyPage {
        &self.page
    }

    /// A page of some tokens, in whole granules.
    #[must_use]
    pub(super) fn part(&self, tokens: &[usize]) -> Self {
        Self { page: Arc::new(self.page.part(tokens)), map: Arc::clone(&self.map) }
    }
}

impl KeySegment for Shifted {
    fn granularity(&self) -> usize {
        self.page.segment().granularity()
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        self.page.segment().bytes(first, n)
    }

    fn map(&self) -> Option<&Arc<Map>> {
        Some(&self.map)
    }

    fn bias(&self, first: usize, n: usize) -> Option<&[f32]> {
        self.page.segment().bias(first, n)
    }

    fn scores(
        &self,
        q: Mat<'_>,
        first: usize,
        n: usize,
        out: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        self.page.segment().scores(q, first, n, out, scratch, ahead);
    }

    fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch) {
        self.page.segment().tile(first, n, out, scratch);
    }
}
