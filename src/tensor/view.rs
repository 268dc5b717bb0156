//! Borrowed tensors of other owners, with strides.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::{Dtype, Limit, Slice};
use crate::error::{Error, Result};

/// A borrowed 4-D tensor `[batch, heads, tokens, dim]` with strides; the last stride is 1.
#[derive(Clone, Copy)]
pub struct View<'a> {
    ptr: *const u8,
    dtype: Dtype,
    shape: [usize; 4],
    strides: [usize; 3],
    owner: PhantomData<&'a [u8]>,
}

// SAFETY: a view only reads, and the memory outlives it by the contract of `View::new`.
unsafe impl Send for View<'_> {}
// SAFETY: as above.
unsafe impl Sync for View<'_> {}

impl<'a> View<'a> {
    /// A view of `shape` numbers at `ptr`; `strides` are in numbers, for batch, heads and tokens.
    ///
    /// # Safety
    /// `ptr` must be aligned for `dtype`, and every number reached by `shape` and `strides` must be
    /// readable and unchanged for `'a`.
    pub unsafe fn new(ptr: *const u8, dtype: Dtype, shape: [usize; 4], strides: [usize; 3]) -> Self {
        Self { ptr, dtype, shape, strides, owner: PhantomData }
    }

    /// A view of a contiguous slice, for tests and for callers in Rust.
    ///
    /// # Panics
    /// When the slice's length is not the product of `shape`.
    pub fn of_slice(data: Slice<'a>, shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>());
        let (ptr, dtype) = match data {
            Slice::F32(x) => (x.as_ptr().cast(), Dtype::F32),
            Slice::F16(x) => (x.as_ptr().cast(), Dtype::F16),
            Slice::Bf16(x) => (x.as_ptr().cast(), Dtype::Bf16),
        };
        let strides = [shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]];
        // SAFETY: the slice is alive for 'a and has exactly the numbers that shape and strides reach.
        unsafe { Self::new(ptr, dtype, shape, strides) }
    }

    /// The newest token alone.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn newest(&self) -> Self {
        let [batch, heads, tokens, dim] = self.shape;
        // SAFETY: the last token is within what `new` promised to be readable.
        let ptr = unsafe { self.ptr.add((tokens - 1) * self.strides[2] * self.dtype.size()) };
        Self { ptr, shape: [batch, heads, 1, dim], ..*self }
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The number format.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The `dim` numbers at `[b, h, t]`.
    ///
    /// # Panics
    /// When an index is out of bounds.
    pub fn row(&self, b: usize, h: usize, t: usize) -> Slice<'a> {
        let [nb, nh, nt, d] = self.shape;
        assert!(b < nb && h < nh && t < nt, "row [{b}, {h}, {t}] of {:?}", self.shape);
        let at = b * self.strides[0] + h * self.strides[1] + t * self.strides[2];
        // SAFETY: the indices are within `shape`, and `new` promised that all of `shape` is readable.
        unsafe {
            match self.dtype {
                Dtype::F32 => Slice::F32(std::slice::from_raw_parts(self.ptr.cast::<f32>().add(at), d)),
                Dtype::F16 => Slice::F16(std::slice::from_raw_parts(self.ptr.cast::<f16>().add(at), d)),
                Dtype::Bf16 => Slice::Bf16(std::slice::from_raw_parts(self.ptr.cast::<bf16>().add(at), d)),
            }
        }
    }

    fn rows(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let [nb, nh, nt, _] = self.shape;
        (0..nb).flat_map(move |b| (0..nh).flat_map(move |h| (0..nt).map(move |t| [b, h, t])))
    }

    /// Checks that every number is finite, and that it and its vector are within `limit`.
    ///
    /// # Errors
    /// [`Error::NonFinite`] or [`Error::TooLarge`] with the index of the first that is not; of a vector that is too long, of its
    /// largest number.
    pub fn check_magnitude(&self, what: &'static str, limit: Limit) -> Result<()> {
        // No vector of numbers up to this is too long.
        let surely = limit.number.min(limit.norm / (self.shape[3] as f32).sqrt());
        for [b, h, t] in self.rows() {
            let row = self.row(b, h, t);
            if row.first_beyond(surely).is_none() {
                continue;
            }
            if let Some((c, x)) = row.first_beyond(limit.number) {
                let at = [b, h, t, c];
                let finite = x.is_finite();
                return Err(if finite {
                    Error::TooLarge { what, limit: limit.number as u64, at }
                } else {
                    Error::NonFinite { what, at }
                });
            }
            let (square, c) = row.square();
            if square > f64::from(limit.norm).powi(2) {
                return Err(Error::TooLarge { what, limit: surely as u64, at: [b, h, t, c] });
            }
        }
        Ok(())
    }

    /// Whether batch rows `a` and `b` hold the same bits.
    pub fn same_rows(&self, a: usize, b: usize) -> bool {
        let [_, nh, nt, _] = self.shape;
        (0..nh).all(|h| (0..nt).all(|t| self.row(a, h, t).same_bits(self.row(b, h, t))))
    }
}

