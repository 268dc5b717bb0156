//! The Python classes around [`cache::Cache`].

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use super::errors::to_python;
use super::eviction::{Eviction, Given};
use super::inspect;
use super::method::Method;
use super::tensors::Tensor;
use crate::attend::kernels::{self, Kernels};
use crate::attend::{Quest, Softmax};
use crate::cache::{self, KvHead, Readers, Request, Side};
use crate::error::{Error, Result, caught};
use crate::memory;
use crate::pool;
use crate::quantize::Codec;
use crate::tensor::Kept;

/// How one attention layer stores its tokens; holds none.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Layer(cache::Layer);

#[pymethods]
impl Layer {
    /// Keys and values are packed so, an eviction chooses tokens that stay, a step of decoding reads `quest`: pages of so many
    /// tokens, so many or such a share of all in all; with `selects` and without `quest` all of a layer among such; with `center` keys
    /// are held less the mean of the first ones.
    #[new]
    #[pyo3(signature = (keys, values, eviction=None, quest=None, selects=false, center=false))]
    fn new(
        py: Python<'_>,
        keys: &Method,
        values: &Method,
        eviction: Option<&Eviction>,
        quest: Option<(Given, usize)>,
        selects: bool,
        center: bool,
    ) -> PyResult<Self> {
        let codec = Codec::new(keys.0.clone(), values.0.clone()).and_then(|codec| kernels().map(|_| codec));
        let layer = cache::Layer::new(codec.map_err(|e| to_python(py, &e))?);
        let quest = quest.map(|(budget, page)| Quest { budget: budget.into(), page });
        let layer = layer.with_eviction(eviction.map(|eviction| Arc::clone(&eviction.0)));
        let layer = layer.with_quest(quest).with_centers(center);
        Ok(Self(if selects { layer.among_selected() } else { layer }))
    }

    /// Raises `OptionError` when the methods do not fit keys and values of such head dims.
    fn check_dims(&self, py: Python<'_>, key_dim: usize, value_dim: usize) -> PyResult<()> {
        self.0.codec().check_dims(None, key_dim, value_dim).map_err(|e| to_python(py, &e))
    }
}

/// Keys and values of a model's layers. Tensors are `(pointer, dtype, shape, strides)`.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Cache(Mutex<cache::Cache>);

/// Queries' scaling and cap of the logits, and learned logits, one a query head, that take weight.
type Logits = (f32, Option<f32>, Option<Vec<f32>>);

/// A gain, and whether it was enough.
type Gain = Option<(f32, bool)>;

/// Batch, KV heads, key dim, value dim, dtype.
type Sizes = ([usize; 4], &'static str);

/// Bytes: codes, scales, exact, index.
type Bytes = (usize, usize, usize, usize);

fn kernels() -> Result<&'static Kernels> {
    kernels::chosen()
}

fn side(name: &str) -> Result<Side> {
    match name {
        "keys" => Ok(Side::Keys),
        "values" => Ok(Side::Values),
        _ => Err(Error::Option { name: "side", given: name.into(), accepted: "keys, values".into() }),
    }
}

impl Cache {
    fn lock(&self) -> MutexGuard<'_, cache::Cache> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes it, without the GIL: waits while another thread is at work. Afterwards Python brings back what it holds itself of forwards that were rolled back.
    fn change<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut cache::Cache) -> Result<R> + Send) -> PyResult<R> {
        let (result, undone, taken_back) = py.detach(|| {
            let mut cache = self.lock();
            (caught(|| f(&mut cache)), cache.take_undone(), cache.take_taken_back())
        });
        for undo in undone {
            if let Some(undo) = undo.downcast_ref::<Py<PyAny>>() {
                undo.call0(py)?;
            }
        }
        if let Some(layers) = taken_back {
            py.import("kvpack._forwards")?.call_method1("taken_back", layers)?;
        }
        result.map_err(|e| to_python(py, &e))
    }

    /// Looks at it; while somebody changes it, waits without the GIL.
    fn look<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&cache::Cache) -> Result<R> + Send) -> PyResult<R> {
        let result = match self.0.try_lock() {
            Ok(cache) => caught(|| f(&cache)),
            Err(_) => py.detach(|| caught(|| f(&self.lock()))),
        };
        result.map_err(|e| to_python(py, &e))
    }

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

    fn holding(cache: cache::Cache) -> Self {
        Self(Mutex::new(cache))
    }
}

