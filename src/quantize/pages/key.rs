//! A page of keys.

use super::{ChannelKeys, Page, PageBytes, PreRopeKeys, Shifted, SlicedRows, TokenKeys, rows};
use crate::attend::KeySegment;
use crate::quantize::{Factor, KeyCodec};
use crate::tensor::Rows;

/// Sealed keys.
#[derive(Clone)]
pub enum KeyPage {
    /// In the model's dtype.
    Exact(Rows),
    /// In the model's dtype, as a codec has changed them.
    Rounded(Rows),
    /// The same of fewer numbers.
    Sliced(SlicedRows),
    /// A grid a channel and group of tokens.
    Channels(ChannelKeys),
    /// A scale a token and group of channels.
    Tokens(TokenKeys),
    /// A static grid a channel, pre-RoPE.
    PreRope(PreRopeKeys),
    /// Any of them, read as if at later positions.
    Shifted(Shifted),
}

impl Page for KeyPage {
    type Segment = dyn KeySegment;
    type Codec = KeyCodec;

    fn segment(&self) -> &Self::Segment {
        match self {
            Self::Exact(rows) | Self::Rounded(rows) => rows,
            Self::Sliced(page) => page,
            Self::Channels(page) => page,
            Self::Tokens(page) => page,
            Self::PreRope(page) => page,
            Self::Shifted(page) => page,
        }
    }

    fn tail(rows: &Rows) -> &Self::Segment {
        rows
    }

    fn exact(rows: Rows) -> Self {
        Self::Exact(rows)
    }

    fn as_exact(&self) -> Option<&Rows> {
        match self {
            Self::Exact(rows) => Some(rows),
            Self::Shifted(shifted) => shifted.page().as_exact(),
            _ => None,
        }
    }

    fn room(&self) -> usize {
        match self {
            Self::Exact(_) | Self::Rounded(_) | Self::Sliced(_) | Self::Channels(_) | Self::Shifted(_) => 0,
            Self::Tokens(page) => page.room(),
            Self::PreRope(page) => page.room(),
        }
    }

    fn extend(&mut self, rows: &Rows, n: usize, compensation: Option<&Factor>) {
        match self {
            Self::Tokens(page) => page.extend(rows, n, compensation),
            Self::PreRope(page) => page.extend(rows, n),
            Self::Exact(_) | Self::Rounded(_) | Self::Sliced(_) | Self::Channels(_) | Self::Shifted(_) => {
                assert_eq!(n, 0, "these key pages are sealed whole");
            }
        }
    }

    fn tokens(&self) -> usize {
        match self {
            Self::Exact(rows) | Self::Rounded(rows) => rows.len(),
            Self::Sliced(page) => page.rows().len(),
            Self::Channels(page) => page.tokens(),
            Self::Tokens(page) => page.tokens(),
            Self::PreRope(page) => page.tokens(),
            Self::Shifted(shifted) => shifted.page().tokens(),
        }
    }

    fn bytes(&self) -> PageBytes {
        match self {
            Self::Exact(rows) | Self::Rounded(rows) => PageBytes { exact: rows.bytes(), ..PageBytes::default() },
            Self::Sliced(page) => PageBytes { exact: page.rows().bytes(), ..PageBytes::default() },
            Self::Channels(page) => page.bytes(),
            Self::Tokens(page) => page.bytes(),
            Self::PreRope(page) => page.bytes(),
            Self::Shifted(shifted) => shifted.page().bytes(),
        }
    }

    fn granularity(&self) -> usize {
        match self {
            Self::Exact(_) | Self::Rounded(_) | Self::Sliced(_) | Self::Tokens(_) => 1,
            Self::Channels(page) => page.group(),
            // Its tokens are at consecutive positions.
            Self::PreRope(page) => page.tokens(),
            Self::Shifted(shifted) => shifted.page().granularity(),
        }
    }

    fn part(&self, tokens: &[usize]) -> Self {
        match self {
            Self::Exact(rows) => Self::Exact(rows.take(tokens)),
            Self::Rounded(rows) => Self::Rounded(rows.take(tokens)),
            Self::Sliced(page) => Self::Sliced(page.part(tokens)),
            Self::Channels(page) => Self::Channels(page.part(tokens)),
            Self::Tokens(page) => Self::Tokens(page.part(tokens)),
            Self::PreRope(page) => Self::PreRope(page.clone()),
            Self::Shifted(page) => Self::Shifted(page.part(tokens)),
        }
    }

    fn fit(&self) -> Self {
        if let Self::Tokens(page) = self { Self::Tokens(page.fit()) } else { self.clone() }
    }

    fn join(&mut self, other: &Self, tokens: &[usize]) -> usize {
        match (self, other) {
            (Self::Exact(rows), Self::Exact(other)) | (Self::Rounded(rows), Self::Rounded(other)) => {
                rows::join(rows, other, tokens)
            }
            (Self::Channels(page), Self::Channels(other)) => page.join(other, tokens),
            (Self::Sliced(page), Self::Sliced(other)) => page.join(other, tokens),
            (Self::Tokens(page), Self::Tokens(other)) => page.join(other, tokens),
            _ => 0,
        }
    }
}
