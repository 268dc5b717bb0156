//! Looking: nothing here changes anything that is held.

use std::collections::HashSet;

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use super::cache::Cache;
use super::errors::to_python;
use super::inspect;
use super::tensors::Tensor;
use crate::cache::{KvHead, Which};
use crate::error::{Result, caught, refuse};
use crate::kernels;
use crate::memory;

/// A gain, and whether it was enough.
type Gain = Option<(f32, bool)>;

/// Batch, KV heads, key dim, value dim, dtype.
type Sizes = ([usize; 4], &'static str);

/// Bytes: codes, scales, exact, index.
type Bytes = (usize, usize, usize, usize);

fn which(name: &str) -> Result<Which> {
    match name {
        "keys" => Ok(Which::Keys),
        "values" => Ok(Which::Values),
        _ => refuse("side", name, "keys, values"),
    }
}

impl Cache {
    /// What a KV head of a sequence tells, with its dims of keys and values; of a layer that has stored nothing yet, nothing.
    fn of_head<R: Default + Send>(
        &self,
        py: Python<'_>,
        [layer, row, head]: [usize; 3],
        tell: impl FnOnce(&KvHead, [usize; 2]) -> R + Send,
    ) -> PyResult<R> {
        self.look(py, |cache| {
            let layer = cache.layer(layer)?;
            let Some(shape) = layer.shape() else { return Ok(R::default()) };
            layer.head(row, head).map(|head| tell(head, [shape.key_dim, shape.value_dim]))
        })
    }
}

#[pymethods]
impl Cache {
    /// A copy that shares all pages.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        self.look(py, |cache| Ok(Self::holding(cache.fork())))
    }

    /// A cache of one layer alone, which shares its pages.
    fn fork_layer(&self, py: Python<'_>, layer: usize) -> PyResult<Self> {
        self.look(py, |cache| cache.fork_layer(layer).map(Self::holding))
    }

    /// Layers, those that are held elsewhere too.
    fn __len__(&self, py: Python<'_>) -> PyResult<usize> {
        self.look(py, |cache| Ok(cache.len()))
    }

    /// Positions that a layer has seen, pads included.
    fn seen(&self, py: Python<'_>, layer: usize) -> PyResult<usize> {
        self.look(py, |cache| cache.seen(layer))
    }

    /// Of those, how many the model's own attention will miss at the next forward.
    fn gone(&self, py: Python<'_>, layer: usize) -> PyResult<usize> {
        self.look(py, |cache| cache.gone(layer))
    }

    /// Names the state of all layers.
    fn changes(&self, py: Python<'_>) -> PyResult<u64> {
        self.look(py, |cache| Ok(cache.changes()))
    }

    /// Whether tokens of a layer are let go by what attends to them.
    fn chooses_by_queries(&self, py: Python<'_>, layer: usize) -> PyResult<bool> {
        self.look(py, |cache| {
            let layer = cache.layer(layer)?;
            Ok(layer.needs_queries())
        })
    }

    /// Names the state of a layer.
    fn version(&self, py: Python<'_>, layer: usize) -> PyResult<u64> {
        self.look(py, |cache| cache.version(layer))
    }

    /// `((batch, KV heads, key dim, value dim), dtype)`, or `None` before the first tokens.
    fn shape(&self, py: Python<'_>, layer: usize) -> PyResult<Option<Sizes>> {
        self.look(py, |cache| Ok(cache.shape(layer)?.map(|(sizes, dtype)| (sizes, dtype.name()))))
    }

    /// Bytes allocated, layer by layer: `(codes, scales, exact, index)`; `None` for those that are held elsewhere.
    fn memory(&self, py: Python<'_>) -> PyResult<Vec<Option<Bytes>>> {
        self.look(py, |cache| {
            let mut tables = HashSet::new();
            let bytes = |layer| {
                let m = cache.memory(layer, &mut tables).ok()?;
                Some((m.codes, m.scales, m.exact, m.index))
            };
            Ok((0..cache.len()).map(bytes).collect())
        })
    }

    /// What keeps the memory of a layer's tokens that wait to be stored: what `update` was given.
    fn owners(&self, py: Python<'_>, layer: usize) -> PyResult<Vec<Py<PyAny>>> {
        let owners = self.look(py, |cache| cache.owners(layer))?;
        Ok(owners
            .iter()
            .filter_map(|owner| owner.downcast_ref::<Py<PyAny>>())
            .map(|owner| owner.clone_ref(py))
            .collect())
    }

    /// Share of the numbers of a layer, the newest positions' aside, that are not what the model made.
    fn lossy_share(&self, py: Python<'_>, layer: usize, new: usize) -> PyResult<f64> {
        self.look(py, |cache| cache.lossy_share(layer, new))
    }

    /// Positions that a KV head of a sequence holds.
    fn positions(&self, py: Python<'_>, layer: usize, row: usize, head: usize) -> PyResult<inspect::Positions> {
        self.look(py, |cache| cache.positions(layer, row, head).map(inspect::Positions::from))
    }

    /// Attention calls of a layer: prefill, fused, materialised.
    fn counts(&self, py: Python<'_>, layer: usize) -> PyResult<(usize, usize, usize)> {
        self.look(py, |cache| {
            let counts = cache.counts(layer)?;
            Ok((counts.prefill, counts.fused, counts.materialised))
        })
    }

    /// Sizes and dtype of what `write` writes. Raises `StaleHandleError` unless the layer has that version.
    fn extent(
        &self,
        py: Python<'_>,
        layer: usize,
        version: u64,
        side: &str,
        compact: bool,
    ) -> PyResult<([usize; 4], &'static str)> {
        self.look(py, |cache| {
            cache.check_version(layer, version)?;
            let (sizes, dtype) = cache.extent(layer, which(side)?, compact)?;
            Ok((sizes, dtype.name()))
        })
    }

    /// Writes all `keys` or `values` of a layer to `out`, dequantised, which is 0 before: with `compact` the tokens that are held
    /// in their order, else each at its position. Raises `StaleHandleError` unless the layer has that version.
    fn write(
        &self,
        py: Python<'_>,
        layer: usize,
        version: u64,
        side: &str,
        compact: bool,
        out: Tensor,
    ) -> PyResult<()> {
        let written = py.detach(|| {
            let cache = self.lock()?;
            caught(|| {
                cache.check_version(layer, version)?;
                // SAFETY: as in `attend`.
                cache.write(layer, which(side)?, compact, unsafe { out.view_mut("out")? }, kernels::chosen()?)
            })
        });
        written.map_err(|e| to_python(py, &e))
    }

    /// Counts that a layer was dequantised for other attention than ours.
    fn materialised(&self, py: Python<'_>, layer: usize) -> PyResult<()> {
        self.change(py, |cache| {
            cache.materialised(layer);
            Ok(())
        })
    }

    /// What the newest query attended to in a layer, `[B x seen]`, the mean over its heads; `None` where that was not watched.
    fn attention(&self, py: Python<'_>, layer: usize) -> PyResult<Option<Py<PyArray1<f32>>>> {
        let attention = self.look(py, |cache| Ok(cache.attention(layer)?.map(memory::copied)))?;
        Ok(attention.map(|attention| attention.into_pyarray(py).unbind()))
    }

    /// What compensation could gain at most, and whether it is used, for keys and for values of a KV head; `None` where there is none.
    fn compensation_gains(&self, py: Python<'_>, layer: usize, row: usize, head: usize) -> PyResult<(Gain, Gain)> {
        self.of_head(py, [layer, row, head], |head, _| head.gains().into())
    }

    /// Bits of every key channel in each of a KV head's graded pages.
    fn key_bits(&self, py: Python<'_>, layer: usize, row: usize, head: usize) -> PyResult<inspect::Bits> {
        self.of_head(py, [layer, row, head], |head, [dim, _]| inspect::key_bits(head, dim))
    }

    /// What a KV head of a sequence keeps beside its codes, of keys and of values: packed token, channel, and what the code
    /// lacks.
    fn outliers(
        &self,
        py: Python<'_>,
        layer: usize,
        row: usize,
        head: usize,
    ) -> PyResult<(inspect::Outliers, inspect::Outliers)> {
        self.of_head(py, [layer, row, head], |head, _| inspect::outliers(head))
    }

    /// What a KV head of a sequence stores packed.
    fn packed(
        &self,
        py: Python<'_>,
        layer: usize,
        row: usize,
        head: usize,
    ) -> PyResult<(inspect::Packed, inspect::Packed)> {
        self.of_head(py, [layer, row, head], |head, [k, v]| (inspect::keys(head, k), inspect::values(head, v)))
    }
}
