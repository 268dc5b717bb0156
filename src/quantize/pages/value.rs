//! A page of values.

use super::{Page, PageBytes, SlicedRows, TokenValues, rows};
use crate::attend::ValueSegment;
use crate::quantize::{Factor, ValueCodec};
use crate::tensor::Rows;

/// Sealed values.
#[derive(Clone)]
pub enum ValuePage {
    /// In the model's dtype.
    Exact(Rows),
    /// In the model's dtype, as a codec has changed them.
    Rounded(Rows),
    /// The same of fewer numbers.
    Sliced(SlicedRows),
    /// A grid a token and group of channels.
    Tokens(TokenValues),
}

impl Page for ValuePage {
    type Segment = dyn ValueSegment;
    type Codec = ValueCodec;

    fn segment(&self) -> &Self::Segment {
        match self {
            Self::Exact(rows) | Self::Rounded(rows) => rows,
            Self::Sliced(page) => page,
            Self::Tokens(page) => page,
        }
    }

    fn tail(rows: &Rows) -> &Self::Segment {
        rows
    }

    fn exact(rows: Rows) -> Self {
        Self::Exact(rows)
    }

    fn as_exact(&self) -> Option<&Rows> {
        if let Self::Exact(rows) = self { Some(rows) } else { None }
    }

    fn room(&self) -> usize {
        match self {
            Self::Exact(_) | Self::Rounded(_) | Self::Sliced(_) => 0,
            Self::Tokens(page) => page.room(),
        }
    }

    fn extend(&mut self, rows: &Rows, n: usize, compensation: Option<&Factor>) {
        match self {
            Self::Exact(_) | Self::Rounded(_) | Self::Sliced(_) => assert_eq!(n, 0, "exact pages are sealed whole"),
            Self::Tokens(page) => page.extend(rows, n, compensation),
        }
    }

    fn tokens(&self) -> usize {
        match self {
            Self::Exact(rows) | Self::Rounded(rows) => rows.len(),
            Self::Sliced(page) => page.rows().len(),
            Self::Tokens(page) => page.tokens(),
        }
    }

    fn bytes(&self) -> PageBytes {
        match self {
            Self::Exact(rows) | Self::Rounded(rows) => PageBytes { exact: rows.bytes(), ..PageBytes::default() },
            Self::Sliced(page) => PageBytes { exact: page.rows().bytes(), ..PageBytes::default() },
            Self::Tokens(page) => page.bytes(),
        }
    }

    fn granularity(&self) -> usize {
        // A part of a block keeps the factors of its channels.
        1
    }

    fn part(&self, tokens: &[usize]) -> Self {
        match self {
            Self::Exact(rows) => Self::Exact(rows.take(tokens)),
            Self::Rounded(rows) => Self::Rounded(rows.take(tokens)),
            Self::Sliced(page) => Self::Sliced(page.part(tokens)),
            Self::Tokens(page) => Self::Tokens(page.part(tokens)),
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
            (Self::Sliced(page), Self::Sliced(other)) => page.join(other, tokens),
            (Self::Tokens(page), Self::Tokens(other)) => page.join(other, tokens),
            _ => 0,
        }
    }
}
