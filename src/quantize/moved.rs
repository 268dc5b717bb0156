//! A page of keys that are read as if they were at later positions than they were cached at.

use std::sync::Arc;

use super::{KeyPage, Page};
use crate::attend::kernels::Ahead;
use crate::attend::mat::{Mat, MatMut};
use crate::attend::{Basis, KeySegment, Rope, Scratch};

/// The page, and what turns a query back by as many positions: no key is changed, whatever its codec.
#[derive(Clone)]
pub struct Moved {
    page: Arc<KeyPage>,
    basis: Arc<Basis>,
}

impl Moved {
    /// The keys of `page` moved by `distance` positions from where they were cached, wherever they were moved before.
    pub fn new(page: &Arc<KeyPage>, rope: &Rope, distance: u32) -> Self {
        let page = if let KeyPage::Moved(moved) = &**page { &moved.page } else { page };
        let turned = Arc::new(rope.turned(distance));
        let basis = match page.segment().basis() {
            Some(own) => Arc::new(Basis::Both(turned, Arc::clone(own))),
            None => turned,
        };
        Self { page: Arc::clone(page), basis }
    }

    /// The page as it was cached.
    pub fn page(&self) -> &KeyPage {
        &self.page
    }

    /// A page of some tokens, in whole units.
    #[must_use]
    pub(super) fn part(&self, tokens: &[usize]) -> Self {
        Self { page: Arc::new(self.page.part(tokens)), basis: Arc::clone(&self.basis) }
    }
}

impl KeySegment for Moved {
    fn unit(&self) -> usize {
        self.page.segment().unit()
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        self.page.segment().bytes(first, n)
    }

    fn basis(&self) -> Option<&Arc<Basis>> {
        Some(&self.basis)
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
