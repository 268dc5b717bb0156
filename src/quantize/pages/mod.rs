//! Pages: what codecs make of tokens, as the cache and the reading side see it. One file a kind.

#![forbid(unsafe_code)]

mod channels;
mod channels_pack;
mod key;
mod outliers;
mod pre_rope;
mod rows;
mod shifted;
mod sliced;
mod token_keys;
mod token_values;
mod value;

pub use channels::{Band, ChannelKeys};
pub(super) use channels_pack::{Channels, Factors};
pub use key::KeyPage;
pub(super) use outliers::Outliers;
pub(super) use pre_rope::HeadGrids;
pub use pre_rope::PreRopeKeys;
pub use shifted::Shifted;
pub use sliced::SlicedRows;
pub use token_keys::TokenKeys;
pub use token_values::TokenValues;
pub use value::ValuePage;

use half::slice::HalfBitsSliceExt;

use super::{Codec, Factor};
use crate::tensor::{Rows, Slice};

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

    /// What seals them: [`super::KeyCodec`] or [`super::ValueCodec`].
    type Codec: Codec<Self> + ?Sized;

    /// The page as the reading side sees it.
    fn segment(&self) -> &Self::Segment;

    /// Exact rows as the reading side sees them.
    fn tail(rows: &Rows) -> &Self::Segment;

    /// A page of exact rows.
    fn exact(rows: Rows) -> Self;

    /// The rows of an exact page.
    fn as_exact(&self) -> Option<&Rows>;

    /// Room for more tokens in this page.
    fn room(&self) -> usize;

    /// Takes the `n` oldest of `rows`, at most [`Page::room`]; with a `compensation` roundings are made up for.
    fn extend(&mut self, rows: &Rows, n: usize, compensation: Option<&Factor>);

    /// Tokens held.
    fn tokens(&self) -> usize;

    /// Bytes allocated behind this page.
    fn bytes(&self) -> PageBytes;

    /// Tokens, from the first on, that stay or go together.
    fn granularity(&self) -> usize;

    /// A page of some tokens, in whole granules.
    #[must_use]
    fn part(&self, tokens: &[usize]) -> Self;

    /// The page without room for more tokens.
    #[must_use]
    fn fit(&self) -> Self;

    /// Takes the first of some tokens of `other`, in whole granules, as far as they fit in here; returns how many.
    fn join(&mut self, other: &Self, tokens: &[usize]) -> usize;
}

/// The memory of words.
fn bytes_of(words: &[u16]) -> &[u8] {
    Slice::F16(words.reinterpret_cast()).bytes()
}
