//! Reading only the pages that matter (Quest, Tang et al. 2024, arXiv 2406.10774): nothing is deleted, a step of decoding reads less.
//!
//! ```text
//! bound[g, p] = sum_c max(q_g[c] most_p[c], q_g[c] least_p[c])    and the largest bias in p: no logit of page p is larger, but for half precision
//! score[p]    = sum over the KV head's query heads of  softmax_p(bound[g, p])
//! ```
//!
//! The best pages are read, and always the first one, and what is newer than the last whole page. A page is a run of tokens that
//! can be read alone: at least so many as are asked for.

#![forbid(unsafe_code)]

use half::f16;

use super::{IndexMark, PageIndex, Selector};
use crate::amount::Amount;
use crate::attend::{CHUNK, KeyChunk, KeySegment, Part, Scratch, add_bias, key_chunks};
use crate::error::Result;
use crate::format::{padded, tile_rows};
use crate::kernels::{Ahead, Weighed};
use crate::linalg::{Mat, MatMut};
use crate::memory;
use crate::options::Options;
use crate::tensor::Slice;

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quest {
    /// Tokens that a step reads.
    pub budget: Amount,
    /// Tokens of a page, or as many more as its codec packs together.
    pub page: usize,
}

impl Quest {
    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        Ok(Self { budget: options.amount("budget")?, page: options.whole("page")? })
    }

    fn page_of(self, segment: &dyn KeySegment) -> usize {
        self.page
            .max(1)
            .next_multiple_of(segment.granularity())
            .min(CHUNK / segment.granularity() * segment.granularity())
    }
}

impl Selector for Quest {
    fn index(&self) -> Box<dyn PageIndex> {
        Box::new(Bounds { quest: *self, pages: Vec::new(), ends: Vec::new(), biases: Vec::new(), covered: 0 })
    }
}

/// The extremes of the keys of each page.
#[derive(Clone)]
struct Bounds {
    quest: Quest,
    /// First token and tokens of each page.
    pages: Vec<(u32, u32)>,
    /// `[pages, 2, dim]`: the largest, then the least number of each channel.
    ends: Vec<f16>,
    /// What is added to the logits of each page at most; empty while no page adds anything.
    biases: Vec<f32>,
    /// Tokens of the pages.
    covered: usize,
}

impl PageIndex for Bounds {
    fn covered(&self) -> usize {
        self.covered
    }

    fn work(&self, dim: usize) -> usize {
        2 * self.pages.len() * dim
    }

    fn truncate(&mut self, tokens: usize) {
        if tokens < self.covered {
            (self.pages, self.ends, self.biases, self.covered) = (Vec::new(), Vec::new(), Vec::new(), 0);
        }
    }

    fn cover(&mut self, Part { segment, tokens }: Part<'_, dyn KeySegment>, dim: usize, scratch: &mut Scratch) {
        let map = segment.map();
        let stored_dim = map.map_or(dim, |map| map.dim(dim));
        let (step, mut stored, mut key) = (self.quest.page_of(segment), vec![0.0; stored_dim], vec![0.0; dim]);
        let mut tile = memory::zeros(tile_rows(stored_dim) * CHUNK);
        for first in (0..tokens).step_by(step) {
            let n = step.min(tokens - first);
            segment.tile(first, n, MatMut::new(&mut tile, tile_rows(stored_dim), CHUNK), scratch);
            let (mut most, mut least) = (vec![f32::NEG_INFINITY; dim], vec![f32::INFINITY; dim]);
            for t in 0..n {
                stored.iter_mut().zip(tile.chunks_exact(CHUNK)).for_each(|(x, row)| *x = row[t]);
                match map {
                    Some(map) => map.undo(&stored, &mut key),
                    None => key.copy_from_slice(&stored),
                }
                for ((most, least), &x) in most.iter_mut().zip(&mut least).zip(&key) {
                    (*most, *least) = (most.max(x), least.min(x));
                }
            }
            self.pages.push(((self.covered + first) as u32, n as u32));
            let finite = |x: f32| f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()));
            memory::append(&mut self.ends, &memory::collected(most.into_iter().map(finite)));
            memory::append(&mut self.ends, &memory::collected(least.into_iter().map(finite)));
            let bias = segment.bias(first, n);
            if bias.is_some() || !self.biases.is_empty() {
                self.biases.resize(self.pages.len() - 1, 0.0);
                self.biases.push(bias.map_or(0.0, |bias| bias.iter().copied().fold(f32::NEG_INFINITY, f32::max)));
            }
        }
        self.covered += tokens;
    }

    fn chosen<'a>(
        &self,
        keys: &[Part<'a, dyn KeySegment>],
        q: Mat<'_>,
        scratch: &mut Scratch,
    ) -> Option<Vec<KeyChunk<'a>>> {
        let all: usize = keys.iter().map(|part| part.tokens).sum();
        let fixed = all - self.covered + self.pages.first().map_or(0, |&(_, n)| n as usize);
        let mut left = self.quest.budget.tokens(all).saturating_sub(fixed);
        if self.pages.len() < 2 || fixed + left >= all {
            return None;
        }
        let scores = self.scores(q, scratch);
        let mut read = memory::filled(false, self.pages.len());
        read[0] = true;
        let longest = self.pages.iter().map(|&(_, n)| n as usize).max().unwrap_or(1);
        let mut rest: Vec<usize> = (1..self.pages.len()).collect();
        while left > 0 && !rest.is_empty() {
            // The best ones until nothing is left are at least so many.
            let best = left.div_ceil(longest).min(rest.len());
            rest.select_nth_unstable_by(best - 1, |&a, &b| scores[b].total_cmp(&scores[a]));
            for page in rest.drain(..best) {
                read[page] = true;
                left = left.saturating_sub(self.pages[page].1 as usize);
            }
        }
        Some(self.chunks(&read, keys))
    }

    fn mark(&self) -> IndexMark {
        let room = [self.pages.capacity(), self.ends.capacity(), self.biases.capacity()];
        let bytes = room[0] * size_of::<(u32, u32)>()
            + room[1] * size_of::<f16>()
            + room[2] * size_of::<f32>()
            + size_of::<Self>();
        IndexMark { pages: self.pages.len(), covered: self.covered, room, bytes }
    }

    fn restore(&mut self, mark: IndexMark) {
        let IndexMark { pages, covered, room, .. } = mark;
        self.ends.truncate(self.ends.len() / self.pages.len().max(1) * pages);
        self.pages.truncate(pages);
        self.biases.truncate(pages);
        self.covered = covered;
        self.pages.shrink_to(room[0]);
        self.ends.shrink_to(room[1]);
        self.biases.shrink_to(room[2]);
    }

    fn fork(&self) -> Box<dyn PageIndex> {
        Box::new(self.clone())
    }
}

