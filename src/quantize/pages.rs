//! Pages: what a method makes of tokens, as the cache and the reading side see it.

use super::{
    Block, ChannelKeys, Factor, Graded, Kivi, Method, Moved, Plan, Rotated, TokenKeys, TokenValues, UnrotatedKeys,
    exact, kvarn, whole_windows,
};
use crate::attend::{KeySegment, ValueSegment};
use crate::tensor::Rows;

/// Bytes allocated for a page's parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageBytes {
    /// Packed codes.
    pub codes: usize,
    /// Scales and zero-points.
    pub scales: usize,
    /// Numbers in the model's dtype.
    pub exact: usize,
}

/// Keys or values of consecutive tokens, sealed by a [`Method`].
pub trait Page: Clone + Send + Sync {
    /// How such pages are read: `dyn KeySegment` or `dyn ValueSegment`.
    type Segment: ?Sized;

    /// The page as the reading side sees it.
    fn segment(&self) -> &Self::Segment;

    /// Exact rows as the reading side sees them.
    fn tail(rows: &Rows) -> &Self::Segment;

    /// How many of `n` unpacked tokens are due to be sealed, oldest first.
    fn due(method: &Method, n: usize) -> usize;

    /// A page of exact rows.
    fn exact(rows: Rows) -> Self;

    /// The rows of an exact page.
    fn as_exact(&self) -> Option<&Rows>;

    /// Seals at least one and at most all of the `n` oldest of `rows`; returns the page and how many it took.
    fn seal(method: &Method, plan: &mut Plan, rows: &Rows, n: usize) -> (Self, usize);

    /// Room for more tokens in this page.
    fn room(&self) -> usize;

    /// Takes the `n` oldest of `rows`, at most [`Page::room`]; with `feedback` roundings are made up for.
    fn extend(&mut self, rows: &Rows, n: usize, feedback: Option<&Factor>);

    /// Tokens held.
    fn tokens(&self) -> usize;

    /// Bytes allocated behind this page.
    fn bytes(&self) -> PageBytes;

    /// Tokens, from the first on, that stay or go together.
    fn unit(&self) -> usize;

    /// A page of some tokens, in whole units.
    #[must_use]
    fn part(&self, tokens: &[usize]) -> Self;

    /// Takes the first of some tokens of `other`, in whole units, as far as they fit in here; returns how many.
    fn join(&mut self, other: &Self, tokens: &[usize]) -> usize;
}

/// Sealed keys.
#[derive(Clone)]
pub enum KeyPage {
    /// In the model's dtype.
    Exact(Rows),
    /// A grid a channel and group of tokens.
    Channels(ChannelKeys),
    /// A scale a token and group of channels.
    Tokens(TokenKeys),
    /// A static grid a channel, before RoPE.
    Unrotated(UnrotatedKeys),
    /// Any of them, read as if at later positions.
    Moved(Moved),
}

/// Sealed values.
#[derive(Clone)]
pub enum ValuePage {
    /// In the model's dtype.
    Exact(Rows),
    /// A grid a token and group of channels.
    Tokens(TokenValues),
}

impl Page for KeyPage {
    type Segment = dyn KeySegment;

    fn segment(&self) -> &Self::Segment {
        match self {
            Self::Exact(rows) => rows,
            Self::Channels(page) => page,
            Self::Tokens(page) => page,
            Self::Unrotated(page) => page,
            Self::Moved(page) => page,
        }
    }

    fn tail(rows: &Rows) -> &Self::Segment {
        rows
    }

    fn due(method: &Method, n: usize) -> usize {
        match method {
            Method::Exact => exact::due(n),
            // A group needs all its tokens.
            Method::Kivi(Kivi { window, full_window, .. }) | Method::Graded(Graded { window, full_window, .. }) => {
                whole_windows(n, *window, *full_window)
            }
            Method::Block(Block { window, .. }) | Method::Rotated(Rotated { window, .. }) => n.saturating_sub(*window),
            Method::Kvarn(kvarn) => whole_windows(n, kvarn::BLOCK, kvarn.full_window),
            Method::KvQuant(kvquant) => n.saturating_sub(kvquant.window),
        }
    }

    fn exact(rows: Rows) -> Self {
        Self::Exact(rows)
    }

    fn as_exact(&self) -> Option<&Rows> {
        match self {
            Self::Exact(rows) => Some(rows),
            Self::Moved(moved) => moved.page().as_exact(),
            _ => None,
        }
    }

    fn seal(method: &Method, plan: &mut Plan, rows: &Rows, n: usize) -> (Self, usize) {
        match method {
            Method::Exact => {
                let (page, taken) = exact::seal(rows, n);
                (Self::Exact(page), taken)
            }
            Method::Kivi(_) | Method::Graded(_) | Method::Kvarn(_) => {
                let page = ChannelKeys::pack(method, plan, rows);
                let taken = page.tokens();
                (Self::Channels(page), taken)
            }
            Method::Block(_) | Method::Rotated(_) => {
                let mut page = TokenKeys::new(method, plan, rows.dim());
                let n = n.min(page.room());
                page.extend(rows, n, plan.token_feedback(method).as_deref());
                (Self::Tokens(page), n)
            }
            Method::KvQuant(kvquant) => {
                let mut page = UnrotatedKeys::new(plan.head_grids(kvquant), plan.first);
                let n = n.min(page.room());
                page.extend(rows, n);
                (Self::Unrotated(page), n)
            }
        }
    }

