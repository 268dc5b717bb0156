//! `PyO3` only: extract, validate, release the GIL, call, map the error. No logic.
//!
//! Private to the Python package: tensors cross as pointers, and only `kvpack._tensors` may make those.

// Arguments arrive by value from Python.
#![allow(clippy::needless_pass_by_value)]

mod errors;
mod inspect;
mod layer;
mod tensors;

use pyo3::prelude::*;

use crate::attend::kernels;
use crate::pool;

/// The compiled half of kvpack.
#[pymodule(gil_used = false)]
mod _kvpack {
    #[pymodule_export]
    use super::layer::Layer;
    #[pymodule_export]
    use super::{isa, isa_available, set_threads, threads};

    #[allow(non_upper_case_globals)]
    #[pymodule_export]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}

/// The instruction set in use; `OptionError` when `KVPACK_ISA` names one that this machine has not.
#[pyfunction]
fn isa(py: Python<'_>) -> PyResult<&'static str> {
    kernels::chosen().map(|k| k.name).map_err(|e| errors::to_python(py, &e))
}

/// The instruction sets that this machine can run, best first.
#[pyfunction]
fn isa_available() -> Vec<&'static str> {
    kernels::available().iter().map(|k| k.name).collect()
}

/// How many threads the next calls use.
#[pyfunction]
fn set_threads(n: usize) {
    pool::set_threads(n);
}

/// How many threads the next calls use.
#[pyfunction]
fn threads() -> usize {
    pool::threads()
}
