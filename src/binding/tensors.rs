//! Tensors cross as (pointer, dtype, shape, strides); `kvpack._tensors` makes these tuples and keeps the tensor alive.

use half::{bf16, f16};
use ndarray::{ArrayView4, ArrayViewMut4, ShapeBuilder};
use pyo3::prelude::*;

use crate::attend::{Mask, MaskData};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, View, ViewMut, row_of};

/// A strided 4-D CPU tensor of someone else.
pub(super) struct Tensor(usize, String, [usize; 4], [usize; 4]);

impl<'a, 'py> FromPyObject<'a, 'py> for Tensor {
    type Error = PyErr;

    /// Tuples all the way down: sequences in general take twice as long.
    fn extract(tuple: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        type Four = (usize, usize, usize, usize);
        let (ptr, dtype, shape, strides): (_, _, Four, Four) = tuple.extract()?;
        Ok(Self(ptr, dtype, shape.into(), strides.into()))
    }
}

impl Tensor {
    fn check(&self, what: &'static str, align: usize) -> Result<()> {
        let Self(ptr, _, shape, strides) = self;
        let refuse = |given: String, expected: &str| Err(Error::Shape { what, given, expected: expected.into() });
        if *ptr == 0 || !ptr.is_multiple_of(align) {
            return refuse(format!("pointer {ptr:#x}"), "an aligned pointer");
        }
        if shape[3] > 1 && strides[3] != 1 {
            return refuse(format!("last stride {}", strides[3]), "a last stride of 1");
        }
        let reach = (0..4).try_fold(0usize, |sum, i| {
            shape[i].saturating_sub(1).checked_mul(strides[i]).and_then(|x| sum.checked_add(x))
        });
        match reach.and_then(|x| x.checked_mul(align)) {
            Some(bytes) if isize::try_from(bytes).is_ok() => Ok(()),
            _ => refuse(format!("{shape:?} with strides {strides:?}"), "a tensor that fits in memory"),
        }
    }

    /// Reads the tensor while `'a` lasts.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Shape`].
    ///
    /// # Safety
    /// The tuple describes live memory that nobody writes during `'a`.
    pub(super) unsafe fn view<'a>(&self, what: &'static str) -> Result<View<'a>> {
        let dtype = Dtype::from_name(what, &self.1)?;
        self.check(what, dtype.size())?;
        let layout = self.2.strides(self.3);
        // SAFETY: by this function's contract; the pointer, its alignment and the reach of the strides were checked.
        Ok(unsafe {
            match dtype {
                Dtype::F32 => View::F32(ArrayView4::from_shape_ptr(layout, self.0 as *const f32)),
                Dtype::F16 => View::F16(ArrayView4::from_shape_ptr(layout, self.0 as *const f16)),
                Dtype::Bf16 => View::Bf16(ArrayView4::from_shape_ptr(layout, self.0 as *const bf16)),
            }
        })
    }

    /// Writes the contiguous tensor while `'a` lasts.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Shape`].
    ///
    /// # Safety
    /// The tuple describes live memory that nobody else touches during `'a`.
    pub(super) unsafe fn view_mut<'a>(&self, what: &'static str) -> Result<ViewMut<'a>> {
        let dtype = Dtype::from_name(what, &self.1)?;
        self.check(what, dtype.size())?;
        let s = self.2;
        if self.3 != [s[1] * s[2] * s[3], s[2] * s[3], s[3], 1] {
            return Err(Error::Shape {
                what,
                given: format!("strides {:?}", self.3),
                expected: "a contiguous tensor".into(),
            });
        }
        // SAFETY: by this function's contract; alignment and strides were checked.
        Ok(unsafe {
            match dtype {
                Dtype::F32 => ViewMut::F32(ArrayViewMut4::from_shape_ptr(s, self.0 as *mut f32)),
                Dtype::F16 => ViewMut::F16(ArrayViewMut4::from_shape_ptr(s, self.0 as *mut f16)),
                Dtype::Bf16 => ViewMut::Bf16(ArrayViewMut4::from_shape_ptr(s, self.0 as *mut bf16)),
            }
        })
    }

    /// Reads booleans, 1 byte each, while `'a` lasts.
    ///
    /// # Safety
    /// As [`Self::view`].
    unsafe fn bools<'a>(&self, what: &'static str) -> Result<ArrayView4<'a, u8>> {
        self.check(what, 1)?;
        // SAFETY: by this function's contract; the pointer and the reach of the strides were checked.
        Ok(unsafe { ArrayView4::from_shape_ptr(self.2.strides(self.3), self.0 as *const u8) })
    }

    /// Booleans `[B, 1, 1, n]`, row after row.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Shape`].
    ///
    /// # Safety
    /// As [`Self::view`].
    pub(super) unsafe fn flags(&self, what: &'static str) -> Result<Vec<bool>> {
        if self.1 != "bool" {
            return Err(Error::Dtype { what, given: self.1.clone(), expected: "bool".into() });
        }
        // SAFETY: by this function's contract.
        let flags = unsafe { self.bools(what)? };
        Ok((0..self.2[0]).flat_map(|b| row_of(&flags, [b, 0, 0])).map(|&x| x != 0).collect())
    }

    /// Reads a mask, boolean or additive, while `'a` lasts.
    ///
    /// # Errors
    /// [`Error::Dtype`] or [`Error::Shape`].
    ///
    /// # Safety
    /// As [`Self::view`].
    pub(super) unsafe fn mask<'a>(&self) -> Result<Mask<'a>> {
        const WHAT: &str = "attention mask";
        // SAFETY: by this function's contract.
        unsafe {
            Ok(Mask(if self.1 == "bool" {
                MaskData::Bool(self.bools(WHAT)?)
            } else {
                MaskData::Bias(self.view(WHAT)?)
            }))
        }
    }
}
