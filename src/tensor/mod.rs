//! Borrowed views over f32 / f16 / bf16 memory with strides, and growable matrices of rows.
//!
//! Views are the only place where memory of other owners (torch) is read; every access goes through
//! a bounds-checked row.

mod rows;
mod view;

pub use rows::{Held, Rows};
pub use view::{Kept, View, ViewMut, row_of};

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::error::{Error, Result};

/// The number formats a model's keys and values come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of a single.
    Bf16,
}

impl Dtype {
    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// torch's name of the dtype.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }

    /// The dtype of that name.
    ///
    /// # Errors
    /// [`Error::Dtype`] for any other name.
    pub fn from_name(what: &'static str, name: &str) -> Result<Self> {
        match name {
            "float32" => Ok(Self::F32),
            "float16" => Ok(Self::F16),
            "bfloat16" => Ok(Self::Bf16),
            _ => Err(Error::Dtype { what, given: name.into(), expected: "float32, float16 or bfloat16".into() }),
        }
    }
}

/// Rows of numbers in one of the formats, borrowed.
#[derive(Clone, Copy)]
pub enum Slice<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> Slice<'a> {
    /// The numbers in `range`.
    #[must_use]
    pub fn part(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(x) => Self::F32(&x[range]),
            Self::F16(x) => Self::F16(&x[range]),
            Self::Bf16(x) => Self::Bf16(&x[range]),
        }
    }

    /// How many numbers there are.
    pub fn len(self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The memory that the numbers lie in.
    pub fn bytes(self) -> &'a [u8] {
        let (start, len) = match self {
            Self::F32(x) => (x.as_ptr().cast(), size_of_val(x)),
            Self::F16(x) => (x.as_ptr().cast(), size_of_val(x)),
            Self::Bf16(x) => (x.as_ptr().cast(), size_of_val(x)),
        };
        // SAFETY: the slice's own memory; numbers have no bytes that may not be read.
        unsafe { std::slice::from_raw_parts(start, len) }
    }

    /// The numbers as f32.
    pub fn numbers(self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        self.to_f32(&mut out);
        out
    }

    /// Converts all numbers to f32 into `out`, which must have the same length.
    pub fn to_f32(self, out: &mut [f32]) {
        match self {
            Self::F32(x) => out.copy_from_slice(x),
            Self::F16(x) => x.convert_to_f32_slice(out),
            Self::Bf16(x) => x.convert_to_f32_slice(out),
        }
    }

    /// Index and value of the first number that is NaN or beyond `limit` in magnitude.
    pub(super) fn first_beyond(self, limit: f32) -> Option<(usize, f32)> {
        // Magnitudes order as their bits do, NaN and infinity last: the largest says whether to search at all.
        let ok = match self {
            Self::F32(x) => x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max() <= Some(limit.to_bits()),
            Self::F16(x) => x.iter().map(|v| v.to_bits() & 0x7fff).max() <= Some(f16_below(limit).to_bits()),
            Self::Bf16(x) => x.iter().map(|v| v.to_bits() & 0x7fff).max() <= Some((limit.to_bits() >> 16) as u16),
        };
        if ok {
            return None;
        }
        let find = |x: &mut dyn Iterator<Item = f32>| x.enumerate().find(|(_, v)| v.is_nan() || v.abs() > limit);
        match self {
            Self::F32(x) => find(&mut x.iter().copied()),
            Self::F16(x) => find(&mut x.iter().map(|v| v.to_f32())),
            Self::Bf16(x) => find(&mut x.iter().map(|v| v.to_f32())),
        }
    }

    /// The sum of the squares, and the place of the largest magnitude.
    pub(super) fn square(self) -> (f64, usize) {
        let of = |x: &mut dyn Iterator<Item = f32>| {
            let (mut sum, mut largest) = (0.0, (0, 0.0));
            for (i, x) in x.map(f32::abs).enumerate() {
                sum += f64::from(x).powi(2);
                largest = if x > largest.1 { (i, x) } else { largest };
            }
            (sum, largest.0)
        };
        match self {
            Self::F32(x) => of(&mut x.iter().copied()),
            Self::F16(x) => of(&mut x.iter().map(|v| v.to_f32())),
            Self::Bf16(x) => of(&mut x.iter().map(|v| v.to_f32())),
        }
    }

    pub(super) fn same_bits(self, other: Self) -> bool {
        match (self, other) {
            (Self::F32(a), Self::F32(b)) => a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            (Self::F16(a), Self::F16(b)) => a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            (Self::Bf16(a), Self::Bf16(b)) => a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            _ => false,
        }
    }
}

/// The largest half that is at most `x`, a positive number.
pub(crate) fn f16_below(x: f32) -> f16 {
    let nearest = f16::from_f32(x.min(f16::MAX.to_f32()));
    if nearest.to_f32() > x { f16::from_bits(nearest.to_bits() - 1) } else { nearest }
}

/// What numbers, and vectors of them, may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// The largest magnitude of a number.
    pub number: f32,
    /// The largest Euclidean norm of a vector.
    pub norm: f32,
}

impl Limit {
    /// A limit of single numbers alone.
    pub fn of_numbers(number: f32) -> Self {
        Self { number, norm: f32::INFINITY }
    }
}
