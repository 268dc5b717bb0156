//! The Python class around [`quantize::Method`].

use std::sync::Arc;

use pyo3::prelude::*;

use super::errors::to_python;
use crate::attend::Rope;
use crate::error::{Error, Result};
use crate::quantize::{self, Block, Gptq, Graded, Kivi, KvQuant, Kvarn, Rotated, Spacing, StaticKeys};

/// A checked way of storing keys, or values.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Method(pub(super) quantize::Method);

/// Lower and upper ends of the ranges `[heads, channels]`, pairs of channels that are rotated, and their frequencies.
#[derive(FromPyObject)]
struct Keys(Vec<Vec<f32>>, Vec<Vec<f32>>, Vec<(u16, u16)>, Vec<f32>);

impl Keys {
    fn checked(self) -> Result<StaticKeys> {
        let Self(low, high, pairs, frequencies) = self;
        let mut channels: Vec<u16> = pairs.iter().flat_map(|&(a, b)| [a, b]).collect();
        channels.sort_unstable();
        let twice = channels.windows(2).any(|pair| pair[0] == pair[1]);
        if twice || pairs.len() != frequencies.len() || frequencies.iter().any(|f| !f.is_finite()) {
            return Err(Error::Option {
                name: "rotation",
                given: format!("{pairs:?} with frequencies {frequencies:?}"),
                accepted: "pairs of channels, each in at most one, and a finite frequency for each".into(),
            });
        }
        let boxed = |ends: Vec<Vec<f32>>| ends.into_iter().map(Into::into).collect();
        Ok(StaticKeys { low: boxed(low), high: boxed(high), rope: Rope::shared(&pairs, &frequencies) })
    }
}

fn spacing(levels: &str) -> Result<Spacing> {
    match levels {
        "uniform" => Ok(Spacing::Uniform),
        "lloyd-max" => Ok(Spacing::LloydMax),
        _ => Err(Error::Option { name: "levels", given: levels.into(), accepted: "uniform, lloyd-max".into() }),
    }
}

fn checked<T>(py: Python<'_>, parameters: Result<T>, method: impl Fn(T) -> quantize::Method) -> PyResult<Method> {
    parameters.map(|parameters| Method(method(parameters))).map_err(|e| to_python(py, &e))
}

#[pymethods]
impl Method {
    /// The model's dtype.
    #[staticmethod]
    fn exact() -> Self {
        Self(quantize::Method::Exact)
    }

    /// KIVI.
    #[staticmethod]
    fn kivi(py: Python<'_>, bits: u8, group: usize, window: usize, sinks: usize) -> PyResult<Self> {
        checked(py, Kivi::new(bits, group, window, sinks), quantize::Method::Kivi)
    }

    /// Blocks of 32 channels.
    #[staticmethod]
    fn block(py: Python<'_>, bits: u8, window: usize, sinks: usize) -> PyResult<Self> {
        checked(py, Block::new(bits, window, sinks), quantize::Method::Block)
    }

    /// Rotated tokens, with levels of a `uniform` grid or `lloyd-max`.
    #[staticmethod]
    fn rotated(
        py: Python<'_>,
        bits: u8,
        levels: &str,
        group: usize,
        window: usize,
        sinks: usize,
        seed: u64,
    ) -> PyResult<Self> {
        let rotated = spacing(levels).and_then(|spacing| Rotated::new(bits, spacing, group, window, sinks, seed));
        checked(py, rotated, quantize::Method::Rotated)
    }

    /// KVQuant: levels of normalised numbers, factor and offset of Q-Norm; and for keys their ranges and rotation.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)]
    fn kvquant(
        py: Python<'_>,
        bits: u8,
        levels: Vec<f32>,
        norm: [f32; 2],
        outliers: f32,
        window: usize,
        sinks: usize,
        keys: Option<Keys>,
    ) -> PyResult<Self> {
        let kvquant = keys
            .map(Keys::checked)
            .transpose()
            .and_then(|keys| KvQuant::new(bits, &levels, norm, outliers, window, sinks, keys));
        checked(py, kvquant, |kvquant| quantize::Method::KvQuant(Arc::new(kvquant)))
    }

    /// The same with GPTQ's feedback; `metrics` are those of the KV heads, row by row, without them queries make them.
    fn with_feedback(
        &self,
        py: Python<'_>,
        damping: f32,
        threshold: f32,
        act_order: bool,
        metrics: Option<Vec<Vec<f32>>>,
    ) -> PyResult<Self> {
        let gptq = Gptq::new(damping, threshold, act_order, metrics);
        checked(py, gptq.and_then(|gptq| self.0.clone().with_feedback(gptq)), |method| method)
    }

    /// The same with at least the newest window of tokens exact.
    fn with_full_window(&self, py: Python<'_>) -> PyResult<Self> {
        checked(py, self.0.clone().with_full_window(), |method| method)
    }

    /// Blocks whose tokens and channels are normalised.
    #[staticmethod]
    fn kvarn(py: Python<'_>, bits: u8, sinks: usize, seed: u64) -> PyResult<Self> {
        checked(py, Kvarn::new(bits, sinks, seed), quantize::Method::Kvarn)
    }

    /// Graded channels, for keys.
    #[staticmethod]
    fn graded(py: Python<'_>, bits: f32, group: usize, window: usize, sinks: usize) -> PyResult<Self> {
        checked(py, Graded::new(bits, group, window, sinks), quantize::Method::Graded)
    }
}
