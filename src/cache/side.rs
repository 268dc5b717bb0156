//! A side: the keys, or the values, of one KV head, as sealed segments and an exact tail.

use std::ops::Range;
use std::sync::Arc;

use super::memory::Counter;
use crate::attend::Part;
use crate::quantize::{Page, Plan};
use crate::tensor::{Held, Rows, Slice};

/// The first `len` tokens of a shared page; a crop shortens the length and leaves the page alone.
#[derive(Clone)]
pub struct Segment<P> {
    /// The page.
    pub page: Arc<P>,
    /// Tokens of it that are held.
    pub len: usize,
}

impl<P: Page> Segment<P> {
    /// Whether the page has room and was not cropped.
    pub(super) fn is_open(&self) -> bool {
        self.page.room() > 0 && self.len == self.page.tokens()
    }

    /// Lets its `n` oldest tokens go.
    pub(super) fn cut_front(&mut self, n: usize) {
        let kept: Vec<usize> = (n..self.len).collect();
        *self = Self { len: kept.len(), page: Arc::new(self.page.part(&kept)) };
    }

    /// The rows of an exact page.
    pub(super) fn exact(&self) -> Slice<'_> {
        self.page.as_exact().expect("an exact page").slice(0..self.len)
    }
}

/// Keys or values of consecutive tokens, oldest first.
#[derive(Clone)]
pub(super) struct Side<P> {
    pub(super) segments: Vec<Segment<P>>,
    /// How many of the last segments are [lent](super::seal).
    pub(super) lent: usize,
    /// Whether the sequence's first tokens have left it, and there are no sinks any more.
    pub(super) headless: bool,
    pub(super) tail: Rows,
    /// Copied before a change, as pages are.
    pub(super) plan: Arc<Plan>,
}

/// What a side was like: see [`Side::mark`].
pub(super) struct SideMark<P> {
    segments: usize,
    room: usize,
    /// The last page, if it may grow. While it is shared with this mark, a copy of it grows.
    open: Option<Segment<P>>,
    tail: Held,
    plan: Arc<Plan>,
}

impl<P: Page> Side<P> {
    /// Remembers what it is like, so that tokens that are sealed and appended from now on can be undone, exactly and whatever
    /// comes in between; tokens that are let go cannot.
    pub(super) fn mark(&mut self) -> SideMark<P> {
        SideMark {
            segments: self.segments.len(),
            room: self.segments.capacity(),
            open: self.segments.last().filter(|last| last.is_open()).cloned(),
            tail: self.tail.hold(),
            plan: Arc::clone(&self.plan),
        }
    }

    /// Makes it what it was.
    pub(super) fn restore(&mut self, mark: &SideMark<P>) {
        self.segments.truncate(mark.segments);
        if let (Some(last), Some(open)) = (self.segments.last_mut(), &mark.open) {
            last.clone_from(open);
        }
        self.segments.shrink_to(mark.room);
        self.tail.restore(mark.tail);
        self.plan.clone_from(&mark.plan);
    }

    /// Gives back what was kept for [`Self::restore`].
    pub(super) fn release(&mut self) {
        self.tail.release();
    }

    /// An empty one of KV head number `head`.
    pub(super) fn new(head: usize, tail: Rows) -> Self {
        Self { segments: Vec::new(), lent: 0, headless: false, tail, plan: Arc::new(Plan::new(head)) }
    }

    /// What the method decided.
    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The same, to be changed.
    pub(super) fn plan_mut(&mut self) -> &mut Plan {
        Arc::make_mut(&mut self.plan)
    }

    /// The segments that are sealed, oldest first.
    pub(super) fn sealed(&self) -> &[Segment<P>] {
        &self.segments[..self.segments.len() - self.lent]
    }

    pub(super) fn sealed_tokens(&self) -> usize {
        self.sealed().iter().map(|s| s.len).sum()
    }

    /// Tokens that are not sealed.
    pub(super) fn waiting(&self) -> usize {
        self.segments[self.sealed().len()..].iter().map(|s| s.len).sum::<usize>() + self.tail.len()
    }

    /// Tokens of the segments that do not grow any more.
    pub(super) fn closed(&self) -> usize {
        self.sealed_tokens() - self.sealed().last().filter(|last| last.is_open()).map_or(0, |last| last.len)
    }

    /// Tokens in pages that do not hold them exactly.
    pub(super) fn lossy(&self) -> usize {
        self.segments.iter().filter(|s| s.page.as_exact().is_none()).map(|s| s.len).sum()
    }

    /// Whether keeping the `n` oldest tokens cuts only exact ones.
    pub(super) fn cuts_exactly(&self, n: usize) -> bool {
        let mut held = 0;
        for s in &self.segments {
            held += s.len;
            if held > n && s.page.as_exact().is_none() {
                return false;
            }
        }
        true
    }

