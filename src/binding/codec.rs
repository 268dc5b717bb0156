//! Codecs that are Python functions: what they would lose can be tried before they have kernels.

use std::fmt;

use ndarray::Array2;
use numpy::PyArray2;
use pyo3::prelude::*;

use super::function::call;
use crate::error::{Error, Result};
use crate::quantize::{Codec, KeyPage, Method, Plan, ValuePage};
use crate::tensor::{Limit, Rows};

/// A codec whose function gets tokens of one KV head and gives them back as they would be read.
pub(super) struct PythonCodec {
    pub(super) function: Py<PyAny>,
    /// Tokens that it gets at once.
    pub(super) group: usize,
    /// The newest tokens, which stay exact.
    pub(super) window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub(super) sinks: usize,
}

impl fmt::Debug for PythonCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a Python function of {} tokens", self.group)
    }
}

impl Method for PythonCodec {
    fn sinks(&self) -> usize {
        self.sinks
    }

    fn window(&self) -> usize {
        self.window
    }

    fn limit(&self) -> Limit {
        Limit::of_numbers(f32::MAX)
    }

    fn work(&self) -> usize {
        0
    }
}

impl PythonCodec {
    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.window) / self.group * self.group
    }

    /// What the function makes of the oldest `group` of `rows`.
    fn rounded(&self, rows: &Rows) -> Result<(Rows, usize)> {
        let (n, dim) = (self.group, rows.dim());
        let given = Array2::from_shape_vec((n, dim), rows.to_f32(0..n)).map_err(|e| Error::Internal(e.to_string()))?;
        let read =
            call(&self.function, |py| (PyArray2::from_owned_array(py, given).unbind(),), "rounded tokens", (n, dim))?;
        let mut out = Rows::new(rows.dtype(), dim);
        read.rows().into_iter().for_each(|row| out.push(&row.to_vec()));
        Ok((out, n))
    }
}

impl Codec<KeyPage> for PythonCodec {
    fn due(&self, n: usize) -> usize {
        self.due(n)
    }

    fn seal(&self, _: &mut Plan, rows: &Rows, _: usize) -> Result<(KeyPage, usize)> {
        self.rounded(rows).map(|(rows, n)| (KeyPage::Rounded(rows), n))
    }
}

impl Codec<ValuePage> for PythonCodec {
    fn due(&self, n: usize) -> usize {
        self.due(n)
    }

    fn seal(&self, _: &mut Plan, rows: &Rows, _: usize) -> Result<(ValuePage, usize)> {
        self.rounded(rows).map(|(rows, n)| (ValuePage::Rounded(rows), n))
    }
}
