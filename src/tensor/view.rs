//! Borrowed tensors of other owners, with strides: ndarray's views in the formats that models use.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::{ArrayView4, ArrayViewMut4, Axis};

use super::{Dtype, Limit, Slice};
use crate::error::{Error, Result};

/// A borrowed 4-D tensor `[batch, heads, tokens, dim]` with strides; the last stride is 1.
#[derive(Clone, Copy)]
pub enum View<'a> {
    /// Single precision.
    F32(ArrayView4<'a, f32>),
    /// Half precision.
    F16(ArrayView4<'a, f16>),
    /// bfloat16.
    Bf16(ArrayView4<'a, bf16>),
}

/// A contiguous 4-D tensor of another owner that is written to.
pub enum ViewMut<'a> {
    /// Single precision.
    F32(ArrayViewMut4<'a, f32>),
    /// Half precision.
    F16(ArrayViewMut4<'a, f16>),
    /// bfloat16.
    Bf16(ArrayViewMut4<'a, bf16>),
}

macro_rules! each_view {
    ($kind:ident, $view:expr, $x:ident => $body:expr) => {
        match $view {
            $kind::F32($x) => $body,
            $kind::F16($x) => $body,
            $kind::Bf16($x) => $body,
        }
    };
}

impl<'a> View<'a> {
    /// A view of a contiguous slice, for tests and for callers in Rust.
    ///
    /// # Panics
    /// When the slice's length is not the product of `shape`.
    pub fn of_slice(data: Slice<'a>, shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>());
        let whole = "the slice has the shape's length";
        match data {
            Slice::F32(x) => Self::F32(ArrayView4::from_shape(shape, x).expect(whole)),
            Slice::F16(x) => Self::F16(ArrayView4::from_shape(shape, x).expect(whole)),
            Slice::Bf16(x) => Self::Bf16(ArrayView4::from_shape(shape, x).expect(whole)),
        }
    }

    /// The same for a shorter time: unlike references, ndarray's views do not shorten by themselves.
    #[must_use]
    pub fn reborrow(&self) -> View<'_> {
        match *self {
            Self::F32(x) => View::F32(x.reborrow()),
            Self::F16(x) => View::F16(x.reborrow()),
            Self::Bf16(x) => View::Bf16(x.reborrow()),
        }
    }

    /// The newest token alone.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn newest(&self) -> Self {
        match self {
            Self::F32(x) => Self::F32(newest_of(x)),
            Self::F16(x) => Self::F16(newest_of(x)),
            Self::Bf16(x) => Self::Bf16(newest_of(x)),
        }
    }

    /// `[batch, heads, tokens, dim]`.
    pub fn shape(&self) -> [usize; 4] {
        each_view!(View, self, x => x.dim().into())
    }

    /// The number format.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }

    /// The `dim` numbers at `[b, h, t]`.
    ///
    /// # Panics
    /// When an index is out of bounds.
    pub fn row(&self, b: usize, h: usize, t: usize) -> Slice<'a> {
        match self {
            Self::F32(x) => Slice::F32(row_of(x, [b, h, t])),
            Self::F16(x) => Slice::F16(row_of(x, [b, h, t])),
            Self::Bf16(x) => Slice::Bf16(row_of(x, [b, h, t])),
        }
    }

    /// The numbers at `[b, h, t]` for all `t` of `tokens`, which is not empty; `None` where they do not follow each other in memory.
    ///
    /// # Panics
    /// When an index is out of bounds.
    pub fn run(&self, b: usize, h: usize, tokens: Range<usize>) -> Option<Slice<'a>> {
        match self {
            Self::F32(x) => run_of(x, [b, h], tokens).map(Slice::F32),
            Self::F16(x) => run_of(x, [b, h], tokens).map(Slice::F16),
            Self::Bf16(x) => run_of(x, [b, h], tokens).map(Slice::Bf16),
        }
    }

    fn rows(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let [nb, nh, nt, _] = self.shape();
        (0..nb).flat_map(move |b| (0..nh).flat_map(move |h| (0..nt).map(move |t| [b, h, t])))
    }

    /// Checks that every number is finite, and that it and its vector are within `limit`.
    ///
    /// # Errors
    /// [`Error::NonFinite`] or [`Error::TooLarge`] with the index of the first that is not; of a vector that is too long, of its
    /// largest number.
    pub fn check_magnitude(&self, what: &'static str, limit: Limit) -> Result<()> {
        // No vector of numbers up to this is too long.
        let surely = limit.number.min(limit.norm / (self.shape()[3] as f32).sqrt());
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
        let [_, nh, nt, _] = self.shape();
        (0..nh).all(|h| (0..nt).all(|t| self.row(a, h, t).same_bits(self.row(b, h, t))))
    }
}

