//! Scores of tokens that are computed by a Python function.

use std::fmt;

use ndarray::{Array, Array3, ShapeBuilder, StrideShape};
use numpy::{PyArray2, PyArray3};
use pyo3::prelude::*;

use super::function::call;
use crate::attend::{Head, Scratch};
use crate::error::{Error, Result};
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
        let (count, n) = (heads.len(), heads[0].0.positions.len());
        let (key_dim, value_dim) = (heads[0].0.key_dim, heads[0].0.value_dim);
        if n == 0 {
            return Ok(vec![Vec::new(); count]);
        }
        let (mut keys, mut values) = (memory::zeros(count * n * key_dim), memory::zeros(count * n * value_dim));
        let places = keys.chunks_exact_mut(n * key_dim).zip(values.chunks_exact_mut(n * value_dim));
        let (kernels, work) = (kernels::chosen()?, COPYING * count * n * (key_dim + value_dim));
        pool::map(work, heads.iter().zip(places).collect(), |((head, ..), (keys, values))| {
            let mut scratch = Scratch::new(kernels);
            head.each_key(&mut scratch, |t, key| keys[t * key_dim..][..key_dim].copy_from_slice(key));
            head.each_value(&mut scratch, |t, value| values[t * value_dim..][..value_dim].copy_from_slice(value));
        });
        let positions = heads.iter().flat_map(|(head, ..)| head.positions.all()).map(i64::from).collect();
        let (keys, values) = (shaped((count, n, key_dim), keys)?, shaped((count, n, value_dim), values)?);
        let (positions, queries) = (shaped((count, n), positions)?, newest(heads, key_dim)?);
        let args = |py: Python<'_>| {
            let queries = queries.map(|queries| PyArray3::from_owned_array(py, queries).unbind());
            let [keys, values] = [keys, values].map(|x| PyArray3::from_owned_array(py, x).unbind());
            (keys, values, queries, PyArray2::from_owned_array(py, positions).unbind())
        };
        let scores = call(&self.function, args, "scores", (count, n))?;
        Ok(scores.rows().into_iter().map(|row| row.to_vec()).collect())
    }
}

/// Numbers in that shape, which has as many.
fn shaped<T, S: ShapeBuilder>(shape: S, numbers: Vec<T>) -> Result<Array<T, S::Dim>>
where
    StrideShape<S::Dim>: From<S>,
{
    Array::from_shape_vec(shape, numbers).map_err(|error| Error::Internal(error.to_string()))
}

/// The remembered queries of all heads, `[tokens, query heads, dim]`.
fn newest(heads: &[&(Head<'_>, &dyn Observed, Place)], dim: usize) -> Result<Option<Array3<f32>>> {
    let of_heads: Vec<&NewestQueries> = heads.iter().filter_map(|(_, observed, _)| observed.queries()).collect();
    let (tokens, group) = of_heads.first().map_or((0, 0), |first| (first.tokens(), first.heads()));
    if of_heads.len() < heads.len() || tokens == 0 {
        return Ok(None);
    }
    let mut q = memory::with_capacity(heads.len() * tokens * group * dim);
    for token in 0..tokens {
        for of in &of_heads {
            q.extend_from_slice(&of.q()[token * group * dim..(token + 1) * group * dim]);
        }
    }
    shaped((tokens, group * heads.len(), dim), q).map(Some)
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
        self.queries.truncate(end, tokens);
    }

    fn retain(&mut self, _: &[bool], decoding: bool) {
        self.queries.chosen(decoding);
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
