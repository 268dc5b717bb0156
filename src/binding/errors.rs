//! Every error variant has a Python exception of its own, defined in `kvpack.errors`.

use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::error::Error;

/// The Python exception for `error`.
pub(super) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    let class = match error {
        Error::Raised(raised) => match raised.0.downcast_ref::<PyErr>() {
            Some(error) => return error.clone_ref(py),
            None => "InternalError",
        },
        Error::Option { .. } => "OptionError",
        Error::Shape { .. } => "ShapeError",
        Error::Dtype { .. } => "DtypeError",
        Error::NonFinite { .. } | Error::TooLarge { .. } => "NonFiniteError",
        Error::Crop { .. } => "CropError",
        Error::Busy | Error::Reentered => "ConcurrencyError",
        Error::Stale { .. } => "StaleHandleError",
        Error::Memory { .. } => "OutOfMemoryError",
        Error::Internal(_) => "InternalError",
    };
    let class = py.import("kvpack.errors").and_then(|m| m.getattr(class)).and_then(|c| Ok(c.cast_into::<PyType>()?));
    match class {
        Ok(class) => PyErr::from_type(class, error.to_string()),
        Err(missing) => missing,
    }
}
