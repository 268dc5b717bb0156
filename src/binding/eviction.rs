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

/// Pairs of channels, and the angle from one position to the next of each.
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
    fn with(self, scorer: Result<Scorer>, closing: Option<Arc<Rope>>) -> Result<evict::Eviction> {
        let Self(amount, sinks, recent, block, floor, protect, pyramid) = self;
        let pyramid = pyramid.map(|(beta, layer, layers, window)| Pyramid { beta, layer, layers, window });
        let budget = Budget { amount: amount.into(), pyramid };
        let protect = protect.into_iter().map(|(first, end)| first..end).collect();
        let recent = recent.into();
        evict::Eviction { scorer: scorer?, budget, sinks, recent, block, floor, protect, closing }.checked()
    }
}

fn pooling(name: &str) -> Result<Pooling> {
    match name {
        "avg" => Ok(Pooling::Mean),
        "max" => Ok(Pooling::Max),
        _ => Err(Error::Option { name: "pooling", given: name.into(), accepted: "avg, max".into() }),
    }
}

fn closed(py: Python<'_>, common: Common, scorer: Result<Scorer>, closing: Option<Arc<Rope>>) -> PyResult<Eviction> {
    let eviction = common.with(scorer, closing).map_err(|e| to_python(py, &e))?;
    Ok(Eviction(Arc::new(eviction)))
}

fn made(py: Python<'_>, common: Common, scorer: Result<Scorer>) -> PyResult<Eviction> {
    closed(py, common, scorer, None)
}

#[pymethods]
impl Eviction {
    /// Votes of the last queries.
    #[staticmethod]
    fn snapkv(py: Python<'_>, common: Common, window: usize, kernel: usize, pool: &str) -> PyResult<Self> {
        let scorer = pooling(pool).map(|pooling| Scorer::SnapKv(SnapKv { window, kernel, pooling }));
        made(py, common, scorer)
    }

    /// Attention received so far, of which a newer query leaves `alpha`; `shared`: the same for all heads of a layer.
    #[staticmethod]
    fn attention(py: Python<'_>, common: Common, alpha: f32, shared: bool) -> PyResult<Self> {
        made(py, common, Ok(Scorer::Attention(Attention { alpha, shared })))
    }

    /// What queries to come would attend to: over so many positions, with the covariance, with the values' lengths; of the layer's
    /// rotation: pairs of channels, and their angles from one position to the next.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)]
    fn expected(
        py: Python<'_>,
        common: Common,
        future: usize,
        covariance: bool,
        values: bool,
        epsilon: f32,
        pairs: Vec<(u16, u16)>,
        frequencies: Vec<f32>,
    ) -> PyResult<Self> {
        let rope = Rope::shared(&pairs, &frequencies);
        made(py, common, Ok(Scorer::Expected(Expected { rope, future, covariance, values, epsilon })))
    }

    /// Small keys stay.
    #[staticmethod]
    fn norm(py: Python<'_>, common: Common) -> PyResult<Self> {
        made(py, common, Ok(Scorer::Keys(Keys::Norm)))
    }

    /// Keys that are unlike the others stay.
    #[staticmethod]
    fn keydiff(py: Python<'_>, common: Common) -> PyResult<Self> {
        made(py, common, Ok(Scorer::Keys(Keys::KeyDiff)))
    }

    /// The newest tokens stay. With the layer's rotation, as in [`Self::expected`], keys are turned so that no position is missing
    /// between the tokens that stay.
    #[staticmethod]
    fn newest(py: Python<'_>, common: Common, rotation: Option<Rotation>) -> PyResult<Self> {
        let closing = rotation.map(|(pairs, frequencies)| Rope::shared(&pairs, &frequencies));
        closed(py, common, Ok(Scorer::Pattern(Pattern::Newest)), closing)
    }

    /// Every `dilation`-th token stays.
    #[staticmethod]
    fn dilated(py: Python<'_>, common: Common, dilation: usize) -> PyResult<Self> {
        made(py, common, Ok(Scorer::Pattern(Pattern::Dilated { dilation })))
    }

    /// Lots decide.
    #[staticmethod]
    fn random(py: Python<'_>, common: Common, seed: u64) -> PyResult<Self> {
        made(py, common, Ok(Scorer::Pattern(Pattern::Random { seed })))
    }
}
