//! Changes of batch and length: all layers or none.

use pyo3::prelude::*;

use super::cache::Cache;
use super::tensors::Tensor;
use crate::cache;
use crate::pool;

#[pymethods]
impl Cache {
    /// Ends the forward; raises `ConcurrencyError` in the middle of another thread's.
    fn settle_forward(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, cache::Cache::settle_forward)
    }

    /// Raises what `crop` would raise.
    fn check_crop(&self, py: Python<'_>, n: usize, lossy: bool) -> PyResult<()> {
        self.look(py, |cache| cache.check_crop(n, lossy))
    }

    /// Removes the `n` newest positions of all layers.
    fn crop(&self, py: Python<'_>, n: usize, lossy: bool) -> PyResult<()> {
        self.change(py, |cache| cache.crop(n, lossy))
    }

    /// Makes the batch of all layers out of the rows at `indices`.
    fn select(&self, py: Python<'_>, indices: Vec<usize>) -> PyResult<()> {
        self.change(py, |cache| cache.select(&indices))
    }

    /// Forgets everything.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, cache::Cache::reset)
    }

    /// From now on packing waits for `crop`.
    fn record(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, |cache| {
            cache.record();
            Ok(())
        })
    }

    /// Whether it waits.
    fn records(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, |cache| Ok(cache.records()))
    }

    /// Stores tokens of another cache in an empty layer; before them were `missing` positions, which its window has passed.
    #[allow(clippy::too_many_arguments)]
    fn load(
        &self,
        py: Python<'_>,
        layer: usize,
        k: Tensor,
        v: Tensor,
        valid: Option<Tensor>,
        missing: usize,
        threads: usize,
    ) -> PyResult<()> {
        pool::set_threads(threads);
        // SAFETY: as in `commit`.
        self.change(py, |cache| unsafe {
            let valid = valid.as_ref().map(|valid| valid.flags("valid")).transpose()?;
            cache.load(layer, &k.view("keys")?, &v.view("values")?, valid.as_deref(), missing)
        })
    }

    /// Whether what the newest query attends to in a layer is remembered from now on.
    fn watch(&self, py: Python<'_>, layer: usize, watched: bool) -> PyResult<()> {
        self.change(py, |cache| cache.watch(layer, watched))
    }

    /// Takes the layer of a cache of one in as the last one, or one that is held elsewhere.
    #[pyo3(signature = (other))]
    fn adopt(&self, py: Python<'_>, other: Option<&Self>) -> PyResult<()> {
        let other = other.map(|other| other.look(py, |other| Ok(other.fork()))).transpose()?;
        self.change(py, |cache| {
            cache.adopt(other.as_ref());
            Ok(())
        })
    }
}
