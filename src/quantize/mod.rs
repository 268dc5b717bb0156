//! The `quantize` family: fewer bits a number.
//!
//! A codec seals tokens into pages and says when: how many of the oldest unpacked tokens are due. A page holds the
//! keys or the values of consecutive tokens of one KV head; it is shared behind an `Arc` and copied before a change.
//! To add a method: one file with its two page types, one variant in each enum below.

#![forbid(unsafe_code)]

mod exact;
mod kivi;

pub use kivi::{Kivi, PackedKeys, PackedValues};

use crate::attend::{KeySegment, ValueSegment};
use crate::error::Result;
use crate::tensor::Rows;

/// A way of storing tokens that have left the exact tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Codec {
    /// The model's own dtype, lossless.
    Exact,
    /// KIVI (arXiv 2402.02750).
    Kivi(Kivi),
}

impl Codec {
    /// Tokens at the beginning of a sequence that stay exact.
    pub fn sinks(&self) -> usize {
        match self {
            Self::Exact => 0,
            Self::Kivi(kivi) => kivi.sinks,
        }
    }

    /// Tokens of one forward up to which packing waits for the next forward, so that they can be cropped.
    pub fn window(&self) -> usize {
        match self {
            Self::Exact => exact::PAGE,
            Self::Kivi(kivi) => kivi.window,
        }
    }

    /// Checks that the parameters fit values of `dim` numbers.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when they do not.
    pub fn check_dims(&self, dim: usize) -> Result<()> {
        match self {
            Self::Exact => Ok(()),
            Self::Kivi(kivi) => kivi.check_dims(dim),
        }
    }

    /// The largest magnitude that can be stored.
    pub fn limit(&self) -> f32 {
        match self {
            Self::Exact => f32::MAX,
            Self::Kivi(_) => half::f16::MAX.to_f32(),
        }
    }
}

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

/// Keys or values of consecutive tokens, sealed by a [`Codec`].
pub trait Page: Clone + Send + Sync {
    /// How such pages are read: `dyn KeySegment` or `dyn ValueSegment`.
    type Segment: ?Sized;

    /// The page as the reading side sees it.
    fn segment(&self) -> &Self::Segment;

    /// Exact rows as the reading side sees them.
    fn tail(rows: &Rows) -> &Self::Segment;

    /// How many of `n` unpacked tokens are due to be sealed, oldest first.
    fn due(codec: &Codec, n: usize) -> usize;

    /// A page of exact rows.
    fn exact(rows: Rows) -> Self;

    /// The rows of an exact page.
    fn as_exact(&self) -> Option<&Rows>;

    /// Seals at least one and at most all of the `n` oldest of `rows`; returns the page and how many it took.
    fn seal(codec: &Codec, rows: &Rows, n: usize) -> (Self, usize);

    /// Room for more tokens in this page.
    fn room(&self) -> usize;

    /// Takes the `n` oldest of `rows`, at most [`Page::room`].
    fn extend(&mut self, rows: &Rows, n: usize);

    /// Tokens held.
    fn tokens(&self) -> usize;

    /// Bytes allocated behind this page.
    fn bytes(&self) -> PageBytes;
}

/// Sealed keys.
#[derive(Clone)]
pub enum KeyPage {
    /// In the model's dtype.
    Exact(Rows),
    /// Per channel, over groups of tokens.
    Kivi(PackedKeys),
}

/// Sealed values.
#[derive(Clone)]
pub enum ValuePage {
    /// In the model's dtype.
    Exact(Rows),
    /// Per token, over groups of channels.
    Kivi(PackedValues),
}

impl Page for KeyPage {
    type Segment = dyn KeySegment;

    fn segment(&self) -> &Self::Segment {
        match self {
            Self::Exact(rows) => rows,
            Self::Kivi(page) => page,
        }
    }

    fn tail(rows: &Rows) -> &Self::Segment {
        rows
    }

    fn due(codec: &Codec, n: usize) -> usize {
        match codec {
            Codec::Exact => exact::due(n),
            Codec::Kivi(kivi) => kivi.keys_due(n),
        }
    }

    fn exact(rows: Rows) -> Self {
        Self::Exact(rows)
    }

    fn as_exact(&self) -> Option<&Rows> {
        match self {
            Self::Exact(rows) => Some(rows),
            Self::Kivi(_) => None,
        }
    }

    fn seal(codec: &Codec, rows: &Rows, n: usize) -> (Self, usize) {
        match codec {
            Codec::Exact => {
                let (page, taken) = exact::seal(rows, n);
                (Self::Exact(page), taken)
            }
            Codec::Kivi(kivi) => {
                let n = n.min(kivi.window);
                (Self::Kivi(PackedKeys::pack(kivi, rows, n)), n)
            }
        }
    }

    fn room(&self) -> usize {
        0
    }

    fn extend(&mut self, _: &Rows, n: usize) {
        assert_eq!(n, 0, "key pages are sealed whole");
    }

    fn tokens(&self) -> usize {
        match self {
            Self::Exact(rows) => rows.len(),
            Self::Kivi(page) => page.tokens(),
        }
    }

    fn bytes(&self) -> PageBytes {
        match self {
            Self::Exact(rows) => PageBytes { exact: rows.bytes(), ..PageBytes::default() },
            Self::Kivi(page) => page.bytes(),
        }
    }
}

impl Page for ValuePage {
    type Segment = dyn ValueSegment;

    fn segment(&self) -> &Self::Segment {
        match self {
            Self::Exact(rows) => rows,
            Self::Kivi(page) => page,
        }
    }

    fn tail(rows: &Rows) -> &Self::Segment {
        rows
    }

    fn due(codec: &Codec, n: usize) -> usize {
        match codec {
            Codec::Exact => exact::due(n),
            Codec::Kivi(kivi) => kivi.values_due(n),
        }
    }

    fn exact(rows: Rows) -> Self {
        Self::Exact(rows)
    }

    fn as_exact(&self) -> Option<&Rows> {
        match self {
            Self::Exact(rows) => Some(rows),
            Self::Kivi(_) => None,
        }
    }

    fn seal(codec: &Codec, rows: &Rows, n: usize) -> (Self, usize) {
        match codec {
            Codec::Exact => {
                let (page, taken) = exact::seal(rows, n);
                (Self::Exact(page), taken)
            }
            Codec::Kivi(kivi) => {
                let mut page = PackedValues::new(kivi, rows.dim());
                let n = n.min(page.room());
                page.extend(rows, n);
                (Self::Kivi(page), n)
            }
        }
    }

    fn room(&self) -> usize {
        match self {
            Self::Exact(_) => 0,
            Self::Kivi(page) => page.room(),
        }
    }

    fn extend(&mut self, rows: &Rows, n: usize) {
        match self {
            Self::Exact(_) => assert_eq!(n, 0, "exact pages are sealed whole"),
            Self::Kivi(page) => page.extend(rows, n),
        }
    }

    fn tokens(&self) -> usize {
        match self {
            Self::Exact(rows) => rows.len(),
            Self::Kivi(page) => page.tokens(),
        }
    }

    fn bytes(&self) -> PageBytes {
        match self {
            Self::Exact(rows) => PageBytes { exact: rows.bytes(), ..PageBytes::default() },
            Self::Kivi(page) => page.bytes(),
        }
    }
}