#[pymethods]
impl Cache {
    /// Empty layers; `None` are held elsewhere. `shared` are those that other layers read too, `last` is the last one that forwards
    /// come to, `last_is_read` whether attention reads that one.
    #[new]
    fn new(layers: Vec<Option<Py<Layer>>>, shared: Vec<bool>, last: usize, last_is_read: bool) -> Self {
        let layer = |(layer, shared): (Option<Py<Layer>>, bool)| layer.map(|layer| (layer.get().0.clone(), shared));
        Self::holding(cache::Cache::new(layers.into_iter().zip(shared).map(layer).collect(), last, last_is_read))
    }

    // ---- a forward

    /// Takes a forward's keys and values, which `owner` keeps alive; with up to `threads` threads; `of_module`: should
    /// a forward begin here, whether it is one of a whole model. Returns the layer's version, whether it was empty, and how many
    /// tokens attention reads.
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
    #[pyo3(signature = (layer, version, query, valid, logits, threads))]
    #[allow(clippy::too_many_arguments)]
    fn commit(
        &self,
        py: Python<'_>,
        layer: usize,
        version: u64,
        query: Tensor,
        valid: Option<Tensor>,
        logits: Logits,
        threads: usize,
    ) -> PyResult<bool> {
        pool::set_threads(threads);
        // SAFETY: the caller holds the tensors during the call.
        self.change(py, |cache| unsafe {
            let (query, (scaling, softcap, sinks)) = (query.view("query")?, logits);
            let valid = valid.as_ref().map(|valid| valid.flags("valid")).transpose()?;
            let readers = Readers { query: &query, softmax: Softmax { scaling, softcap }, sinks: sinks.as_deref() };
            cache.commit(layer, version, valid.as_deref(), readers, kernels()?)
        })
    }

    /// Stores what a layer was given last, then attention of the newest positions' queries, written to `out` `[B, Q, Hq, Dv]`.
    /// Returns whether the forward is over.
    #[pyo3(signature = (layer, version, query, out, mask, valid, logits, threads))]
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
        logits: Logits,
        threads: usize,
    ) -> PyResult<bool> {
        pool::set_threads(threads);
        // SAFETY: as in `commit`; `out` was made for this call.
        self.change(py, |cache| unsafe {
            let (query, (scaling, softcap, sinks)) = (query.view("query")?, logits);
            let (softmax, sinks) = (Softmax { scaling, softcap }, sinks.as_deref());
            let valid = valid.as_ref().map(|valid| valid.flags("valid")).transpose()?;
            let mask = mask.map(|m| m.mask()).transpose()?;
            let request = Request { query, mask, softmax, sinks, received: false };
            cache.attend(layer, version, valid.as_deref(), &request, &mut out.view_mut("out")?, kernels()?)
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
        match self.0.try_lock() {
            Ok(mut cache) => cache.finish(),
            Err(_) => py.detach(|| self.lock().finish()),
        }
    }

    // ---- changes of batch and length

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

    /// Stores tokens of another cache in an empty layer.
    fn load(
        &self,
        py: Python<'_>,
        layer: usize,
        k: Tensor,
        v: Tensor,
        valid: Option<Tensor>,
        threads: usize,
    ) -> PyResult<()> {
        pool::set_threads(threads);
        // SAFETY: as in `commit`.
        self.change(py, |cache| unsafe {
            let valid = valid.as_ref().map(|valid| valid.flags("valid")).transpose()?;
            cache.load(layer, &k.view("keys")?, &v.view("values")?, valid.as_deref())
        })
    }

    /// Whether what the newest query attends to in a layer is remembered from now on.
    fn watch(&self, py: Python<'_>, layer: usize, watched: bool) -> PyResult<()> {
        self.change(py, |cache| cache.watch(layer, watched))
    }

    /// Takes the layer of a cache of one in as the last one, or one that is held elsewhere.
    #[pyo3(signature = (other))]
    fn adopt(&self, py: Python<'_>, other: Option<&Self>) -> PyResult<()> {
        let other = other.map(|other| py.detach(|| other.lock().fork()));
        self.change(py, |cache| {
            cache.adopt(other.as_ref());
            Ok(())
        })
    }

    // ---- looking

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
            Ok(layer.eviction().is_some() && layer.wants_queries())
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
            let (sizes, dtype) = cache.extent(layer, self::side(side)?, compact)?;
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
            let cache = self.lock();
            caught(|| {
                cache.check_version(layer, version)?;
                // SAFETY: as in `attend`.
                cache.write(layer, self::side(side)?, compact, unsafe { out.view_mut("out")? }, kernels()?)
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

    /// What feedback could gain at most, and whether it is used, for keys and for values of a KV head; `None` where there is none.
    fn feedback_gains(&self, py: Python<'_>, layer: usize, row: usize, head: usize) -> PyResult<(Gain, Gain)> {
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
