//! GPTQ's error compensation (Frantar et al. 2022, arXiv 2210.17323) for cached vectors: what rounding one number does is made up
//! for by the numbers that are rounded after it, in a metric `H` that says what errors cost.
//!
//! ```text
//! H = U D U^T, U unit upper triangular      T = U^-1
//! for k in order:  x'_k = x_k, rounded      x_j <- x_j - T_kj (x_k - x'_k) for all j behind k
//! ```
//!
//! `T` is what GPTQ has as `chol(H^-1)`, its rows divided by their diagonal: after each step the numbers to come are the best
//! ones for the errors made so far (it is Babai's nearest plane, too). Keys have the metric of the queries that
//! read them, `H = E[q q^T]` over the query heads of their KV head (`SQuat`, arXiv 2503.24358, does this in blocks); values that
//! of the output projection, `H = sum W_o^T W_o`. Nothing of it is stored with the tokens, and reading costs nothing.

#[cfg(test)]
mod tests;
mod vector;

pub(super) use vector::{Compensated, Compensation};

use std::sync::Arc;

use half::f16;

use crate::error::{Result, refuse};
use crate::linalg::Map;
use crate::memory;
use crate::options::Options;

/// Tokens of a prompt whose queries are looked at: so many tell as much as all.
pub(crate) const SAMPLES: usize = 512;

/// The least damping: what is left of a singular metric is well above what its sums lose in float32.
const LEAST_DAMPING: f32 = 1e-4;

/// The parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Gptq {
    /// What is added to the metric's diagonal, as a share of its mean.
    damping: f32,
    /// The least gain (see [`Factor::gain`]) for which compensation is used.
    threshold: f32,
    /// Whether numbers that weigh more are rounded first, where a format's groups leave that free.
    act_order: bool,
    /// `H` of every KV head, row by row; without it the prompt's own queries make it.
    metrics: Option<Box<[Box<[f32]>]>>,
}