/// A contiguous 4-D tensor of another owner that is written to.
pub struct ViewMut<'a> {
    ptr: *mut u8,
    dtype: Dtype,
    shape: [usize; 4],
    owner: PhantomData<&'a mut [u8]>,
}

// SAFETY: a view owns its memory exclusively for 'a, by the contract of `ViewMut::new`.
unsafe impl Send for ViewMut<'_> {}

impl<'a> ViewMut<'a> {
    /// A contiguous tensor of `shape` numbers at `ptr`.
    ///
    /// # Safety
    /// `ptr` must be aligned for `dtype`, and all of `shape` must be writable and not touched by
    /// anyone else for `'a`.
    pub unsafe fn new(ptr: *mut u8, dtype: Dtype, shape: [usize; 4]) -> Self {
        Self { ptr, dtype, shape, owner: PhantomData }
    }

    /// A view of a slice, for tests and for callers in Rust.
    ///
    /// # Panics
    /// When the slice's length is not the product of `shape`.
    pub fn of_slice(data: &'a mut [f32], shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>());
        // SAFETY: the slice is ours for 'a and has exactly the numbers of `shape`.
        unsafe { Self::new(data.as_mut_ptr().cast(), Dtype::F32, shape) }
    }

    /// The sizes, in the order of the strides.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Writes the row at index `[i, j, k]`, rounded to the tensor's dtype.
    ///
    /// # Panics
    /// When an index is out of bounds or `row` has another length than the last dimension.
    pub fn write_row(&mut self, [i, j, k]: [usize; 3], row: &[f32]) {
        let [ni, nj, nk, d] = self.shape;
        assert!(i < ni && j < nj && k < nk && row.len() == d, "row [{i}, {j}, {k}] of {:?}", self.shape);
        let at = ((i * nj + j) * nk + k) * d;
        // SAFETY: the indices are within `shape`, which `new` promised to be ours alone.
        unsafe {
            match self.dtype {
                Dtype::F32 => std::slice::from_raw_parts_mut(self.ptr.cast::<f32>().add(at), d).copy_from_slice(row),
                Dtype::F16 => {
                    std::slice::from_raw_parts_mut(self.ptr.cast::<f16>().add(at), d).convert_from_f32_slice(row);
                }
                Dtype::Bf16 => {
                    std::slice::from_raw_parts_mut(self.ptr.cast::<bf16>().add(at), d).convert_from_f32_slice(row);
                }
            }
        }
    }

    /// The tensor cut at its two first dimensions, in their order, into parts that can be written apart.
    pub fn split(self) -> Vec<ViewMut<'a>> {
        let [ni, nj, nk, d] = self.shape;
        let part = |i: usize| {
            // SAFETY: part i is the i-th of ni * nj disjoint pieces of what `new` promised to be ours.
            unsafe { ViewMut::new(self.ptr.add(i * nk * d * self.dtype.size()), self.dtype, [1, 1, nk, d]) }
        };
        (0..ni * nj).map(part).collect()
    }
}

/// A tensor of another owner, and a part in the ownership.
#[derive(Clone)]
pub struct Kept {
    view: View<'static>,
    owner: Arc<dyn Any + Send + Sync>,
}

impl Kept {
    /// What `view` shows, which stays as it is while `owner` lives.
    ///
    /// # Safety
    /// The memory of `view` must be readable and unchanged as long as `owner` lives.
    pub unsafe fn new(view: View<'_>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        // SAFETY: only the lifetime changes; by this function's contract the owner, which is kept, extends it.
        let view = unsafe { std::mem::transmute::<View<'_>, View<'static>>(view) };
        Self { view, owner }
    }

    /// The tensor.
    pub fn view(&self) -> View<'_> {
        self.view
    }

    /// Who keeps its memory.
    pub fn owner(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.owner
    }
}
