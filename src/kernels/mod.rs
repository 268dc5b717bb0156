//! The inner loops of reading, chosen once at run time.
//!
//! `scalar` reads like the equations and is what the others are tested against. `wide` has the loops written once over
//! the vectors of `vector`; `avx2` and `avx512` are such vectors, one file an instruction set.

mod ahead;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vector;
#[cfg(target_arch = "x86_64")]
mod wide;

use std::ops::Range;
use std::sync::OnceLock;

pub use ahead::Ahead;

use crate::error::{Error, Result};
use crate::format::{Codes, Folded, Packed};
use crate::linalg::{Mat, MatMut, Rotate};
use crate::tensor::Slice;

#[allow(clippy::type_complexity)] // the signatures are the documentation
/// A table of the inner loops. `g` counts the rows of matrices: query heads, or queries.
pub struct Kernels {
    /// The instruction set's name.
    pub name: &'static str,
    /// `out[g, t] = sum_c q[g, c] rows[t, c]`; a row has `d` numbers.
    pub dot_rows: fn(q: Mat<'_>, rows: Slice<'_>, d: usize, out: MatMut<'_>, ahead: &mut Ahead<'_>),
    /// `acc[g, c] += sum_t w[g, t] rows[t, c]`; a row has `d` numbers.
    pub add_rows: fn(w: Mat<'_>, rows: Slice<'_>, d: usize, acc: MatMut<'_>, ahead: &mut Ahead<'_>),
    /// `acc[g, i width + l] += sum_o w[g, o] (scale_i[o] code_i[o, l] + zero_i[o])` for the parts `i` and their lanes `l`;
    /// `w scale` is rounded as [`crate::format::folded`] says.
    pub add_packed: fn(w: Mat<'_>, packed: &Packed<'_>, acc: MatMut<'_>, folded: &mut Folded, ahead: &mut Ahead<'_>),
    /// `out[o, l] = codes[o, first + l]`, or what they stand for, for a range of lanes.
    pub unpack: fn(codes: Codes<'_>, lanes: Range<usize>, out: MatMut<'_>),
    /// `x[c, t] <- scale_c x[c, t] + zero_c`, and every pair of rows rotated by its angle at column `t`, for `t < n`, a multiple
    /// of [`LANES`](crate::format::codes::LANES).
    pub rotate: fn(x: MatMut<'_>, rotate: &Rotate<'_>, n: usize),
    /// `x[g, t] <- exp(x[g, t] - m_g)` for `t < n`, where `m_g` is the largest of them and of `weighed[g].max`, which becomes
    /// it; the rest of `weighed` is what was made. Where all are -inf, `x` is 0.
    pub softmax: fn(x: MatMut<'_>, n: usize, weighed: &mut [Weighed]),
    /// `c[m, n] += sum_k a[m, k] b[k, n]` for `n` columns.
    pub matmul: fn(a: Mat<'_>, b: Mat<'_>, n: usize, c: MatMut<'_>),
}

/// What `Kernels::softmax` says of the weights that it made of a row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weighed {
    /// The largest logit, old ones included.
    pub max: f32,
    /// Sum of the weights.
    pub sum: f32,
    /// The largest weight; 1 unless an old logit was larger.
    pub heaviest: f32,
}

impl Weighed {
    /// Before a softmax, when the largest logit so far is `max`.
    pub fn before(max: f32) -> Self {
        Self { max, sum: 0.0, heaviest: 0.0 }
    }

    /// The weight of the largest logit `own` of a row.
    fn heaviest(own: f32, max: f32) -> f32 {
        if own == max { f32::from(max > f32::NEG_INFINITY) } else { (own - max).exp() }
    }
}

/// What is taken off logits whose largest is `max`: `-inf - -inf` would be NaN.
fn shift(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}

impl Kernels {
    /// Part `i` of `packed` as f32: `out[o, l]`, for which `out` has room in whole blocks of codes, whose first row must be in use.
    ///
    /// # Panics
    /// When its first row is not in use, or it shares its rows of codes with parts before it.
    pub fn open(&self, packed: &Packed<'_>, i: usize, mut out: MatMut<'_>) {
        assert_eq!(packed.lead, 0, "a part is opened from its beginning");
        let (codes, lanes) = packed.codes(i);
        assert_eq!(lanes.start, 0, "the part has rows of its own");
        (self.unpack)(codes, lanes.clone(), out.part(0, codes.outer()));
        let (grid, lane_scales) = (packed.grid(i), packed.lane_scales(i, lanes.len()));
        for o in 0..packed.outer {
            let row = &mut out.row(o)[..lanes.len()];
            grid.decode(o, row);
            for (x, scale) in row.iter_mut().zip(lane_scales.unwrap_or_default()) {
                *x *= scale.to_f32();
            }
        }
    }
}

const ENV: &str = "KVPACK_ISA";

/// The instruction sets that this machine can run, best first.
pub fn available() -> Vec<&'static Kernels> {
    let mut all = vec![&scalar::KERNELS];
    #[cfg(target_arch = "x86_64")]
    {
        if avx2::detected() {
            all.insert(0, &avx2::KERNELS);
        }
        if avx512::detected() {
            all.insert(0, &avx512::KERNELS);
        }
    }
    all
}

/// The kernels in use: the best that the machine has, or the ones that `KVPACK_ISA` names.
///
/// # Errors
/// [`Error::Option`] when `KVPACK_ISA` names none of [`available`].
pub fn chosen() -> Result<&'static Kernels> {
    static CHOSEN: OnceLock<Result<&'static Kernels>> = OnceLock::new();
    CHOSEN.get_or_init(|| choose(std::env::var(ENV).ok().as_deref())).clone()
}

fn choose(name: Option<&str>) -> Result<&'static Kernels> {
    let all = available();
    match name {
        None | Some("") => Ok(all[0]),
        Some(name) => all.iter().copied().find(|k| k.name == name).ok_or_else(|| Error::Option {
            name: ENV,
            given: name.into(),
            accepted: all.iter().map(|k| k.name).collect::<Vec<_>>().join(", "),
        }),
    }
}
