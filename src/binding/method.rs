//! The Python class around [`quantize::Method`].

use pyo3::prelude::*;

use super::errors::to_python;
use crate::error::Result;
use crate::quantize::{self, Block, Graded, Kivi, Rotated};

/// A checked way of storing keys, or values.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Method(pub(super) quantize::Method);

fn checked<T>(py: Python<'_>, parameters: Result<T>, method: impl Fn(T) -> quantize::Method) -> PyResult<Method> {
    parameters.map(|parameters| Method(method(parameters))).map_err(|e| to_python(py, &e))
}

#[pymethods]
impl Method {
    /// The model's dtype.
    #[staticmethod]
    fn exact() -> Self {
        Self(quantize::Method::Exact)
    }

    /// KIVI.
    #[staticmethod]
    fn kivi(py: Python<'_>, bits: u8, group: usize, window: usize, sinks: usize) -> PyResult<Self> {
        checked(py, Kivi::new(bits, group, window, sinks), quantize::Method::Kivi)
    }

    /// Blocks of 32 channels.
    #[staticmethod]
    fn block(py: Python<'_>, bits: u8, window: usize, sinks: usize) -> PyResult<Self> {
        checked(py, Block::new(bits, window, sinks), quantize::Method::Block)
    }

    /// Rotated tokens.
    #[staticmethod]
    fn rotated(py: Python<'_>, bits: u8, group: usize, window: usize, sinks: usize, seed: u64) -> PyResult<Self> {
        checked(py, Rotated::new(bits, group, window, sinks, seed), quantize::Method::Rotated)
    }

    /// Graded channels, for keys.
    #[staticmethod]
    fn graded(py: Python<'_>, bits: f32, group: usize, window: usize, sinks: usize) -> PyResult<Self> {
        checked(py, Graded::new(bits, group, window, sinks), quantize::Method::Graded)
    }
}
