//! What a KV head stores packed, laid out plainly, for tests and for the curious: made without the GIL, and arrays of `NumPy` when
//! Python gets it.

use ndarray::{Array2, ShapeError};
use numpy::{IntoPyArray, PyArray1, PyArray2};
use pyo3::prelude::*;

use crate::cache::{KvHead, Segment};
use crate::quantize::{KeyPage, ValuePage};

/// What is packed of keys, or of values. Python gets the tuple of its parts.
#[derive(Default)]
pub(super) struct Packed {
    /// Exact tokens before the packed ones.
    exact: usize,
    /// Codes `[tokens, dim]`.
    codes: Vec<u8>,
    /// Scales and zero-points in the order of their groups, `[n, columns]`: a row a token, or a group of tokens.
    scales: Vec<f32>,
    zeros: Vec<f32>,
    dim: usize,
    columns: usize,
}

impl<'py> IntoPyObject<'py> for Packed {
    type Target = pyo3::types::PyTuple;
    type Output = Bound<'py, Self::Target>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        let (scales, zeros) = (matrix(py, self.scales, self.columns)?, matrix(py, self.zeros, self.columns)?);
        (self.exact, matrix(py, self.codes, self.dim)?, scales, zeros).into_pyobject(py)
    }
}

/// `NumPy`'s array of rows of `columns` numbers.
fn matrix<T: numpy::Element>(py: Python<'_>, numbers: Vec<T>, columns: usize) -> PyResult<Bound<'_, PyArray2<T>>> {
    let rows = numbers.len() / columns.max(1);
    let wrong = |error: ShapeError| pyo3::exceptions::PyRuntimeError::new_err(error.to_string());
    Ok(Array2::from_shape_vec((rows, columns), numbers).map_err(wrong)?.into_pyarray(py))
}

/// Positions that a KV head holds. Python gets an array of int64.
pub(super) struct Positions(Vec<i64>);

impl<'py> IntoPyObject<'py> for Positions {
    type Target = PyArray1<i64>;
    type Output = Bound<'py, Self::Target>;
    type Error = std::convert::Infallible;

    fn into_pyobject(self, py: Python<'py>) -> Result<Self::Output, Self::Error> {
        Ok(self.0.into_pyarray(py))
    }
}

impl From<Vec<u32>> for Positions {
    fn from(positions: Vec<u32>) -> Self {
        Self(positions.into_iter().map(i64::from).collect())
    }
}

/// Keys of `dim` numbers.
pub(super) fn keys(head: &KvHead, dim: usize) -> Packed {
    let mut out = Packed { dim, columns: dim, ..Packed::default() };
    for segment in head.pages().0 {
        let page = match &*segment.page {
            KeyPage::Shifted(shifted) => shifted.page(),
            page => page,
        };
        match page {
            KeyPage::Exact(_) | KeyPage::Rounded(_) | KeyPage::Sliced(_) | KeyPage::Shifted(_) => {
                out.exact += segment.len;
            }
            KeyPage::Tokens(page) => {
                let grid = |t, j| page.grid(t, j);
                out.columns = page.groups();
                add(&mut out, segment.len, |t, c| page.code(t, c), grid);
            }
            KeyPage::PreRope(page) => {
                // One grid a channel for all tokens: the first of them brings it.
                out.columns = 0;
                add(&mut out, segment.len, |t, c| page.code(t, c), |_, _| (0.0, 0.0));
                if out.scales.is_empty() {
                    (out.scales, out.zeros) = (0..dim).map(|c| page.grid(c)).unzip();
                }
                out.columns = dim;
            }
            KeyPage::Channels(page) => {
                for t in 0..segment.len {
                    let (codes, scales, zeros) = page.token(t);
                    out.codes.extend(codes);
                    if t % page.group() == 0 {
                        out.scales.extend(scales);
                        out.zeros.extend(zeros);
                    }
                }
            }
        }
    }
    out
}

/// What is kept beside the codes. Python gets three arrays: the packed token, the channel, and what the code there lacks.
#[derive(Default)]
pub(super) struct Outliers {
    tokens: Vec<i64>,
    channels: Vec<i64>,
    rests: Vec<f32>,
}

impl<'py> IntoPyObject<'py> for Outliers {
    type Target = pyo3::types::PyTuple;
    type Output = Bound<'py, Self::Target>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        (self.tokens.into_pyarray(py), self.channels.into_pyarray(py), self.rests.into_pyarray(py)).into_pyobject(py)
    }
}

