//! The inner loops of reading, one file an instruction set, chosen once at run time.
//!
//! `scalar` reads like the equations and is what the others are tested against.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod scalar;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::OnceLock;

use super::codes::Codes;
use crate::error::{Error, Result};
use crate::tensor::Slice;

/// The operands of `c[m, n] += a[m, k] b[k, n]`, all with row strides.
pub struct Matmul<'a> {
    /// Rows of `a` and `c`.
    pub m: usize,
    /// Columns of `a`, rows of `b`.
    pub k: usize,
    /// Columns of `b` and `c`.
    pub n: usize,
    /// Left operand and the distance of its rows.
    pub a: (&'a [f32], usize),
    /// Right operand and the distance of its rows.
    pub b: (&'a [f32], usize),
    /// Result and the distance of its rows.
    pub c: (&'a mut [f32], usize),
}

/// A table of the inner loops. `g` counts query heads; matrices are row-major.
pub struct Kernels {
    /// The instruction set's name.
    pub name: &'static str,
    /// `out[g, t] = sum_c q[g, c] rows[t, c]` with `q` `[G, d]` and rows of `out` `stride` apart.
    pub dot_rows: fn(q: &[f32], rows: Slice<'_>, d: usize, out: &mut [f32], stride: usize),
    /// `acc[g, c] += sum_t w[g, t] rows[t, c]`; rows of `w` are `w_stride`, of `acc` `acc_stride` apart.
    pub add_rows: fn(w: &[f32], w_stride: usize, rows: Slice<'_>, d: usize, acc: &mut [f32], acc_stride: usize),
    /// `acc[g, l] += sum_o w[g, o] codes[o, l]` for the lanes in a range (of multiples of 8); `w` is `[G, outer]`.
    pub add_codes: fn(w: &[f32], codes: Codes<'_>, lanes: Range<usize>, acc: &mut [f32], acc_stride: usize),
    /// `out[o, l] = codes[o, l]`, rows of `out` `stride` apart.
    pub unpack: fn(codes: Codes<'_>, out: &mut [f32], stride: usize),
    /// `x <- exp(x - max)`; returns the sum.
    pub exp_sum: fn(x: &mut [f32], max: f32) -> f32,
    /// `c += a b`.
    pub matmul: fn(Matmul<'_>),
}

const ENV: &str = "KVPACK_ISA";

/// The instruction sets that this machine can run, best first.
pub fn available() -> Vec<&'static Kernels> {
    let mut all = vec![&scalar::KERNELS];
    #[cfg(target_arch = "x86_64")]
    if avx2::detected() {
        all.insert(0, &avx2::KERNELS);
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
