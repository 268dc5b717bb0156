//! The Python class around [`cache::Layer`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, RwLock};

use pyo3::prelude::*;

use super::errors::to_python;
use super::eviction::{Eviction, Given};
use super::inspect;
use super::method::Method;
use super::tensors::Tensor;
use crate::attend::kernels::{self, Kernels};
use crate::attend::{Quest, Softmax};
use crate::cache::{self, Readers, Request};
use crate::error::{Error, Result};
use crate::memory::OutOfMemory;
use crate::pool;
use crate::quantize::Codec;

/// Keys and values of one attention layer. Tensors are `(pointer, dtype, shape, strides)`.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Layer {
    layer: RwLock<cache::Layer>,
    /// Held by the thread that changes the layer or attends.
    turn: Mutex<()>,
}

impl Layer {
    fn holding(layer: cache::Layer) -> Self {
        Self { layer: RwLock::new(layer), turn: Mutex::new(()) }
    }

    /// What changes the layer: waits for the threads that look at it, and is refused while another one changes it.
    fn change<R: Send>(&self, py: Python<'_>, f: impl FnOnce(&mut cache::Layer) -> Result<R> + Send) -> PyResult<R> {
        enter(py, || {
            let _turn = self.turn.try_lock().map_err(|_| Error::Busy)?;
            let mut layer = self.layer.write().map_err(|_| Error::Busy)?;
            caught(|| f(&mut layer))
        })
    }

    /// What only looks at it: any number of threads at once, refused while one changes it.
    pub(super) fn look<R: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&cache::Layer) -> Result<R> + Send,
    ) -> PyResult<R> {
        enter(py, || {
            let layer = self.layer.try_read().map_err(|_| Error::Busy)?;
            caught(|| f(&layer))
        })
    }
}

/// The one place that releases the GIL and turns errors into exceptions.
fn enter<R: Send>(py: Python<'_>, f: impl FnOnce() -> Result<R> + Send) -> PyResult<R> {
    py.detach(f).map_err(|e| to_python(py, &e))
}

/// Turns a panic into an error, inside the locks, so that it does not poison them.
fn caught<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        if let Some(&OutOfMemory { bytes }) = panic.downcast_ref() {
            return Err(Error::Memory { bytes });
        }
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).into()));
        Err(Error::Internal(text.unwrap_or_else(|| "unknown panic".into())))
    })
}

/// New tokens: keys, values, which of them are not pads (booleans `[B, 1, 1, n]`), whether to pack first what is due, and
/// whether to pack afterwards what is due then.
#[derive(FromPyObject)]
struct New(Tensor, Tensor, Option<Tensor>, bool, bool);

impl New {
    /// # Safety
    /// The tensors are alive and nobody writes to them meanwhile.
    unsafe fn append_to(&self, layer: &mut cache::Layer, readers: Option<Readers<'_>>) -> Result<()> {
        let Self(k, v, valid, before, after) = self;
        if *before {
            layer.settle();
        }
        // SAFETY: by this function's contract.
        unsafe {
            let valid = valid.as_ref().map(|valid| valid.flags("valid")).transpose()?;
            let (k, v) = (k.view("keys")?, v.view("values")?);
            let query = readers.as_ref().map(|readers| readers.query.reborrow());
            let readers = readers.zip(query.as_ref());
            let readers = readers.map(|(Readers { softmax, sinks, .. }, query)| Readers { query, softmax, sinks });
            layer.append(&cache::New { k: &k, v: &v, valid: valid.as_deref(), readers, settle: *after })
        }
    }
}

/// Queries `[B, Hq, n, Dk]`, scaling and cap of the logits, and learned logits, one a query head, that take weight.
#[derive(FromPyObject)]
struct AsksFor(Tensor, f32, Option<f32>, Option<Vec<f32>>);

/// A gain, and whether it was enough.
type Gain = Option<(f32, bool)>;

/// Batch, KV heads, key dim, value dim, dtype.
type Sizes = (usize, usize, usize, usize, &'static str);

fn kernels() -> Result<&'static Kernels> {
    kernels::chosen()
}

#[pymethods]
impl Layer {
    /// A layer that packs keys and values so, keeps the tokens that an eviction chooses, and of which a step of decoding reads
    /// pages of so many tokens, so many or such a share of all in all.
    #[new]
    #[pyo3(signature = (keys, values, eviction=None, quest=None))]
    fn new(
        py: Python<'_>,
        keys: &Method,
        values: &Method,
        eviction: Option<&Eviction>,
        quest: Option<(Given, usize)>,
    ) -> PyResult<Self> {
        let codec = Codec::new(keys.0.clone(), values.0.clone()).and_then(|codec| kernels().map(|_| codec));
        let layer = cache::Layer::new(codec.map_err(|e| to_python(py, &e))?);
        let quest = quest.map(|(budget, page)| Quest { budget: budget.into(), page });
        let layer = layer.with_eviction(eviction.map(|eviction| Arc::clone(&eviction.0)));
        Ok(Self::holding(layer.with_quest(quest)))
    }

