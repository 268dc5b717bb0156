//! Slices: keys or values in the leading coordinates of a calibrated basis, as exact numbers.
//!
//! `y = T x`, `x' = S y`: PCA in a metric, which the calibration has chosen. Queries go in once a step, sums come back once.

#![forbid(unsafe_code)]

use std::sync::Arc;

use ndarray::Array2;

use super::exact::PAGE;
use super::pages::{KeyPage, SlicedRows, ValuePage};
use super::{Codec, Method, Plan};
use crate::error::{Result, refuse};
use crate::linalg::{Map, Matrix};
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// A basis for one KV head, and what stays exact.
#[derive(Clone, Debug)]
pub struct Sliced {
    map: Arc<Map>,
    /// Numbers of what is sliced.
    dim: usize,
    window: usize,
    sinks: usize,
}

impl Sliced {
    /// `T` of `[r, D]` and `S` of `[D, r]`; the newest `window` tokens and the first `sinks` stay whole.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::error::Error::Shape) when they are no such pair.
    pub fn new(down: Array2<f32>, up: Array2<f32>, window: usize, sinks: usize) -> Result<Self> {
        let dim = down.ncols();
        Ok(Self { map: Arc::new(Map::Matrix(Matrix::new(down, up)?)), dim, window, sinks })
    }

    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let (down, up) = (matrix(options, "down")?, matrix(options, "up")?);
        Self::new(down, up, options.whole("window")?, options.whole("sinks")?)
    }

    fn check_dim(&self, dim: usize) -> Result<()> {
        if dim == self.dim {
            return Ok(());
        }
        refuse("slice", format!("a basis of {} numbers", self.dim), format!("one of {dim}, the head dim"))
    }
}

fn matrix(options: &mut Options, name: &'static str) -> Result<Array2<f32>> {
    let rows = options.table(name)?.unwrap_or_default();
    let shape = (rows.len(), rows.first().map_or(0, Vec::len));
    Array2::from_shape_vec(shape, rows.concat())
        .or_else(|_| refuse(name, "rows of several lengths", "rows of one length"))
}

/// How many of `n` tokens are sealed, in whole pages, when `window` stay.
pub(super) fn whole_pages(n: usize, window: usize) -> usize {
    n.saturating_sub(window) / PAGE * PAGE
}

impl Method for Sliced {
    fn sinks(&self) -> usize {
        self.sinks
    }

    fn window(&self) -> usize {
        self.window
    }

    fn limit(&self) -> Limit {
        Limit::of_numbers(f32::MAX)
    }

    fn table_bytes(&self) -> usize {
        self.map.bytes()
    }
}

impl Codec<KeyPage> for Sliced {
    fn check(&self, _: Option<usize>, dim: usize) -> Result<()> {
        self.check_dim(dim)
    }

    fn due(&self, n: usize) -> usize {
        whole_pages(n, self.window)
    }

    fn seal(&self, _: &mut Plan, rows: &Rows, n: usize) -> Result<(KeyPage, usize)> {
        let n = n.min(PAGE);
        Ok((KeyPage::Sliced(SlicedRows::seal(Arc::clone(&self.map), rows, n)), n))
    }
}

impl Codec<ValuePage> for Sliced {
    fn check(&self, _: Option<usize>, dim: usize) -> Result<()> {
        self.check_dim(dim)
    }

    fn due(&self, n: usize) -> usize {
        whole_pages(n, self.window)
    }

    fn seal(&self, _: &mut Plan, rows: &Rows, n: usize) -> Result<(ValuePage, usize)> {
        let n = n.min(PAGE);
        Ok((ValuePage::Sliced(SlicedRows::seal(Arc::clone(&self.map), rows, n)), n))
    }
}
