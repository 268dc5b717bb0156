//! `PyO3` only: extract, validate, release the GIL, call, map the error. No logic.
//!
//! Private to the Python package: tensors cross as pointers, and only `kvpack._tensors` may make those.

// Arguments arrive by value from Python.
#![allow(clippy::needless_pass_by_value)]

mod cache;
mod codec;
mod errors;
mod function;
mod inspect;
mod look;
mod methods;
mod options;
mod rows;
mod scorer;
mod step;
mod tensors;

use pyo3::prelude::*;

use crate::kernels;
use crate::pool;

// The tests count what is allocated with one of their own.
#[cfg(all(target_os = "linux", not(test)))]
#[global_allocator]
static ALLOCATOR: crate::slabs::Slabs = crate::slabs::Slabs;

/// The compiled half of kvpack.
#[pymodule(gil_used = false)]
mod _kvpack {
    #[pymodule_export]
    use super::cache::Cache;
    #[pymodule_export]
    use super::methods::{Codec, Compactor, Eviction, Layer, Prune, Rung, Selector, Share};
    #[pymodule_export]
    use super::{isa, isa_available, openmp_library, refuse_memory, set_threads, use_openmp};

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

/// Sets how many threads the next calls use, and returns it: `n`, or what `KVPACK_NUM_THREADS` says if that is less;
/// `OptionError` when that is no positive whole number.
#[pyfunction]
fn set_threads(py: Python<'_>, n: usize) -> PyResult<usize> {
    pool::most_threads().map_err(|e| errors::to_python(py, &e))?;
    pool::set_threads(n);
    Ok(pool::threads())
}

/// Makes the OpenMP threads that torch uses ours too, if they can be found; says whether.
#[pyfunction]
fn use_openmp() -> bool {
    pool::use_openmp()
}

/// For tests of what a fault leaves behind: has the `n`-th request for memory from now on be refused, as if there were none; 0: none.
/// Returns how many requests were to be served before.
#[pyfunction]
fn refuse_memory(n: usize) -> usize {
    crate::memory::refuse(n)
}

/// File name of the OpenMP library whose threads are used; `None` when they are our own.
#[pyfunction]
fn openmp_library() -> Option<&'static str> {
    pool::openmp_library()
}
