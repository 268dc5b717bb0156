//! Functions of the caller's that a method calls. They are called on the caller's thread: another one would wait for what that
//! holds.

use std::sync::Arc;

use ndarray::Array2;
use numpy::PyReadonlyArray2;
use pyo3::call::PyCallArgs;
use pyo3::prelude::*;

use crate::error::{Error, Raised, Result};

/// What `function` returns for `args`: float32 `[rows, columns]`.
///
/// # Errors
/// [`Error::Raised`] with what it raises; [`Error::Shape`] for `what` it returns in another shape.
pub(super) fn call<A>(
    function: &Py<PyAny>,
    args: impl for<'py> FnOnce(Python<'py>) -> A,
    what: &'static str,
    shape: (usize, usize),
) -> Result<Array2<f32>>
where
    A: for<'py> PyCallArgs<'py>,
{
    let found = Python::attach(|py| -> PyResult<Array2<f32>> {
        let found = function.call1(py, args(py))?;
        Ok(found.extract::<PyReadonlyArray2<'_, f32>>(py)?.as_array().to_owned())
    });
    let found = found.map_err(|error| Error::Raised(Raised(Arc::new(error))))?;
    if found.dim() == shape {
        return Ok(found);
    }
    Err(Error::Shape { what, given: format!("{:?}", found.dim()), expected: format!("{shape:?}") })
}
