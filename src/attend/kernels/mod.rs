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

use half::f16;

pub use ahead::Ahead;

use super::codes::Codes;
use super::folded::Folded;
use super::mat::{Mat, MatMut};
use crate::error::{Error, Result};
use crate::tensor::Slice;

/// Scales and zero-points, as many of these as of those.
#[derive(Clone, Copy)]
pub struct Grid<'a> {
    /// Factors of codes.
    pub scale: &'a [f16],
    /// What code 0 stands for.
    pub zero: &'a [f16],
}

#[allow(clippy::type_complexity)] // the signatures are the documentation
/// A table of the inner loops. `g` counts the rows of matrices: query heads, or queries.
pub struct Kernels {
    /// The instruction set's name.
    pub name: &'static str,
    /// `out[g, t] = sum_c q[g, c] rows[t, c]`; a row has `d` numbers.
    pub dot_rows: fn(q: Mat<'_>, rows: Slice<'_>, d: usize, out: MatMut<'_>, ahead: &mut Ahead<'_>),
    /// `acc[g, c] += sum_t w[g, t] rows[t, c]`; a row has `d` numbers.
    pub add_rows: fn(w: Mat<'_>, rows: Slice<'_>, d: usize, acc: MatMut<'_>, ahead: &mut Ahead<'_>),
    /// `words[g, lead + i] = round(x[g, i] scale[i] / step_g)`, with the step that makes the largest of a row
    /// `largest_word`, and `offset_g = sum_i x[g, i] zero[i]`. The words before and behind are left alone.
    pub fold: fn(x: Mat<'_>, grid: Grid<'_>, largest_word: f32, lead: usize, out: &mut Folded),
    /// `acc[g, l] += step_g sum_o words[g, o] codes[o, l] + offset_g` for the lanes in a range (of multiples of 8).
    pub add_codes: fn(w: &Folded, codes: Codes<'_>, lanes: Range<usize>, acc: MatMut<'_>),
    /// `out[o, l] = codes[o, l]`.
    pub unpack: fn(codes: Codes<'_>, out: MatMut<'_>),
    /// `x <- exp(x - m)` where `m` is the largest of `x` and `max`; returns `m` and the sum. When all are -inf, `x` is 0.
    pub softmax: fn(x: &mut [f32], max: f32) -> (f32, f32),
    /// `c[m, n] += sum_k a[m, k] b[k, n]` for `n` columns.
    pub matmul: fn(a: Mat<'_>, b: Mat<'_>, n: usize, c: MatMut<'_>),
}

/// Weights of logits that are all -inf (`exp(-inf - -inf)` would be NaN) or NaN, and their sum.
fn nothing_visible(x: &mut [f32]) -> f32 {
    for x in x.iter_mut() {
        *x = if x.is_nan() { f32::NAN } else { 0.0 };
    }
    x.iter().sum()
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
