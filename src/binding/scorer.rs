//! Scores of tokens that are computed by a Python function.

use std::fmt;
use std::sync::Arc;

use ndarray::Array3;
use numpy::{IntoPyArray, PyReadonlyArray2};
use pyo3::prelude::*;

use crate::attend::{Head, Scratch};
use crate::error::{Error, Raised, Result};
use crate::evict::{NewQueries, NewestQueries, Observed, Place, Scorer, Wanted};
use crate::{kernels, memory, pool};

/// Multiply-adds that take as long as copying a number.
const COPYING: usize = 8;

/// A scorer whose function gets keys, values, queries and positions of a sequence's KV heads.
pub(super) struct PythonScorer {
    function: Py<PyAny>,
    /// How many of the newest tokens' queries it gets.
    queries: usize,
}

impl PythonScorer {
    pub(super) fn new(function: Py<PyAny>, queries: usize) -> Self {
        Self { function, queries }
    }

    /// The scores of tokens of heads that hold equally many.
    fn score(&self, heads: &[&(Head<'_>, &dyn Observed, Place)]) -> Result<Vec<Vec<f32>>> {
        let (n, count) = (heads[0].0.positions.len(), heads.len());
        let (key_dim, value_dim) = (heads[0].0.key_dim, heads[0].0.value_dim);
        let kernels = kernels::chosen()?;
        let held = pool::map(COPYING * count * n * (key_dim + value_dim), heads.to_vec(), |(head, ..)| {
            let (mut keys, mut values) = (memory::with_capacity(n * key_dim), memory::with_capacity(n * value_dim));
            let mut scratch = Scratch::new(kernels);
            head.each_key(&mut scratch, |_, key| keys.extend_from_slice(key));
            head.each_value(&mut scratch, |_, value| values.extend_from_slice(value));
            (keys, values, head.positions.all())
        });
        let keys = held.iter().flat_map(|(keys, ..)| keys).copied().collect();
        let values = held.iter().flat_map(|(_, values, _)| values).copied().collect();
        let positions: Vec<i64> = held.iter().flat_map(|(.., positions)| positions).map(|&p| p.into()).collect();
        let shaped =
            |numbers, shape| Array3::from_shape_vec(shape, numbers).map_err(|e| Error::Internal(e.to_string()));
        let (keys, values) = (shaped(keys, (count, n, key_dim))?, shaped(values, (count, n, value_dim))?);
        let positions = positions.into_iter().collect::<ndarray::Array1<_>>();
        let positions = positions.into_shape_with_order((count, n)).map_err(|e| Error::Internal(e.to_string()))?;
        let queries = newest(heads, key_dim).map(|(q, shape)| shaped(q, shape)).transpose()?;
        let scores = Python::attach(|py| -> PyResult<Vec<f32>> {
            let queries = queries.map(|queries| queries.into_pyarray(py));
            let arrays = (keys.into_pyarray(py), values.into_pyarray(py), queries, positions.into_pyarray(py));
            let scores = self.function.call1(py, arrays)?;
            let scores: PyReadonlyArray2<'_, f32> = scores.extract(py)?;
            Ok(scores.as_array().iter().copied().collect())
        });
        let scores = scores.map_err(|error| Error::Raised(Raised(Arc::new(error))))?;
        if scores.len() != count * n {
            return Err(Error::Shape {
                what: "scores",
                given: format!("{} numbers", scores.len()),
                expected: format!("[{count}, {n}]"),
            });
        }
        Ok(scores
            .chunks_exact(n.max(1))
            .map(<[f32]>::to_vec)
            .chain(std::iter::repeat(Vec::new()))
            .take(count)
            .collect())
    }
}

/// The remembered queries of all heads, `[tokens, query heads, dim]`.
fn newest(heads: &[&(Head<'_>, &dyn Observed, Place)], dim: usize) -> Option<(Vec<f32>, (usize, usize, usize))> {
    let of_heads: Vec<&NewestQueries> = heads.iter().filter_map(|(_, observed, _)| observed.queries()).collect();
    let first = of_heads.first()?;
    let (tokens, group) = (first.tokens(), first.heads());
    if of_heads.len() < heads.len() || tokens == 0 {
        return None;
    }
    let mut q = memory::with_capacity(heads.len() * tokens * group * dim);
    for token in 0..tokens {
        for of in &of_heads {
            q.extend_from_slice(&of.q()[token * group * dim..(token + 1) * group * dim]);
        }
    }
    Some((q, (tokens, group * heads.len(), dim)))
}

impl fmt::Debug for PythonScorer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a Python function of {} queries", self.queries)
    }
}

impl Scorer for PythonScorer {
    fn queries(&self) -> Wanted {
        if self.queries == 0 { Wanted::None } else { Wanted::Newest(self.queries) }
    }

    fn fresh(&self) -> Box<dyn Observed> {
        Box::new(Remembered { most: self.queries, queries: NewestQueries::default() })
    }

    fn score_together(&self, heads: &[(Head<'_>, &dyn Observed, Place)]) -> Option<Result<Vec<Vec<f32>>>> {
        let all: Vec<_> = heads.iter().collect();
        let n = heads.first()?.0.positions.len();
        Some(if heads.iter().all(|(head, ..)| head.positions.len() == n) {
            self.score(&all)
        } else {
            all.chunks(1).map(|one| self.score(one)).collect::<Result<Vec<_>>>().map(|scores| scores.concat())
        })
    }
}

/// What the function is to get of queries.
#[derive(Clone)]
struct Remembered {
    most: usize,
    queries: NewestQueries,
}

impl Observed for Remembered {
    fn observe(&mut self, _: &Head<'_>, queries: &NewQueries<'_>, _: Place, _: &mut Scratch) {
        self.queries.add(queries, self.most);
    }

    fn truncate(&mut self, end: usize, tokens: usize) {
        if tokens == 0 {
            self.queries = NewestQueries::default();
        }
        self.queries.truncate(end);
    }

    fn retain(&mut self, _: &[bool], decoding: bool) {
        if !decoding {
            self.queries = NewestQueries::default();
        }
    }

    fn queries(&self) -> Option<&NewestQueries> {
        Some(&self.queries)
    }

    fn bytes(&self) -> usize {
        self.queries.bytes()
    }

    fn fork(&self) -> Box<dyn Observed> {
        Box::new(self.clone())
    }
}