/// What is kept beside the codes of keys, and of values.
pub(super) fn outliers(head: &KvHead) -> (Outliers, Outliers) {
    let (mut keys, mut values) = (Outliers::default(), Outliers::default());
    for (first, segment) in packed_segments(head.pages().0, |page| matches!(page, KeyPage::Exact(_))) {
        if let KeyPage::PreRope(page) = &*segment.page {
            add_outliers(&mut keys, first, segment.len, page.outliers_of(segment.len));
        }
    }
    for (first, segment) in packed_segments(head.pages().1, |page| matches!(page, ValuePage::Exact(_))) {
        if let ValuePage::Tokens(page) = &*segment.page {
            add_outliers(&mut values, first, segment.len, page.outliers_of(segment.len));
        }
    }
    (keys, values)
}

/// Segments that are not exact, each with how many packed tokens are before it.
fn packed_segments<P>(
    segments: &[Segment<P>],
    exact: impl Fn(&P) -> bool,
) -> impl Iterator<Item = (usize, &Segment<P>)> {
    let packed = segments.iter().filter(move |segment| !exact(&segment.page));
    packed.scan(0, |first, segment| {
        let here = *first;
        *first += segment.len;
        Some((here, segment))
    })
}

fn add_outliers(out: &mut Outliers, first: usize, tokens: usize, found: Vec<(usize, f32)>) {
    let each = found.len() / tokens.max(1);
    for (i, (channel, rest)) in found.into_iter().enumerate().filter(|&(_, (_, rest))| rest != 0.0) {
        out.tokens.push((first + i / each) as i64);
        out.channels.push(channel as i64);
        out.rests.push(rest);
    }
}

/// Bits of every channel, a row a page with a grid a channel. Python gets a matrix.
#[derive(Default)]
pub(super) struct Bits {
    bits: Vec<u8>,
    dim: usize,
}

impl<'py> IntoPyObject<'py> for Bits {
    type Target = PyArray2<u8>;
    type Output = Bound<'py, Self::Target>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        matrix(py, self.bits, self.dim)
    }
}

/// Of keys of `dim` numbers.
pub(super) fn key_bits(head: &KvHead, dim: usize) -> Bits {
    let bits = |page: &KeyPage| if let KeyPage::Channels(page) = page { Some(page.bits()) } else { None };
    Bits { bits: head.pages().0.iter().filter_map(|segment| bits(&segment.page)).flatten().collect(), dim }
}

/// Values of `dim` numbers.
pub(super) fn values(head: &KvHead, dim: usize) -> Packed {
    let mut out = Packed { dim, columns: 1, ..Packed::default() };
    for segment in head.pages().1 {
        match &*segment.page {
            ValuePage::Exact(_) | ValuePage::Rounded(_) | ValuePage::Sliced(_) => out.exact += segment.len,
            ValuePage::Tokens(page) => {
                out.columns = page.groups();
                add(&mut out, segment.len, |t, c| page.code(t, c), |t, j| page.grid(t, j));
            }
        }
    }
    out
}

/// Adds a page's `tokens`: their codes, and `columns` grids each.
fn add(out: &mut Packed, tokens: usize, code: impl Fn(usize, usize) -> u8, grid: impl Fn(usize, usize) -> (f32, f32)) {
    for t in 0..tokens {
        out.codes.extend((0..out.dim).map(|c| code(t, c)));
        for j in 0..out.columns {
            let (scale, zero) = grid(t, j);
            out.scales.push(scale);
            out.zeros.push(zero);
        }
    }
}
