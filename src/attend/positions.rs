//! Positions travel with tokens.

#![forbid(unsafe_code)]

use crate::memory;

/// The logical positions of held tokens, ascending, as runs of consecutive ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    runs: Vec<Run>,
    /// Tokens held.
    len: usize,
    /// One more than the newest position held.
    end: u32,
}

/// A run of consecutive positions. Two small numbers: where tokens are evicted there may be nearly as many runs as tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    /// Positions between the last run and this one that are not held.
    gap: u16,
    len: u16,
}

impl Positions {
    /// Runs as first position and length.
    pub fn runs(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.runs.iter().scan(0, |end, &Run { gap, len }| {
            let start = *end + u32::from(gap);
            *end = start + u32::from(len);
            Some((start, u32::from(len)))
        })
    }

    /// Adds `n` tokens at `first ..`, which comes after all positions held.
    pub fn push(&mut self, first: usize, n: usize) {
        if n == 0 {
            return;
        }
        let mut gap = first - self.end as usize;
        let mut left = n;
        if gap == 0
            && let Some(last) = self.runs.last_mut()
        {
            let more = left.min(usize::from(u16::MAX - last.len));
            last.len += more as u16;
            left -= more;
        }
        while left > 0 {
            // A gap, or a length, that is too long for one run is cut; a run of no tokens is only a gap.
            let run = Run { gap: gap.min(u16::MAX.into()) as u16, len: 0 };
            gap -= usize::from(run.gap);
            let len = if gap > 0 { 0 } else { left.min(u16::MAX.into()) };
            left -= len;
            if self.runs.len() == self.runs.capacity() {
                let more = 1 + self.runs.len() / 8;
                memory::reserve(&mut self.runs, more);
            }
            self.runs.push(Run { len: len as u16, ..run });
        }
        self.len += n;
        self.end = (first + n) as u32;
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Tokens at positions below `end`.
    pub fn count_below(&self, end: usize) -> usize {
        if end >= self.end as usize {
            return self.len;
        }
        self.runs().map(|(start, n)| end.saturating_sub(start as usize).min(n as usize)).sum()
    }

    /// Room for runs: what [`Self::restore`] wants to know.
    pub fn room(&self) -> usize {
        self.runs.capacity()
    }

    /// Drops the tokens at positions from `end` on, and what room was made for them beyond `room`.
    pub fn restore(&mut self, end: usize, room: usize) {
        self.truncate(end);
        self.runs.shrink_to(room);
    }

    /// Drops the tokens at positions from `end` on.
    pub fn truncate(&mut self, end: usize) {
        let kept = self.count_below(end);
        while let Some(last) = self.runs.last_mut() {
            let cut = (self.len - kept).min(last.len.into());
            last.len -= cut as u16;
            self.len -= cut;
            self.end -= cut as u32;
            if last.len > 0 {
                break;
            }
            self.end -= u32::from(last.gap);
            self.runs.pop();
        }
    }

    /// Keeps the tokens for which `keep` says so, given their number and their position.
    #[must_use]
    pub fn take(&self, mut keep: impl FnMut(usize, u32) -> bool) -> Self {
        let mut taken = Self::default();
        let all = self.runs().flat_map(|(start, n)| start..start + n);
        all.enumerate().filter(|&(i, p)| keep(i, p)).for_each(|(_, p)| taken.push(p as usize, 1));
        taken.runs.shrink_to_fit();
        taken
    }

    /// The positions of tokens `first .. first + n`, in place of what `out` held.
    pub fn collect_into(&self, first: usize, n: usize, out: &mut Vec<u32>) {
        out.clear();
        memory::reserve(out, n);
        let (mut skip, mut left) = (first as u32, n as u32);
        for (start, len) in self.runs() {
            let take = len.saturating_sub(skip).min(left);
            if take > 0 {
                out.extend(start + skip..start + skip + take);
            }
            skip = skip.saturating_sub(len);
            left -= take;
            if left == 0 {
                break;
            }
        }
    }

    /// All positions, oldest first.
    pub fn all(&self) -> Vec<u32> {
        let mut all = Vec::new();
        self.collect_into(0, self.len(), &mut all);
        all
    }

    /// The oldest position.
    pub fn first(&self) -> Option<u32> {
        self.runs().find(|&(_, n)| n > 0).map(|(start, _)| start)
    }

    /// The newest position.
    pub fn last(&self) -> Option<u32> {
        (self.len > 0).then(|| self.end - 1)
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        Self::bytes_of(self.runs.capacity())
    }

    /// Bytes of room for so many runs.
    pub fn bytes_of(room: usize) -> usize {
        room * size_of::<Run>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_runs_and_gaps_are_cut() {
        let mut positions = Positions::default();
        positions.push(200_000, 150_000);
        assert_eq!((positions.len(), positions.last()), (150_000, Some(349_999)));
        assert_eq!(positions.count_below(270_001), 70_001);
        let mut out = Vec::new();
        positions.collect_into(149_998, 2, &mut out);
        assert_eq!(out, [349_998, 349_999]);
    }

    proptest! {
        #[test]
        fn behaves_like_a_list(steps in prop::collection::vec((0usize..3, 1usize..6), 1..20), cut in 0usize..60, far: bool) {
            let (mut runs, mut list, mut next) = (Positions::default(), Vec::new(), 0usize);
            for (i, (gap, n)) in steps.into_iter().enumerate() {
                next += gap + if far && i == 3 { 140_000 } else { 0 };
                runs.push(next, n);
                list.extend(next as u32..(next + n) as u32);
                next += n;
            }
            prop_assert_eq!(runs.count_below(cut), list.iter().filter(|&&p| (p as usize) < cut).count());
            let odd: Vec<u32> = list.iter().copied().filter(|p| p % 3 != 0).collect();
            let mut taken = Vec::new();
            let chosen = runs.take(|i, p| { assert_eq!(list[i], p); p % 3 != 0 });
            chosen.collect_into(0, chosen.len(), &mut taken);
            prop_assert_eq!(&taken, &odd);
            runs.truncate(cut);
            list.retain(|&p| (p as usize) < cut);
            prop_assert_eq!(runs.len(), list.len());
            prop_assert_eq!(runs.last(), list.last().copied());
            for first in 0..list.len() {
                for n in 0..=list.len() - first {
                    let mut out = Vec::new();
                    runs.collect_into(first, n, &mut out);
                    prop_assert_eq!(&out[..], &list[first..first + n]);
                }
            }
        }
    }
}