    /// Raises `OptionError` when the methods do not fit keys and values of such head dims.
    fn check_dims(&self, py: Python<'_>, key_dim: usize, value_dim: usize) -> PyResult<()> {
        self.look(py, |layer| layer.codec().check_dims(None, key_dim, value_dim))
    }

    /// Tokens of one forward up to which packing waits for the next forward.
    fn window(&self, py: Python<'_>) -> PyResult<usize> {
        self.look(py, |layer| Ok(layer.codec().window()))
    }

    /// Whether `append` wants to see the queries.
    fn wants_queries(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, |layer| Ok(layer.wants_queries()))
    }

    /// Whether tokens are chosen: the cache may hold fewer than it saw.
    fn evicts(&self, py: Python<'_>) -> PyResult<bool> {
        self.look(py, |layer| Ok(layer.eviction().is_some()))
    }

    /// A copy that shares all pages.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        self.look(py, |layer| Ok(Self::holding(layer.clone())))
    }

    /// Raises what `append` would raise.
    fn check(&self, py: Python<'_>, k: Tensor, v: Tensor) -> PyResult<()> {
        // SAFETY: `kvpack._tensors` makes these tuples from tensors that its caller holds during the call.
        self.look(py, |layer| unsafe { layer.check(&k.view("keys")?, &v.view("values")?) })
    }

    /// Appends checked tokens, with up to `threads` threads; methods that want to know it see what attends to them: queries,
    /// scaling, cap and sinks of the logits.
    fn append(&self, py: Python<'_>, new: New, readers: Option<AsksFor>, threads: usize) -> PyResult<()> {
        pool::set_threads(threads);
        // SAFETY: as in `check`.
        self.change(py, |layer| unsafe {
            let Some(AsksFor(q, scaling, softcap, sinks)) = readers else { return new.append_to(layer, None) };
            let (query, softmax) = (q.view("query")?, Softmax { scaling, softcap });
            new.append_to(layer, Some(Readers { query: &query, softmax, sinks: sinks.as_deref() }))
        })
    }

    /// Packs what is due.
    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, |layer| {
            layer.settle();
            Ok(())
        })
    }

    /// Appends checked tokens, if any; then attention of the newest positions' queries, written to `out`
    /// `[B, Q, Hq, Dv]`. With up to `threads` threads.
    #[allow(clippy::too_many_arguments)]
    fn attend(
        &self,
        py: Python<'_>,
        q: Tensor,
        out: Tensor,
        new: Option<New>,
        mask: Option<Tensor>,
        scaling: f32,
        softcap: Option<f32>,
        sinks: Option<Vec<f32>>,
        threads: usize,
    ) -> PyResult<()> {
        pool::set_threads(threads);
        // SAFETY: as in `check`; `out` was made for this call.
        self.change(py, |layer| unsafe {
            let (query, softmax, sinks) = (q.view("query")?, Softmax { scaling, softcap }, sinks.as_deref());
            if let Some(new) = new {
                new.append_to(layer, Some(Readers { query: &query, softmax, sinks }))?;
            }
            let mask = mask.map(|m| m.mask()).transpose()?;
            let received = query.shape()[2] == 1 && layer.wants_attention();
            let request = Request { query, mask, softmax, sinks, received };
            let attention = layer.attend(&request, &mut out.view_mut("out")?, kernels()?)?;
            if !attention.is_empty() {
                layer.receive(&attention, kernels()?);
            }
            Ok(())
        })
    }

    /// Writes to `out` `[B, 1, 1, seen]` what every position receives from a query `[B, Hq, 1, Dk]` of the newest one, the mean over
    /// the heads; 0 where nothing is held.
    #[allow(clippy::too_many_arguments)]
    fn write_received(
        &self,
        py: Python<'_>,
        q: Tensor,
        out: Tensor,
        scaling: f32,
        softcap: Option<f32>,
        sinks: Option<Vec<f32>>,
        threads: usize,
    ) -> PyResult<()> {
        pool::set_threads(threads);
        // SAFETY: as in `attend`.
        self.look(py, |layer| unsafe {
            let (query, softmax) = (q.view("query")?, Softmax { scaling, softcap });
            let request = Request { query, mask: None, softmax, sinks: sinks.as_deref(), received: true };
            layer.write_received(&request, &mut out.view_mut("out")?, kernels()?)
        })
    }

    /// Writes all keys to `out` `[B, H, seen, Dk]`, dequantised.
    fn write_keys(&self, py: Python<'_>, out: Tensor) -> PyResult<()> {
        // SAFETY: as in `attend`.
        self.look(py, |layer| unsafe { layer.write_keys(out.view_mut("out")?, kernels()?) })
    }

    /// Writes all values to `out` `[B, H, seen, Dv]`, dequantised.
    fn write_values(&self, py: Python<'_>, out: Tensor) -> PyResult<()> {
        // SAFETY: as in `attend`.
        self.look(py, |layer| unsafe { layer.write_values(out.view_mut("out")?, kernels()?) })
    }

    /// Raises what `crop` would raise.
    fn check_crop(&self, py: Python<'_>, n: usize, lossy: bool) -> PyResult<()> {
        self.look(py, |layer| layer.check_crop(n, lossy))
    }

    /// Removes the `n` newest positions.
    fn crop(&self, py: Python<'_>, n: usize, lossy: bool) -> PyResult<()> {
        self.change(py, |layer| layer.crop(n, lossy))
    }

    /// Makes the batch out of the rows at `indices`.
    fn select(&self, py: Python<'_>, indices: Vec<usize>) -> PyResult<()> {
        self.change(py, |layer| layer.select(&indices))
    }

    /// Forgets everything.
    fn reset(&self, py: Python<'_>) -> PyResult<()> {
        self.change(py, |layer| {
            layer.reset();
            Ok(())
        })
    }

    /// Positions seen, pads included.
    fn seen(&self, py: Python<'_>) -> PyResult<usize> {
        self.look(py, |layer| Ok(layer.seen()))
    }

    /// `(batch, KV heads, key dim, value dim, dtype)`, or `None` before the first tokens.
    fn shape(&self, py: Python<'_>) -> PyResult<Option<Sizes>> {
        self.look(py, |layer| {
            Ok(layer.shape().map(|s| (layer.batch(), s.heads, s.key_dim, s.value_dim, s.dtype.name())))
        })
    }

    /// Bytes allocated: `(codes, scales, exact, index)`.
    fn memory(&self, py: Python<'_>) -> PyResult<(usize, usize, usize, usize)> {
        self.look(py, |layer| {
            let m = layer.memory();
            Ok((m.codes, m.scales, m.exact, m.index))
        })
    }

    /// Bytes of what a calibration found for the layer; and of the angles that all layers with its rotary embedding share, by
    /// a number of their own.
    fn tables(&self, py: Python<'_>) -> PyResult<(usize, Option<(usize, usize)>)> {
        self.look(py, |layer| Ok(inspect::tables(layer.codec())))
    }

    /// Share of the numbers held, the newest positions' aside, that are not what the model made.
    fn lossy_share(&self, py: Python<'_>, new: usize) -> PyResult<f64> {
        self.look(py, |layer| Ok(layer.lossy_share(new)))
    }

    /// Positions that a KV head of a sequence holds.
    fn positions(&self, py: Python<'_>, row: usize, head: usize) -> PyResult<inspect::Positions> {
        self.look(py, |layer| Ok(inspect::positions(layer.head(row, head)?)))
    }

    /// What feedback could gain at most, and whether it is used, for keys and for values of a KV head; `None` where there is none.
    fn feedback_gains(&self, py: Python<'_>, row: usize, head: usize) -> PyResult<(Gain, Gain)> {
        self.look(py, |layer| Ok(layer.head(row, head)?.gains().into()))
    }

    /// Bits `[pages, Dk]` of every key channel in each of a KV head's graded pages.
    fn key_bits(&self, py: Python<'_>, row: usize, head: usize) -> PyResult<inspect::Bits> {
        self.look(py, |layer| Ok(inspect::key_bits(layer.head(row, head)?, dims(layer).0)))
    }

    /// What a KV head of a sequence keeps beside its codes, of keys and of values: packed tokens, channels, and what the codes
    /// lack.
    fn outliers(&self, py: Python<'_>, row: usize, head: usize) -> PyResult<(inspect::Outliers, inspect::Outliers)> {
        self.look(py, |layer| Ok(inspect::outliers(layer.head(row, head)?)))
    }

    /// What a KV head of a sequence stores packed, of keys and of values: exact tokens before, codes `[n, dim]`, scales and
    /// zero-points, a row a token or a group of tokens.
    fn packed(&self, py: Python<'_>, row: usize, head: usize) -> PyResult<(inspect::Packed, inspect::Packed)> {
        self.look(py, |layer| {
            let (head, (key_dim, value_dim)) = (layer.head(row, head)?, dims(layer));
            Ok((inspect::keys(head, key_dim), inspect::values(head, value_dim)))
        })
    }
}

/// Key dim and value dim; 1 before the first tokens.
fn dims(layer: &cache::Layer) -> (usize, usize) {
    layer.shape().map_or((1, 1), |shape| (shape.key_dim, shape.value_dim))
}
