//! How a side's exact tail becomes pages: sealed by its codec, or lent to copies as it is.

use std::ops::Range;
use std::sync::Arc;

use super::side::{Segment, Side};
use crate::error::Result;
use crate::quantize::{Codec, Method, Page};

/// Tokens of the tail that copies share are in pages of so many.
const LENT: usize = 8;
/// So many are worth a page.
const LEAST_LENT: usize = 4;

impl<P: Page> Side<P> {
    /// Moves the tail to pages that copies share, so that sequences that part have one exact window. Its tokens are as before:
    /// they wait to be sealed. The shortest tails stay: a page costs more than their copies.
    pub(super) fn lend(&mut self) {
        if !self.can_lend() {
            return;
        }
        if let Some(last) = self.segments.pop_if(|last| self.lent > 0 && last.len < LENT) {
            self.tail.prepend(last.exact());
            self.lent -= 1;
        }
        let n = self.tail.len();
        let pages = (0..n).step_by(LENT).map(|first| first..n.min(first + LENT));
        let lent =
            |tokens: Range<usize>| Segment { len: tokens.len(), page: Arc::new(P::exact(self.tail.copy(tokens))) };
        let pages: Vec<_> = pages.map(lent).collect();
        self.tail = self.tail.copy(0..0);
        self.lent += pages.len();
        self.segments.reserve_exact(pages.len());
        self.segments.extend(pages);
    }

    /// Whether the tail is worth a page.
    pub(super) fn can_lend(&self) -> bool {
        self.tail.len() >= LEAST_LENT
    }

    /// Whether something is lent.
    pub(super) fn lends(&self) -> bool {
        self.lent > 0
    }

    /// Brings back to the tail what is lent.
    pub(super) fn own(&mut self) {
        let lent = self.segments.split_off(self.sealed().len());
        lent.iter().rev().for_each(|lent| self.tail.prepend(lent.exact()));
        self.lent = 0;
    }

    /// Tokens, of those that wait, that stay exact when the first page is sealed.
    fn sinks(&self, codec: &P::Codec) -> usize {
        if self.sealed().is_empty() && !self.headless { codec.sinks() } else { 0 }
    }

    fn due(&self, codec: &P::Codec) -> usize {
        codec.due(self.waiting().saturating_sub(self.sinks(codec)))
    }

    /// How many numbers are due to be sealed.
    pub(super) fn numbers_due(&self, codec: &P::Codec) -> usize {
        self.due(codec) * self.tail.dim()
    }

    /// Seals what is due. What is lent waits longest: as much of it as is wanted goes back to the tail for that.
    ///
    /// # Errors
    /// Those of the codec; the side is between two states then.
    pub(super) fn seal(&mut self, codec: &P::Codec) -> Result<()> {
        let (sinks, due) = (self.sinks(codec), self.due(codec));
        if due == 0 || !self.lends() {
            return self.seal_tail(codec, sinks, due);
        }
        let mut lent = self.segments.split_off(self.sealed().len()).into_iter();
        self.lent = 0;
        let none = self.tail.copy(0..0);
        let mut newest = std::mem::replace(&mut self.tail, none);
        while self.tail.len() < sinks + due {
            if let Some(page) = lent.next() {
                self.tail.extend(page.exact());
            } else {
                self.tail.extend(newest.slice(0..newest.len()));
                newest.truncate(0);
            }
        }
        self.seal_tail(codec, sinks, due)?;
        if lent.len() == 0 {
            self.tail.extend(newest.slice(0..newest.len()));
            return Ok(());
        }
        let rest = self.tail.len();
        if rest > 0 {
            self.push(P::exact(self.tail.copy(0..rest)));
            self.lent = 1;
        }
        self.lent += lent.len();
        self.segments.extend(lent);
        self.tail = newest;
        Ok(())
    }

    /// Gives back the room for tokens to come.
    pub(super) fn fit(&mut self) {
        self.own();
        self.tail = self.tail.copy(0..self.tail.len());
        if let Some(last) = self.segments.last_mut().filter(|last| last.is_open()) {
            last.page = Arc::new(last.page.fit());
        }
        self.segments.shrink_to_fit();
    }

    /// Seals `due` tokens of the tail; `sinks` before them stay exact.
    fn seal_tail(&mut self, codec: &P::Codec, sinks: usize, mut due: usize) -> Result<()> {
        if due > 0 && sinks > 0 {
            self.push(P::exact(self.tail.copy(0..sinks)));
            self.tail.drop_front(sinks);
        }
        while due > 0 {
            let taken = if let Some(open) = self.segments.last_mut().filter(|s| s.is_open()) {
                let n = due.min(open.page.room());
                let gptq = codec.compensation();
                let compensation = gptq.and_then(|_| Arc::make_mut(&mut self.plan).compensation(gptq));
                Arc::make_mut(&mut open.page).extend(&self.tail, n, compensation.as_deref());
                open.len += n;
                n
            } else {
                let first = self.sealed_tokens();
                let plan = Arc::make_mut(&mut self.plan);
                plan.first = first;
                let (page, n) = codec.seal(plan, &self.tail, due)?;
                self.push(page);
                n
            };
            self.tail.drop_front(taken);
            due -= taken;
        }
        Ok(())
    }

    pub(super) fn push(&mut self, page: P) {
        let len = page.tokens();
        // Long lists grow by an eighth: the list of pages is counted as memory held.
        if self.segments.len() == self.segments.capacity() {
            self.segments.reserve_exact(4 + self.segments.len() / 8);
        }
        self.segments.push(Segment { page: Arc::new(page), len });
    }
}
