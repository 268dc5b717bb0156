//! The Python classes around methods: each is made by name, with its options.

use std::collections::BTreeMap;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use super::codec::PythonCodec;
use super::errors::to_python;
use super::options::options;
use super::scorer::PythonScorer;
use crate::error::{Result, refuse};
use crate::kernels;
use crate::{cache, compact, evict, prune, quantize, select, share};

/// Checks, and maps the error.
fn made<T>(py: Python<'_>, made: Result<T>) -> PyResult<T> {
    made.map_err(|error| to_python(py, &error))
}

/// A checked way of storing keys, or values, or both.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Codec(quantize::Made, String);

#[pymethods]
impl Codec {
    /// The codec of that name, with its options.
    #[new]
    #[pyo3(signature = (name, **given))]
    fn new(py: Python<'_>, name: &str, given: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let codec = options(given)?.all(|options| quantize::make(name, options));
        Ok(Self(made(py, codec)?, name.into()))
    }

    /// A codec that is a function of `group` tokens of one KV head, float32 `[group, D]`, which it returns as they would be read.
    #[staticmethod]
    #[pyo3(signature = (function, *, group, window, sinks))]
    fn simulated(function: Py<PyAny>, group: usize, window: usize, sinks: usize) -> Self {
        let codec = Arc::new(PythonCodec { function, group: group.max(1), window, sinks });
        Self(quantize::Made { keys: Some(codec.clone()), values: Some(codec) }, "simulated".into())
    }
}

/// A checked way of choosing the tokens that stay.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Eviction(Arc<evict::Eviction>);

#[pymethods]
impl Eviction {
    /// An eviction whose scorer has that name, with its options and those that all evictions have.
    #[new]
    #[pyo3(signature = (scorer, **given))]
    fn new(py: Python<'_>, scorer: &str, given: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let eviction = options(given)?.all(|options| {
            let scorer = evict::make(scorer, options)?;
            evict::Eviction::new(scorer, options)
        });
        Ok(Self(Arc::new(made(py, eviction)?)))
    }

    /// An eviction whose scores are computed by `function(keys, values, queries, positions)` for the KV heads of a sequence: float32
    /// `[H, n, Dk]` and `[H, n, Dv]`, scaled queries of the `queries` newest tokens `[tokens, Hq, Dk]`, or `None`, and int64 `[H, n]`;
    /// it returns float32 `[H, n]`. With the options that all evictions have.
    #[staticmethod]
    #[pyo3(signature = (function, queries, **given))]
    fn scored(
        py: Python<'_>,
        function: Py<PyAny>,
        queries: usize,
        given: Option<&Bound<'_, PyDict>>,
    ) -> PyResult<Self> {
        let scorer = Arc::new(PythonScorer::new(function, queries));
        let eviction = options(given)?.all(|options| evict::Eviction::new(scorer, options));
        Ok(Self(Arc::new(made(py, eviction)?)))
    }
}

/// A checked way of choosing what a step of decoding reads.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Selector(Arc<dyn select::Selector>);

#[pymethods]
impl Selector {
    /// The selector of that name, with its options.
    #[new]
    #[pyo3(signature = (name, **given))]
    fn new(py: Python<'_>, name: &str, given: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        Ok(Self(made(py, options(given)?.all(|options| select::make(name, options)))?))
    }
}

/// A checked way of keeping something of tokens that leave.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Compactor(Arc<dyn compact::Compactor>);

#[pymethods]
impl Compactor {
    /// The compactor of that name, with its options.
    #[new]
    #[pyo3(signature = (name, **given))]
    fn new(py: Python<'_>, name: &str, given: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        Ok(Self(made(py, options(given)?.all(|options| compact::make(name, options)))?))
    }
}

/// What is held of a KV head, where that is not all of it.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Rung(prune::Pruned);