    fn room(&self) -> usize {
        match self {
            Self::Exact(_) | Self::Channels(_) | Self::Moved(_) => 0,
            Self::Tokens(page) => page.room(),
            Self::Unrotated(page) => page.room(),
        }
    }

    fn extend(&mut self, rows: &Rows, n: usize, feedback: Option<&Factor>) {
        match self {
            Self::Tokens(page) => page.extend(rows, n, feedback),
            Self::Unrotated(page) => page.extend(rows, n),
            Self::Exact(_) | Self::Channels(_) | Self::Moved(_) => assert_eq!(n, 0, "these key pages are sealed whole"),
        }
    }

    fn tokens(&self) -> usize {
        match self {
            Self::Exact(rows) => rows.len(),
            Self::Channels(page) => page.tokens(),
            Self::Tokens(page) => page.tokens(),
            Self::Unrotated(page) => page.tokens(),
            Self::Moved(moved) => moved.page().tokens(),
        }
    }

    fn bytes(&self) -> PageBytes {
        match self {
            Self::Exact(rows) => PageBytes { exact: rows.bytes(), ..PageBytes::default() },
            Self::Channels(page) => page.bytes(),
            Self::Tokens(page) => page.bytes(),
            Self::Unrotated(page) => page.bytes(),
            Self::Moved(moved) => moved.page().bytes(),
        }
    }

    fn unit(&self) -> usize {
        match self {
            Self::Exact(_) | Self::Tokens(_) => 1,
            Self::Channels(page) => page.group(),
            // Its tokens are at consecutive positions.
            Self::Unrotated(page) => page.tokens(),
            Self::Moved(moved) => moved.page().unit(),
        }
    }

    fn part(&self, tokens: &[usize]) -> Self {
        match self {
            Self::Exact(rows) => Self::Exact(rows.take(tokens)),
            Self::Channels(page) => Self::Channels(page.part(tokens)),
            Self::Tokens(page) => Self::Tokens(page.part(tokens)),
            Self::Unrotated(page) => Self::Unrotated(page.clone()),
            Self::Moved(page) => Self::Moved(page.part(tokens)),
        }
    }

    fn join(&mut self, other: &Self, tokens: &[usize]) -> usize {
        match (self, other) {
            (Self::Exact(rows), Self::Exact(other)) => exact::join(rows, other, tokens),
            (Self::Channels(page), Self::Channels(other)) => page.join(other, tokens),
            (Self::Tokens(page), Self::Tokens(other)) => page.join(other, tokens),
            _ => 0,
        }
    }
}

impl Page for ValuePage {
    type Segment = dyn ValueSegment;

    fn segment(&self) -> &Self::Segment {
        match self {
            Self::Exact(rows) => rows,
            Self::Tokens(page) => page,
        }
    }

    fn tail(rows: &Rows) -> &Self::Segment {
        rows
    }

    fn due(method: &Method, n: usize) -> usize {
        match method {
            Method::Exact => exact::due(n),
            Method::Kivi(Kivi { window, .. })
            | Method::Block(Block { window, .. })
            | Method::Rotated(Rotated { window, .. }) => n.saturating_sub(*window),
            Method::Kvarn(kvarn) => whole_windows(n, kvarn::BLOCK, kvarn.full_window),
            Method::KvQuant(kvquant) => n.saturating_sub(kvquant.window),
            Method::Graded(_) => unreachable!("a codec has no graded values"),
        }
    }

    fn exact(rows: Rows) -> Self {
        Self::Exact(rows)
    }

    fn as_exact(&self) -> Option<&Rows> {
        if let Self::Exact(rows) = self { Some(rows) } else { None }
    }

    fn seal(method: &Method, plan: &mut Plan, rows: &Rows, n: usize) -> (Self, usize) {
        if let Method::Exact = method {
            let (page, taken) = exact::seal(rows, n);
            return (Self::Exact(page), taken);
        }
        let mut page = Self::Tokens(TokenValues::new(method, plan, rows.dim()));
        let n = n.min(page.room());
        page.extend(rows, n, plan.token_feedback(method).as_deref());
        (page, n)
    }

    fn room(&self) -> usize {
        match self {
            Self::Exact(_) => 0,
            Self::Tokens(page) => page.room(),
        }
    }

    fn extend(&mut self, rows: &Rows, n: usize, feedback: Option<&Factor>) {
        match self {
            Self::Exact(_) => assert_eq!(n, 0, "exact pages are sealed whole"),
            Self::Tokens(page) => page.extend(rows, n, feedback),
        }
    }

    fn tokens(&self) -> usize {
        match self {
            Self::Exact(rows) => rows.len(),
            Self::Tokens(page) => page.tokens(),
        }
    }

    fn bytes(&self) -> PageBytes {
        match self {
            Self::Exact(rows) => PageBytes { exact: rows.bytes(), ..PageBytes::default() },
            Self::Tokens(page) => page.bytes(),
        }
    }

    fn unit(&self) -> usize {
        // A part of a block keeps the factors of its channels.
        1
    }

    fn part(&self, tokens: &[usize]) -> Self {
        match self {
            Self::Exact(rows) => Self::Exact(rows.take(tokens)),
            Self::Tokens(page) => Self::Tokens(page.part(tokens)),
        }
    }

    fn join(&mut self, other: &Self, tokens: &[usize]) -> usize {
        match (self, other) {
            (Self::Exact(rows), Self::Exact(other)) => exact::join(rows, other, tokens),
            (Self::Tokens(page), Self::Tokens(other)) => page.join(other, tokens),
            _ => 0,
        }
    }
}
