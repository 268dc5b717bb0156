//! A forward, layer by layer.

use std::sync::Arc;

use pyo3::prelude::*;

use super::cache::Cache;
use super::tensors::Tensor;
use crate::attend::Softmax;
use crate::cache::{LayerQueries, Request};
use crate::kernels;
use crate::pool;
use crate::tensor::Kept;

#[pymethods]
impl Cache {
    /// Takes a forward's keys and values, which `owner` keeps alive; with up to `threads` threads; `of_module`: should
    /// a forward begin here, whether it is one of a whole model. Returns the layer's version, whether it was empty, and how many
    /// tokens attention reads.
    #[pyo3(signature = (layer, k, v, *, owner, of_module, threads))]
    #[allow(clippy::too_many_arguments)]
    fn update(
        &self,
        py: Python<'_>,
        layer: usize,
        k: Tensor,
        v: Tensor,
        owner: Py<PyAny>,
        of_module: bool,
        threads: usize,
    ) -> PyResult<(u64, bool, usize)> {
        pool::set_threads(threads);
        let owner = Arc::new(owner);
        self.change(py, |cache| {
            // SAFETY: `kvpack._tensors` makes these tuples from tensors that `owner` holds.
            let (k, v) = unsafe { (Kept::new(k.view("keys")?, owner.clone()), Kept::new(v.view("values")?, owner)) };
            let given = cache.update(layer, k, v, of_module)?;
            Ok((given.version, given.first, given.tokens))
        })
    }

    /// Stores what a layer was just given before anything has read it, in no more memory than that takes: nothing follows it.
    fn store(&self, py: Python<'_>, layer: usize, threads: usize) -> PyResult<()> {
        pool::set_threads(threads);
        self.change(py, |cache| cache.store(layer))
    }

    /// Says that a layer that is held elsewhere is about to be given tokens (kind 0), or states of another kind; `of_module`
    /// as in `update`. Returns whether what brings it back is still to be kept.
    fn enter(&self, py: Python<'_>, layer: usize, kind: u8, of_module: bool) -> PyResult<bool> {
        self.change(py, |cache| cache.enter(layer, kind, of_module))
    }

    /// Keeps what brings a layer back that is held elsewhere, if the forward is rolled back: it is called then.
    fn keep(&self, py: Python<'_>, layer: usize, before: Py<PyAny>) -> PyResult<()> {
        self.change(py, |cache| {
            cache.keep(layer, Arc::new(before));
            Ok(())
        })
    }

    /// What was kept of a layer by the forward that is under way, if anything.
    fn kept(&self, py: Python<'_>, layer: usize) -> PyResult<Option<Py<PyAny>>> {
        let kept = self.look(py, |cache| Ok(cache.kept(layer)))?;
        Ok(kept.and_then(|kept| kept.downcast_ref::<Py<PyAny>>().map(|kept| kept.clone_ref(py))))
    }

    /// Whether a forward has begun and not ended.
    fn is_under_way(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, |cache| Ok(cache.is_under_way()))
    }

    /// Says that attention has read a layer that is held elsewhere; returns whether the forward is over.
    fn attended(&self, py: Python<'_>, layer: usize) -> PyResult<bool> {
        self.change(py, |cache| Ok(cache.attended(layer)))
    }

    /// Stores a layer's first tokens, after attention; `valid` are booleans `[B, 1, 1, n]`. Returns whether the forward is over.
    #[pyo3(signature = (layer, version, query, *, valid, scaling, softcap, sink_logits, threads))]
    #[allow(clippy::too_many_arguments)]
    fn commit(
        &self,
        py: Python<'_>,
        layer: usize,
        version: u64,
        query: Tensor,
        valid: Option<Tensor>,
        scaling: f32,
        softcap: Option<f32>,
        sink_logits: Option<Vec<f32>>,
        threads: usize,
    ) -> PyResult<bool> {
        pool::set_threads(threads);
        // SAFETY: the caller holds the tensors during the call.
        self.change(py, |cache| unsafe {
            let query = query.view("query")?;
            let valid = valid.as_ref().map(|valid| valid.flags("valid")).transpose()?;
            let queries = LayerQueries {
                query: &query,
                softmax: Softmax { scaling, softcap },
                sink_logits: sink_logits.as_deref(),
            };
            cache.commit(layer, version, valid.as_deref(), queries, kernels::chosen()?)
        })
    }

    /// Stores what a layer was given last, then attention of the newest positions' queries, written to `out` `[B, Q, Hq, Dv]`.
    /// Returns whether the forward is over.
    #[pyo3(signature = (layer, version, query, out, *, mask, valid, scaling, softcap, sink_logits, threads))]
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        py: Python<'_>,
        layer: usize,
        version: u64,
        query: Tensor,
        out: Tensor,
        mask: Option<Tensor>,
        valid: Option<Tensor>,
        scaling: f32,
        softcap: Option<f32>,
        sink_logits: Option<Vec<f32>>,
        threads: usize,
    ) -> PyResult<bool> {
        pool::set_threads(threads);
        // SAFETY: as in `commit`; `out` was made for this call.
        self.change(py, |cache| unsafe {
            let query = query.view("query")?;
            let (softmax, sink_logits) = (Softmax { scaling, softcap }, sink_logits.as_deref());
            let valid = valid.as_ref().map(|valid| valid.flags("valid")).transpose()?;
            let mask = mask.map(|m| m.mask()).transpose()?;
            let request = Request { query, mask, softmax, sink_logits, scores: false };
            cache.attend(layer, version, valid.as_deref(), &request, &mut out.view_mut("out")?, kernels::chosen()?)
        })
    }

    /// Undoes this thread's forward, if there is one that is not finished.
    fn roll_back(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, |cache| {
            cache.roll_back();
            Ok(())
        })
    }

    /// Undoes another thread's forward, which the caller knows to be over without having come to its end.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, |cache| {
            cache.abandon();
            Ok(())
        })
    }

    /// After attention: a forward that is over cannot be undone any more.
    fn finish(&self, py: Python<'_>) {
        match self.try_lock() {
            Some(mut cache) => cache.finish(),
            None => py.detach(|| {
                if let Ok(mut cache) = self.lock() {
                    cache.finish();
                }
            }),
        }
    }
}
