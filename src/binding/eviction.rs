//! The Python class around [`evict::Eviction`].

use std::sync::Arc;

use pyo3::prelude::*;

use super::errors::to_python;
use crate::amount::Amount;
use crate::attend::Rope;
use crate::error::{Error, Result};
use crate::evict::{self, Attention, Budget, Expected, Keys, Pattern, Pooling, Pyramid, Scorer, SnapKv};

/// A checked way of choosing tokens.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Eviction(pub(super) Arc<evict::Eviction>);

/// A layer's rotary embedding: pairs of channels, and the angle of each from one position to the next.
type Rotation = (Vec<(u16, u16)>, Vec<f32>);

/// Tokens, or a share.
#[derive(FromPyObject)]
pub(super) enum Given {
    Tokens(usize),
    Share(f64),
}

impl From<Given> for Amount {
    fn from(given: Given) -> Self {
        match given {
            Given::Tokens(n) => Self::Tokens(n),
            Given::Share(share) => Self::Share(share),
        }
    }
}

/// What is the same for all methods: budget; sinks; recent tokens; by how many tokens the budget may be exceeded while decoding,
/// if it is held then; `AdaKV`'s floor; spans that always stay; and `PyramidKV`'s beta, layer, layers and window.
#[derive(FromPyObject)]
struct Common(
    Given,
    usize,
    Given,
    Option<usize>,
    Option<f32>,
    Vec<(usize, usize)>,
    Option<(usize, usize, usize, usize)>,
);

impl Common {
    fn with(self, scorer: Scorer) -> Result<evict::Eviction> {
        let Self(amount, sinks, recent, block, floor, protect, pyramid) = self;
        let pyramid = pyramid.map(|(beta, layer, layers, window)| Pyramid { beta, layer, layers, window });
        let budget = Budget { amount: amount.into(), pyramid };
        let protect = protect.into_iter().map(|(first, end)| first..end).collect();
        let recent = recent.into();
        evict::Eviction { scorer, budget, sinks, recent, block, floor, protect, closing: None }.checked()
    }
}

fn pooling(name: &str) -> Result<Pooling> {
    match name {
        "avg" => Ok(Pooling::Mean),
        "max" => Ok(Pooling::Max),
        _ => Err(Error::Option { name: "pooling", given: name.into(), accepted: "avg, max".into() }),
    }
}

fn shared((pairs, frequencies): &Rotation) -> Arc<Rope> {
    Rope::shared(pairs, frequencies)
}

fn made(py: Python<'_>, eviction: Result<evict::Eviction>) -> PyResult<Eviction> {
    Ok(Eviction(Arc::new(eviction.map_err(|e| to_python(py, &e))?)))
}

#[pymethods]
impl Eviction {
    /// Votes of the last queries.
    #[staticmethod]
    fn snapkv(py: Python<'_>, common: Common, window: usize, kernel: usize, pool: &str) -> PyResult<Self> {
        let scorer = |pooling| Scorer::SnapKv(SnapKv { window, kernel, pooling });
        made(py, pooling(pool).and_then(|pooling| common.with(scorer(pooling))))
    }

    /// Attention received so far, of which a newer query leaves `alpha`; `shared`: the same for all heads of a layer.
    #[staticmethod]
    fn attention(py: Python<'_>, common: Common, alpha: f32, shared: bool) -> PyResult<Self> {
        made(py, common.with(Scorer::Attention(Attention { alpha, shared })))
    }

    /// What queries to come would attend to: over so many positions, with the covariance, with the values' lengths; and the layer's
    /// rotation.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)]
    fn expected(
        py: Python<'_>,
        common: Common,
        future: usize,
        covariance: bool,
        values: bool,
        epsilon: f32,
        rotation: Rotation,
    ) -> PyResult<Self> {
        let rope = shared(&rotation);
        made(py, common.with(Scorer::Expected(Expected { rope, future, covariance, values, epsilon })))
    }

    /// Small keys stay.
    #[staticmethod]
    fn norm(py: Python<'_>, common: Common) -> PyResult<Self> {
        made(py, common.with(Scorer::Keys(Keys::Norm)))
    }

    /// Keys that are unlike the others stay.
    #[staticmethod]
    fn keydiff(py: Python<'_>, common: Common) -> PyResult<Self> {
        made(py, common.with(Scorer::Keys(Keys::KeyDiff)))
    }

    /// The newest tokens stay. With the layer's rotation, as in [`Self::expected`], keys are turned so that no position is missing
    /// between the tokens that stay.
    #[staticmethod]
    fn newest(py: Python<'_>, common: Common, rotation: Option<Rotation>) -> PyResult<Self> {
        let closing = rotation.as_ref().map(shared);
        let eviction = common.with(Scorer::Pattern(Pattern::Newest));
        made(py, eviction.map(|eviction| evict::Eviction { closing, ..eviction }))
    }

    /// Every `dilation`-th token stays.
    #[staticmethod]
    fn dilated(py: Python<'_>, common: Common, dilation: usize) -> PyResult<Self> {
        made(py, common.with(Scorer::Pattern(Pattern::Dilated { dilation })))
    }

    /// Lots decide.
    #[staticmethod]
    fn random(py: Python<'_>, common: Common, seed: u64) -> PyResult<Self> {
        made(py, common.with(Scorer::Pattern(Pattern::Random { seed })))
    }
}