fn newest_of<'a, T>(x: &ArrayView4<'a, T>) -> ArrayView4<'a, T> {
    let tokens = x.len_of(Axis(2));
    (*x).split_at(Axis(2), tokens - 1).1
}

/// The numbers at `[b, h, t]` of a tensor whose last stride is 1.
///
/// # Panics
/// When an index is out of bounds, or the last stride is not 1.
pub fn row_of<'a, T>(x: &ArrayView4<'a, T>, [b, h, t]: [usize; 3]) -> &'a [T] {
    let ((nb, nh, nt, d), strides) = (x.dim(), x.strides());
    assert!(b < nb && h < nh && t < nt && (strides[3] == 1 || d <= 1), "row [{b}, {h}, {t}] of {:?}", x.shape());
    let at = b as isize * strides[0] + h as isize * strides[1] + t as isize * strides[2];
    // ndarray's own slicing takes four times as long.
    // SAFETY: the indices are within the shape, all of which an `ArrayView4` may read while 'a lasts.
    unsafe { std::slice::from_raw_parts(x.as_ptr().offset(at), d) }
}

/// The numbers of several such rows, where they follow each other.
fn run_of<'a, T>(x: &ArrayView4<'a, T>, [b, h]: [usize; 2], tokens: Range<usize>) -> Option<&'a [T]> {
    let d = x.dim().3;
    if x.strides()[2] != d as isize {
        return None;
    }
    let (first, last) = (row_of(x, [b, h, tokens.start]), row_of(x, [b, h, tokens.end - 1]));
    // SAFETY: the first and the last row are within the tensor, and with this stride nothing is between the rows.
    Some(unsafe { std::slice::from_raw_parts(first.as_ptr(), (tokens.len() - 1) * d + last.len()) })
}

impl<'a> ViewMut<'a> {
    /// A view of a slice, for tests and for callers in Rust.
    ///
    /// # Panics
    /// When the slice's length is not the product of `shape`.
    pub fn of_slice(data: &'a mut [f32], shape: [usize; 4]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>());
        Self::F32(ArrayViewMut4::from_shape(shape, data).expect("the slice has the shape's length"))
    }

    /// The sizes, in the order of the strides.
    pub fn shape(&self) -> [usize; 4] {
        each_view!(ViewMut, self, x => x.dim().into())
    }

    /// Writes the row at index `[i, j, k]`, rounded to the tensor's dtype.
    ///
    /// # Panics
    /// When an index is out of bounds or `row` has another length than the last dimension.
    pub fn write_row(&mut self, at: [usize; 3], row: &[f32]) {
        match self {
            Self::F32(x) => row_mut(x, at).copy_from_slice(row),
            Self::F16(x) => row_mut(x, at).convert_from_f32_slice(row),
            Self::Bf16(x) => row_mut(x, at).convert_from_f32_slice(row),
        }
    }

    /// The tensor cut at its two first dimensions, in their order, into parts that can be written apart.
    pub fn split(self) -> Vec<ViewMut<'a>> {
        match self {
            Self::F32(x) => parts(x).map(ViewMut::F32).collect(),
            Self::F16(x) => parts(x).map(ViewMut::F16).collect(),
            Self::Bf16(x) => parts(x).map(ViewMut::Bf16).collect(),
        }
    }
}

fn row_mut<'a, T>(x: &'a mut ArrayViewMut4<'_, T>, [i, j, k]: [usize; 3]) -> &'a mut [T] {
    let x = x.view_mut().index_axis_move(Axis(0), i).index_axis_move(Axis(0), j).index_axis_move(Axis(0), k);
    x.into_slice().expect("the last stride is 1")
}

fn parts<T>(x: ArrayViewMut4<'_, T>) -> impl Iterator<Item = ArrayViewMut4<'_, T>> {
    along(x, Axis(0)).flat_map(|x| along(x, Axis(1)))
}

/// The tensor cut along an axis into parts of size 1.
fn along<T>(x: ArrayViewMut4<'_, T>, axis: Axis) -> impl Iterator<Item = ArrayViewMut4<'_, T>> {
    let mut rest = Some(x);
    std::iter::from_fn(move || {
        let x = rest.take().filter(|x| x.len_of(axis) > 0)?;
        let (first, others) = x.split_at(axis, 1);
        rest = Some(others);
        Some(first)
    })
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
        self.view.reborrow()
    }

    /// Who keeps its memory.
    pub fn owner(&self) -> &Arc<dyn Any + Send + Sync> {
        &self.owner
    }
}