#[pymethods]
impl Rung {
    /// With a `window` the first `sinks` tokens and the newest `window`, while `compact` keeps something of the others; `gone`: nothing.
    /// With codecs what is held is stored by them, else as the layer's other heads are.
    #[new]
    #[pyo3(signature = (*, gone=false, sinks=0, window=None, compact=None, keys=None, values=None))]
    fn new(
        py: Python<'_>,
        gone: bool,
        sinks: usize,
        window: Option<usize>,
        compact: Option<&Compactor>,
        keys: Option<&Codec>,
        values: Option<&Codec>,
    ) -> PyResult<Self> {
        let compactor = compact.map(|compact| Arc::clone(&compact.0));
        let tokens = match window {
            _ if gone => prune::Tokens::Gone,
            Some(window) => prune::Tokens::Streaming(prune::Streaming { sinks, window, compactor }),
            None => prune::Tokens::All,
        };
        let codecs = keys.zip(values).map(|(keys, values)| made(py, codecs(keys, values))).transpose()?;
        Ok(Self(prune::Pruned { tokens, codecs, ..prune::Pruned::default() }))
    }
}

/// What is held of some KV heads of a layer.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Prune(Arc<dyn prune::Prune>);

#[pymethods]
impl Prune {
    /// By number; of all others everything is held.
    #[new]
    fn new(py: Python<'_>, heads: BTreeMap<usize, PyRef<'_, Rung>>) -> PyResult<Self> {
        let heads = heads.into_iter().map(|(h, head)| (h, head.0.clone()));
        Ok(Self(made(py, prune::make(heads))?))
    }
}

/// A checked way in which layers read what others hold.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Share(pub(super) Arc<dyn share::Share>);

#[pymethods]
impl Share {
    /// The method of that name, with its options.
    #[new]
    #[pyo3(signature = (name, **given))]
    fn new(py: Python<'_>, name: &str, given: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        Ok(Self(made(py, options(given)?.all(|options| share::make(name, options)))?))
    }
}

/// How one attention layer stores its tokens; holds none.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Layer(pub(super) cache::Layer);

#[pymethods]
impl Layer {
    /// Keys and values are stored so, an eviction chooses tokens that stay, a compactor keeps something of those that leave, a selector
    /// chooses what a step of decoding reads, and `prune` what is held of each head. With `selects` and without a selector it is read
    /// whole, among layers that are not; with `center` keys are held less the mean of the first ones. Of a `window` queries see so many
    /// of the newest positions, their own among them.
    #[new]
    #[pyo3(signature = (keys, values, *, evict=None, compact=None, select=None, prune=None, selects=false, center=false, window=None))]
    #[allow(clippy::too_many_arguments)] // by name, one a family
    fn new(
        py: Python<'_>,
        keys: &Codec,
        values: &Codec,
        evict: Option<&Eviction>,
        compact: Option<&Compactor>,
        select: Option<&Selector>,
        prune: Option<&Prune>,
        selects: bool,
        center: bool,
        window: Option<usize>,
    ) -> PyResult<Self> {
        let codecs = made(py, codecs(keys, values).and_then(|codecs| kernels::chosen().map(|_| codecs)))?;
        let layer = cache::Layer::new(cache::Methods {
            codecs,
            eviction: evict.map(|evict| Arc::clone(&evict.0)),
            compactor: compact.map(|compact| Arc::clone(&compact.0)),
            selector: select.map(|select| Arc::clone(&select.0)),
            prune: prune.map(|prune| Arc::clone(&prune.0)),
        });
        let layer = layer.with_centers(center).with_window(window);
        Ok(Self(if selects { layer.among_selected() } else { layer }))
    }

    /// Raises `OptionError` when the methods do not fit keys and values of such head dims.
    fn check_dims(&self, py: Python<'_>, key_dim: usize, value_dim: usize) -> PyResult<()> {
        made(py, self.0.check_dims(None, key_dim, value_dim))
    }
}

fn codecs(Codec(keys, name_of_keys): &Codec, Codec(values, name_of_values): &Codec) -> Result<quantize::Codecs> {
    match (&keys.keys, &values.values) {
        (Some(keys), Some(values)) => quantize::Codecs::new(Arc::clone(keys), Arc::clone(values)),
        (None, _) => refuse("keys", name_of_keys, "a codec of keys"),
        (_, None) => refuse("values", name_of_values, "a codec of values"),
    }
}
