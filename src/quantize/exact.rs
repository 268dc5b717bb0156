//! Exact: rows in the model's own dtype, in pages only so that they can be shared.

#![forbid(unsafe_code)]

use super::{Codec, KeyPage, Method, Page, Plan, ValuePage};
use crate::error::Result;
use crate::tensor::{Limit, Rows};

/// Tokens of a page: small, so that the copy of an open tail that every beam makes is small.
pub(super) const PAGE: usize = 64;

/// Multiply-adds that take as long as copying a number.
const COPYING: usize = 8;

/// The model's own dtype, lossless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exact;

impl Method for Exact {
    fn sinks(&self) -> usize {
        0
    }

    fn window(&self) -> usize {
        PAGE
    }

    fn limit(&self) -> Limit {
        Limit::of_numbers(f32::MAX)
    }

    fn work(&self) -> usize {
        COPYING
    }
}

fn due(n: usize) -> usize {
    n / PAGE * PAGE
}

fn seal<P: Page>(rows: &Rows, n: usize) -> (P, usize) {
    let n = n.min(PAGE);
    (P::exact(rows.copy(0..n)), n)
}

impl Codec<KeyPage> for Exact {
    fn due(&self, n: usize) -> usize {
        due(n)
    }

    fn seal(&self, _: &mut Plan, rows: &Rows, n: usize) -> Result<(KeyPage, usize)> {
        Ok(seal(rows, n))
    }
}

impl Codec<ValuePage> for Exact {
    fn due(&self, n: usize) -> usize {
        due(n)
    }

    fn seal(&self, _: &mut Plan, rows: &Rows, n: usize) -> Result<(ValuePage, usize)> {
        Ok(seal(rows, n))
    }
}