impl Bounds {
    /// What each page is worth.
    fn scores(&self, q: Mat<'_>, scratch: &mut Scratch) -> Vec<f32> {
        let (dim, pages) = (self.ends.len() / self.pages.len() / 2, self.pages.len());
        let mut split = memory::zeros(q.rows * 2 * dim);
        for (g, split) in split.chunks_exact_mut(2 * dim).enumerate() {
            for (c, &q) in q.row(g)[..dim].iter().enumerate() {
                (split[c], split[dim + c]) = (q.max(0.0), q.min(0.0));
            }
        }
        let stride = padded(pages);
        let mut bounds = memory::zeros(q.rows * stride);
        let (q, ends) = (Mat::new(&split, q.rows, 2 * dim), Slice::F16(&self.ends));
        let out = MatMut::new(&mut bounds, q.rows, stride);
        (scratch.kernels.dot_rows)(q, ends, 2 * dim, out, &mut Ahead::new(&[]));
        bounds.chunks_exact_mut(stride).for_each(|bounds| add_bias(Some(&self.biases), bounds));
        let mut weighed = vec![Weighed::before(f32::NEG_INFINITY); q.rows];
        (scratch.kernels.softmax)(MatMut::new(&mut bounds, q.rows, stride), pages, &mut weighed);
        let mut scores = memory::zeros(pages);
        for (row, weighed) in bounds.chunks_exact(stride).zip(&weighed) {
            scores.iter_mut().zip(row).for_each(|(score, x)| *score += x / weighed.sum);
        }
        scores
    }

    /// The chosen pages and all that is not covered, pages beside each other as one chunk.
    fn chunks<'a>(&self, read: &[bool], keys: &[Part<'a, dyn KeySegment>]) -> Vec<KeyChunk<'a>> {
        let mut chunks: Vec<KeyChunk<'a>> = Vec::new();
        let mut pages = self.pages.iter().zip(read).map(|(&(at, n), &read)| (at as usize, n as usize, read)).peekable();
        let mut base = 0;
        for &Part { segment, tokens } in keys {
            while let Some((at, n, read)) = pages.next_if(|&(at, ..)| at < base + tokens) {
                let follows = chunks
                    .last_mut()
                    .filter(|last| last.at >= base && last.at + last.tokens == at && last.tokens + n <= CHUNK);
                match follows {
                    _ if !read => {}
                    Some(last) => last.tokens += n,
                    None => chunks.push(KeyChunk { segment, first: at - base, tokens: n, at }),
                }
            }
            if base >= self.covered {
                let whole = key_chunks(&[Part { segment, tokens }]);
                chunks.extend(whole.into_iter().map(|chunk| KeyChunk { at: base + chunk.at, ..chunk }));
            }
            base += tokens;
        }
        chunks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels;
    use crate::tensor::{Dtype, Rows};

    /// Equal keys, of which one page counts for many.
    struct Weighted {
        rows: Rows,
        bias: Vec<f32>,
    }

    impl KeySegment for Weighted {
        fn granularity(&self) -> usize {
            1
        }

        fn bytes(&self, _: usize, _: usize) -> &[u8] {
            &[]
        }

        fn bias(&self, first: usize, n: usize) -> Option<&[f32]> {
            Some(&self.bias[first..first + n])
        }

        fn scores(&self, q: Mat<'_>, first: usize, n: usize, out: MatMut<'_>, s: &mut Scratch, ahead: &mut Ahead<'_>) {
            self.rows.scores(q, first, n, out, s, ahead);
        }

        fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch) {
            KeySegment::tile(&self.rows, first, n, out, scratch);
        }
    }

    #[test]
    fn a_page_of_weighted_tokens_is_chosen() {
        let mut rows = Rows::new(Dtype::F32, 8);
        (0..64).for_each(|_| rows.push(&[1.0; 8]));
        for heavy in [2, 5] {
            let bias = (0..64).map(|t| if t / 8 == heavy { 3.0 } else { 0.0 }).collect();
            let segment = Weighted { rows: rows.clone(), bias };
            let mut index = Quest { budget: Amount::Tokens(16), page: 8 }.index();
            let mut scratch = Scratch::new(kernels::chosen().unwrap());
            let part = || Part { segment: &segment as &dyn KeySegment, tokens: 64 };
            index.cover(part(), 8, &mut scratch);
            let q = [1.0; 8];
            let chosen = index.chosen(&[part()], Mat::new(&q, 1, 8), &mut scratch).unwrap();
            let read: Vec<usize> = chosen.iter().map(|chunk| chunk.at / 8).collect();
            assert_eq!(read, [0, heavy]);
            let mark = index.mark();
            assert_eq!((mark.pages, mark.covered), (8, 64));
        }
    }
}
