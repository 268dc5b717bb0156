//! Positions travel with tokens.

#![forbid(unsafe_code)]

/// The logical positions of held tokens, ascending, as runs of consecutive ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// First position and length.
    runs: Vec<(u32, u32)>,
}

impl Positions {
    /// Runs of first position and length.
    pub fn runs(&self) -> &[(u32, u32)] {
        &self.runs
    }

    /// Adds `n` tokens at `first ..`, which comes after all positions held.
    pub fn push(&mut self, first: usize, n: usize) {
        let (first, n) = (first as u32, n as u32);
        match self.runs.last_mut() {
            Some((start, len)) if *start + *len == first => *len += n,
            _ if n > 0 => {
                self.runs.reserve_exact(1);
                self.runs.push((first, n));
            }
            _ => {}
        }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.runs.iter().map(|&(_, n)| n as usize).sum()
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Tokens at positions below `end`.
    pub fn count_below(&self, end: usize) -> usize {
        self.runs.iter().map(|&(start, n)| end.saturating_sub(start as usize).min(n as usize)).sum()
    }

    /// Drops the tokens at positions from `end` on.
    pub fn truncate(&mut self, end: usize) {
        for (start, n) in &mut self.runs {
            *n = (*n).min(end.saturating_sub(*start as usize) as u32);
        }
        self.runs.retain(|&(_, n)| n > 0);
    }

    /// The positions of tokens `first .. first + n`, in place of what `out` held.
    pub fn collect_into(&self, first: usize, n: usize, out: &mut Vec<u32>) {
        out.clear();
        let (mut skip, mut left) = (first as u32, n as u32);
        for &(start, len) in &self.runs {
            let take = len.saturating_sub(skip).min(left);
            if take > 0 {
                out.extend(start + skip..start + skip + take);
            }
            skip = skip.saturating_sub(len);
            left -= take;
        }
    }

    /// The newest position.
    pub fn last(&self) -> Option<u32> {
        self.runs.last().map(|&(start, n)| start + n - 1)
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        self.runs.capacity() * size_of::<(u32, u32)>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn behaves_like_a_list(steps in prop::collection::vec((0usize..3, 1usize..6), 1..20), cut in 0usize..60) {
            let (mut runs, mut list, mut next) = (Positions::default(), Vec::new(), 0usize);
            for (gap, n) in steps {
                next += gap;
                runs.push(next, n);
                list.extend(next as u32..(next + n) as u32);
                next += n;
            }
            prop_assert_eq!(runs.count_below(cut), list.iter().filter(|&&p| (p as usize) < cut).count());
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