impl Gptq {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`] for the first that does not fit.
    pub fn new(damping: f32, threshold: f32, act_order: bool, metrics: Option<Vec<Vec<f32>>>) -> Result<Self> {
        if !(damping >= LEAST_DAMPING && damping.is_finite()) {
            return refuse("damping", damping, format!("numbers from {LEAST_DAMPING}"));
        }
        if !(threshold >= 0.0 && threshold.is_finite()) {
            return refuse("threshold", threshold, "0 and positive numbers");
        }
        if let Some(x) = metrics.iter().flatten().flatten().find(|x| !x.is_finite()) {
            return refuse("metrics", x, "finite numbers");
        }
        let metrics = metrics.map(|heads| heads.into_iter().map(Into::into).collect());
        Ok(Self { damping, threshold, act_order, metrics })
    }

    /// The compensation that a method is given, if it is.
    pub(super) fn of(options: &mut Options) -> Result<Option<Arc<Self>>> {
        let Some(own) = options.options("compensation")? else { return Ok(None) };
        let gptq = own.all(|own| {
            Self::new(own.number("damping")?, own.number("threshold")?, own.flag("act_order")?, own.table("metrics")?)
        })?;
        Ok(Some(Arc::new(gptq)))
    }

    /// Whether the queries of a prompt have to be seen.
    pub(super) fn wants_queries(&self) -> bool {
        self.metrics.is_none()
    }

    /// Bytes of the metrics that were given.
    pub fn bytes(&self) -> usize {
        self.metrics.iter().flatten().map(|metric| size_of_val(&**metric)).sum()
    }

    /// Checks that there is a metric of the right size for every head.
    pub(super) fn check_dims(&self, heads: Option<usize>, dim: usize) -> Result<()> {
        let Some(metrics) = &self.metrics else { return Ok(()) };
        let fits = metrics.iter().all(|metric| metric.len() == dim * dim);
        if fits && heads.is_none_or(|heads| heads == metrics.len()) {
            return Ok(());
        }
        refuse(
            "metrics",
            format!("{} of {:?} numbers", metrics.len(), metrics.first().map_or(0, |metric| metric.len())),
            format!("one of {dim} x {dim} for each of the layer's {} heads", heads.unwrap_or(metrics.len())),
        )
    }

    /// What compensation does for head `head`, in the coordinates of `map`; `queries` is their second moment, unless metrics were
    /// given. `None` where no query was seen.
    pub(super) fn factor(&self, head: usize, queries: &[f32], map: Option<&Arc<Map>>, ordered: bool) -> Option<Factor> {
        let metric = self.metrics.as_ref().map_or(queries, |metrics| &metrics[head]);
        let dim = metric.len().isqrt();
        let mut metric = metric.to_vec();
        let mean = (0..dim).map(|i| metric[i * dim + i]).sum::<f32>() / dim as f32;
        if !(mean > 0.0 && mean.is_finite()) {
            return None;
        }
        if let Some(map) = map {
            mapped(&mut metric, dim, map);
        }
        (0..dim).for_each(|i| metric[i * dim + i] += self.damping * mean);
        let mut order: Vec<u16> = (0..dim as u16).collect();
        if ordered && self.act_order {
            let weight = |&i: &u16| metric[usize::from(i) * (dim + 1)];
            order.sort_by(|i, j| weight(j).total_cmp(&weight(i)));
        }
        Some(Factor::new(&metric, order.into()))
    }

    /// Whether a factor is worth its work.
    pub(super) fn uses(&self, factor: &Factor) -> bool {
        factor.gain >= self.threshold
    }
}

/// `H <- T H T^T` with an orthogonal map `T`.
fn mapped(metric: &mut Vec<f32>, dim: usize, map: &Map) {
    for _ in 0..2 {
        *metric = map.apply_rows(metric, dim);
        for i in 0..dim {
            for j in 0..i {
                metric.swap(i * dim + j, j * dim + i);
            }
        }
    }
}

/// `T` of a metric, for numbers in some order.
#[derive(Clone, Debug, PartialEq)]
pub struct Factor {
    order: Box<[u16]>,
    /// Row after row of `T`, each from behind its diagonal on.
    rows: Box<[f32]>,
    /// Arithmetic over geometric mean of the eigenvalues: the most by which compensation can lessen the expected square of an
    /// error on evenly spaced levels.
    pub gain: f32,
}

/// The least that is left of a number's weight when what the others make up for is taken off, as a share of it.
const FLOOR: f64 = 1e-7;

impl Factor {
    fn new(metric: &[f32], order: Box<[u16]>) -> Self {
        let dim = order.len();
        let at = |i: usize, j: usize| f64::from(metric[usize::from(order[i]) * dim + usize::from(order[j])]);
        let (mut u, mut d) = (memory::zeros(dim * dim), memory::zeros(dim));
        for j in (0..dim).rev() {
            let rest = |u: &[f64], d: &[f64], i: usize| -> f64 {
                (j + 1..dim).map(|k| u[i * dim + k] * u[j * dim + k] * d[k]).sum()
            };
            // What rounding has left of a metric that is nearly singular may be below 0.
            d[j] = (at(j, j) - rest(&u, &d, j)).max(FLOOR * at(j, j));
            for i in 0..j {
                u[i * dim + j] = (at(i, j) - rest(&u, &d, i)) / d[j];
            }
        }
        let mean = (0..dim).map(|i| at(i, i)).sum::<f64>() / dim as f64;
        let geometric = (d.iter().map(|d| d.ln()).sum::<f64>() / dim as f64).exp();
        invert(&mut u, dim);
        let rows = (0..dim).flat_map(|i| u[i * dim + i + 1..(i + 1) * dim].iter().map(|&u| u as f32)).collect();
        Self { order, rows, gain: (mean / geometric) as f32 }
    }

    /// The order in which numbers are rounded.
    pub(super) fn order(&self) -> impl Iterator<Item = usize> + '_ {
        self.order.iter().map(|&i| usize::from(i))
    }

    /// What an error of the number that is rounded as `k`-th takes off those that come after it, one factor each.
    fn row(&self, k: usize) -> &[f32] {
        let dim = self.order.len();
        let start = k * (2 * dim - k - 1) / 2;
        &self.rows[start..start + dim - 1 - k]
    }

    /// Changes columns `[dim, n]` of `n` vectors by what makes up for the roundings before; `round(channel, column)` turns a
    /// column into what it will stand for.
    pub(super) fn correct(&self, columns: &mut [f32], n: usize, mut round: impl FnMut(usize, &mut [f32])) {
        let (mut error, most) = (memory::zeros(n), most_corrected(columns, f16::MAX.to_f32()));
        for (k, channel) in self.order().enumerate() {
            columns[channel * n..][..n].iter_mut().for_each(|x| *x = x.clamp(-most, most));
            error.copy_from_slice(&columns[channel * n..][..n]);
            round(channel, &mut error);
            error.iter_mut().zip(&columns[channel * n..]).for_each(|(rounded, x)| *rounded = x - *rounded);
            for (&factor, &later) in self.row(k).iter().zip(&self.order[k + 1..]) {
                let later = &mut columns[usize::from(later) * n..][..n];
                later.iter_mut().zip(&error).for_each(|(x, error)| *x -= factor * error);
            }
        }
    }

    /// Changes the numbers of a vector that come after number `k`, in their own order, by what makes up for the error of it.
    pub(super) fn pass_on(&self, k: usize, error: f32, later: &mut [f32]) {
        later.iter_mut().zip(self.row(k)).for_each(|(x, factor)| *x -= factor * error);
    }

    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        size_of::<Self>() + size_of_val(&*self.order) + size_of_val(&*self.rows)
    }
}

/// The magnitude at which corrected numbers stop that were `exact` ones, of a method that holds numbers up to `limit`: far more than
/// correction needs, so that no number grows without end from one to the next.
fn most_corrected(exact: &[f32], limit: f32) -> f32 {
    let largest = exact.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    (16.0 * largest).min(limit)
}

/// Inverts a unit upper triangular matrix.
fn invert(u: &mut [f64], dim: usize) {
    for i in (0..dim).rev() {
        for j in (i + 1..dim).rev() {
            // Rows behind i are inverted already.
            u[i * dim + j] = -u[i * dim + j] - (i + 1..j).map(|k| u[i * dim + k] * u[k * dim + j]).sum::<f64>();
        }
    }
}
