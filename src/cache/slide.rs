//! Sliding windows: a query of the model sees the newest positions only, and what all later queries miss leaves.

use super::head::KvHead;
use super::layer::Layer;
use super::side::Side;
use crate::quantize::Page;

/// So many tokens at least leave together, of short windows an eighth: pages are cut, and sequences copied for a forward that may
/// fail, that much more rarely.
const TOGETHER: usize = 32;

impl Layer {
    /// No query of tokens to come sees positions below this, once `seen` were seen.
    pub(super) fn passed(&self, seen: usize) -> usize {
        self.window.map_or(0, |window| (seen + 1).saturating_sub(window))
    }

    /// How many tokens leave together at least.
    fn together(&self) -> usize {
        self.window.map_or(TOGETHER, |window| (window / 8).clamp(1, TOGETHER))
    }

    /// Whether tokens of a sequence would leave if so many positions were seen.
    pub(super) fn slides(&self, heads: &[KvHead], seen: usize) -> bool {
        let passed = self.passed(seen);
        passed > 0 && heads.iter().any(|head| head.leaving(passed, self.together()) > 0)
    }

    /// Lets go what the window has passed.
    pub(super) fn slide(&mut self) {
        let passed = self.passed(self.seen());
        if passed == 0 {
            return;
        }
        let (mut gone, together) = (0, self.together());
        self.each_unique(
            |row| row.iter().any(|head| head.leaving(passed, together) > 0),
            |rows| {
                for head in rows.into_iter().flatten() {
                    let n = head.leaving(passed, together);
                    if n > 0 {
                        head.drop_oldest(n);
                        gone = gone.max(head.positions().first().map_or(passed, |first| first as usize));
                    }
                }
            },
        );
        self.came_to(gone);
    }

    /// Has an empty layer go on at that position: what was before is gone.
    pub(super) fn begin_at(&mut self, position: usize) {
        self.seen = position;
        self.came_to(position);
    }

    /// Tokens at positions below `gone` are not held any more: no crop may make them visible again.
    pub(super) fn came_to(&mut self, gone: usize) {
        if let Some(window) = self.window.filter(|_| gone > 0) {
            self.final_to = self.final_to.max(gone + window - 1);
        }
    }
}

impl KvHead {
    /// How many of the tokens at positions below `passed` leave now: at least so many together, in whole granules.
    fn leaving(&self, passed: usize, together: usize) -> usize {
        let mut n = self.positions.count_below(passed);
        while n >= together {
            let whole = self.keys.whole(n).min(self.values.whole(n));
            if whole == n {
                return n;
            }
            n = whole;
        }
        0
    }

    fn drop_oldest(&mut self, n: usize) {
        self.keys.drop_oldest(n);
        self.values.drop_oldest(n);
        self.positions = self.positions.take(|token, _| token >= n);
        self.index = None;
    }
}

impl<P: Page> Side<P> {
    /// The most of the `n` oldest tokens that are whole granules.
    pub(super) fn whole(&self, n: usize) -> usize {
        let mut before = 0;
        for segment in &self.segments {
            if before + segment.len > n {
                let granule = segment.page.granularity();
                return before + (n - before) / granule * granule;
            }
            before += segment.len;
        }
        n
    }

    /// Lets the `n` oldest tokens go, which are whole granules.
    pub(super) fn drop_oldest(&mut self, mut n: usize) {
        if n > self.sealed_tokens() {
            self.own();
        }
        self.headless |= n > 0;
        let whole = self.segments.iter().take_while(|segment| {
            let leaves = segment.len <= n;
            n -= if leaves { segment.len } else { 0 };
            leaves
        });
        let whole = whole.count();
        self.segments.drain(..whole);
        match self.segments.first_mut() {
            Some(first) if n > 0 => first.cut_front(n),
            _ => self.tail.drop_front(n),
        }
    }
}