    /// Keeps the `n` oldest tokens. What is left of an exact page that is cut goes back to the tail.
    pub(super) fn truncate(&mut self, n: usize) {
        self.own();
        let mut sealed = self.sealed_tokens();
        let gone = (sealed + self.tail.len()).saturating_sub(n);
        if self.plan.remembers() {
            Arc::make_mut(&mut self.plan).forget(gone);
        }
        if n >= sealed {
            self.tail.truncate(n - sealed);
            return;
        }
        self.tail.truncate(0);
        while sealed > n {
            let last = self.segments.last_mut().expect("sealed tokens are in segments");
            let keep = last.len.saturating_sub(sealed - n);
            sealed -= last.len - keep;
            last.len = keep;
            if last.page.as_exact().is_some() {
                self.tail.prepend(last.exact());
                self.segments.pop();
            } else if keep == 0 {
                self.segments.pop();
            }
        }
    }

    /// Lengths of the runs of tokens that stay or go together.
    pub(super) fn granules(&self) -> Vec<usize> {
        let mut granules = Vec::new();
        for Segment { page, len } in &self.segments {
            let granule = page.granularity();
            granules.extend((0..*len).step_by(granule).map(|first| granule.min(len - first)));
        }
        granules.extend(std::iter::repeat_n(1, self.tail.len()));
        granules
    }

    /// Keeps the tokens for which `keep` says so, in whole granules. Pages before the first that loses one stay shared.
    pub(super) fn retain(&mut self, keep: &[bool]) {
        self.own();
        let sealed = self.sealed_tokens();
        let kept: Vec<usize> = (0..self.tail.len()).filter(|&t| keep[sealed + t]).collect();
        if kept.len() < self.tail.len() {
            self.tail = self.tail.take(&kept);
        }
        let (mut at, mut made) = (0, Vec::new());
        for segment in std::mem::take(&mut self.segments) {
            let keep = &keep[at..at + segment.len];
            at += segment.len;
            let kept: Vec<usize> = (0..segment.len).filter(|&t| keep[t]).collect();
            if made.is_empty() && kept.len() == segment.len {
                self.segments.push(segment);
            } else {
                add_part(&mut made, &*segment.page, &kept);
            }
        }
        self.segments.extend(made.into_iter().map(|(page, len)| Segment { page: Arc::new(page), len }));
        self.segments.shrink_to_fit();
    }

    /// Puts something else in place of the pages of `tokens`, which begin and end at whole granules.
    pub(super) fn replace(&mut self, tokens: Range<usize>, other: impl Fn(&Arc<P>) -> P) {
        self.own();
        self.cut(tokens.start);
        self.cut(tokens.end);
        let mut at = 0;
        for segment in &mut self.segments {
            if tokens.contains(&at) {
                segment.page = Arc::new(other(&segment.page));
            }
            at += segment.len;
        }
    }

    /// Has a segment begin at token `at`, or the tail.
    fn cut(&mut self, mut at: usize) {
        for i in 0..self.segments.len() {
            let Segment { page, len } = &self.segments[i];
            if at == 0 {
                return;
            }
            if at < *len {
                let part = |tokens: Range<usize>| Segment {
                    len: tokens.len(),
                    page: Arc::new(page.part(&tokens.collect::<Vec<_>>())),
                };
                let both = [part(0..at), part(at..*len)];
                self.segments.splice(i..=i, both);
                return;
            }
            at -= len;
        }
        if at > 0 {
            self.push(P::exact(self.tail.copy(0..at)));
            self.tail.drop_front(at);
        }
    }

    /// Segments and tail as the reading side sees them.
    pub(super) fn parts(&self) -> Vec<Part<'_, P::Segment>> {
        let pages = self.segments.iter().map(|s| Part { segment: s.page.segment(), tokens: s.len });
        let tail = Part { segment: P::tail(&self.tail), tokens: self.tail.len() };
        pages.chain([tail]).collect()
    }

    /// Adds what is allocated for it to `counter`: now, or when `mark` was made.
    pub(super) fn count(&self, mark: Option<&SideMark<P>>, counter: &mut Counter) {
        let (segments, room, tail, plan) = match mark {
            Some(mark) => (&self.segments[..mark.segments], mark.room, self.tail.bytes_when(mark.tail), &mark.plan),
            None => (&self.segments[..], self.segments.capacity(), self.tail.bytes(), &self.plan),
        };
        counter.memory.exact += tail;
        counter.memory.index += room * size_of::<Segment<P>>();
        counter.plan(plan);
        let open = mark.and_then(|mark| mark.open.as_ref());
        let closed = &segments[..segments.len() - usize::from(open.is_some())];
        closed.iter().chain(open).for_each(|segment| counter.page(&segment.page));
    }
}

/// Adds some tokens of a page to the pages made so far, in the last one as far as it has room and was not cut short.
fn add_part<P: Page>(made: &mut Vec<(P, usize)>, page: &P, tokens: &[usize]) {
    let mut joined = 0;
    if let Some((last, len)) = made.last_mut().filter(|(last, len)| last.tokens() == *len) {
        joined = last.join(page, tokens);
        *len += joined;
    }
    if joined < tokens.len() {
        made.push((page.part(&tokens[joined..]), tokens.len() - joined));
    }
}
