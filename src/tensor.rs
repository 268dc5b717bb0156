//! Borrowed views over f32 / f16 / bf16 memory with strides, and growable matrices of rows.
//!
//! Views are the only place where memory of other owners (torch) is read; every access goes through
//! a bounds-checked row.

use std::marker::PhantomData;
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

impl Slice<'_> {
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

    /// Converts all numbers to f32 into `out`, which must have the same length.
    pub fn to_f32(self, out: &mut [f32]) {
        match self {
            Self::F32(x) => out.copy_from_slice(x),
            Self::F16(x) => x.convert_to_f32_slice(out),
            Self::Bf16(x) => x.convert_to_f32_slice(out),
        }
    }

    /// Index and value of the first number that is NaN or beyond `limit` in magnitude.
    fn first_beyond(self, limit: f32) -> Option<(usize, f32)> {
        // Magnitudes order as their bits do, NaN and infinity last: the largest says whether to search at all.
        let ok = match self {
            Self::F32(x) => x.iter().map(|v| v.to_bits() & 0x7fff_ffff).max() <= Some(limit.to_bits()),
            Self::F16(x) => x.iter().map(|v| v.to_bits() & 0x7fff).max() <= Some(f16::MAX.to_bits()),
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

    fn same_bits(self, other: Self) -> bool {
        match (self, other) {
            (Self::F32(a), Self::F32(b)) => a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            (Self::F16(a), Self::F16(b)) => a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            (Self::Bf16(a), Self::Bf16(b)) => a.iter().zip(b).all(|(x, y)| x.to_bits() == y.to_bits()),
            _ => false,
        }
    }
}

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

    /// Checks that every number is finite and at most `limit` in magnitude.
    ///
    /// # Errors
    /// [`Error::NonFinite`] or [`Error::TooLarge`] with the index of the first that is not.
    pub fn check_magnitude(&self, what: &'static str, limit: f32) -> Result<()> {
        for [b, h, t] in self.rows() {
            if let Some((c, x)) = self.row(b, h, t).first_beyond(limit) {
                let at = [b, h, t, c];
                let finite = x.is_finite();
                return Err(if finite {
                    Error::TooLarge { what, limit: limit as u64, at }
                } else {
                    Error::NonFinite { what, at }
                });
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

#[derive(Clone)]
enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

macro_rules! each_buffer {
    ($buffer:expr, $x:ident => $body:expr) => {
        match $buffer {
            Buffer::F32($x) => $body,
            Buffer::F16($x) => $body,
            Buffer::Bf16($x) => $body,
        }
    };
}

/// A growable matrix of exact rows in the model's dtype: appended at the end, dropped at the front.
#[derive(Clone)]
pub struct Rows {
    data: Buffer,
    dim: usize,
    /// Rows at the front that are dropped but not yet reclaimed.
    dropped: usize,
}

/// Rows that a growing matrix takes beyond its need: enough to amortise, small beside a page.
const SPARE_ROWS: usize = 16;

impl Rows {
    /// No rows of `dim` numbers.
    pub fn new(dtype: Dtype, dim: usize) -> Self {
        let data = match dtype {
            Dtype::F32 => Buffer::F32(Vec::new()),
            Dtype::F16 => Buffer::F16(Vec::new()),
            Dtype::Bf16 => Buffer::Bf16(Vec::new()),
        };
        Self { data, dim, dropped: 0 }
    }

    /// Rows held.
    pub fn len(&self) -> usize {
        each_buffer!(&self.data, x => x.len()) / self.dim - self.dropped
    }

    /// Whether no row is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Numbers in a row.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        each_buffer!(&self.data, x => x.capacity() * size_of_element(x))
    }

    /// The numbers of rows `range`, one row after the other.
    pub fn slice(&self, range: Range<usize>) -> Slice<'_> {
        let at = (range.start + self.dropped) * self.dim..(range.end + self.dropped) * self.dim;
        match &self.data {
            Buffer::F32(x) => Slice::F32(&x[at]),
            Buffer::F16(x) => Slice::F16(&x[at]),
            Buffer::Bf16(x) => Slice::Bf16(&x[at]),
        }
    }

    /// Makes room for `n` more rows; amortised over many small calls.
    pub fn reserve(&mut self, n: usize) {
        let need = self.len() + n;
        each_buffer!(&mut self.data, x => {
            if x.len() + n * self.dim > x.capacity() {
                if self.dropped > 0 {
                    x.drain(..self.dropped * self.dim);
                    self.dropped = 0;
                }
                let rows = need + SPARE_ROWS + need / 8;
                if need * self.dim > x.capacity() {
                    x.reserve_exact(rows * self.dim - x.len());
                }
            }
        });
    }

    /// Appends rows; `rows` holds a whole number of them, in this matrix's dtype.
    ///
    /// # Panics
    /// When the dtype differs (checked at the boundary).
    pub fn extend(&mut self, rows: Slice<'_>) {
        self.reserve(rows.len() / self.dim);
        match (&mut self.data, rows) {
            (Buffer::F32(x), Slice::F32(r)) => x.extend_from_slice(r),
            (Buffer::F16(x), Slice::F16(r)) => x.extend_from_slice(r),
            (Buffer::Bf16(x), Slice::Bf16(r)) => x.extend_from_slice(r),
            _ => panic!("rows of another dtype"),
        }
    }

    /// Drops the `n` oldest rows and gives back memory that is no longer of use.
    pub fn drop_front(&mut self, n: usize) {
        self.dropped += n;
        let held = self.len();
        each_buffer!(&mut self.data, x => {
            let wasteful = x.capacity() > (2 * held + 2 * SPARE_ROWS) * self.dim;
            if wasteful || self.dropped > held + SPARE_ROWS {
                x.drain(..self.dropped * self.dim);
                self.dropped = 0;
            }
            if wasteful {
                x.shrink_to((held + SPARE_ROWS) * self.dim);
            }
        });
    }

    /// Keeps the `n` oldest rows.
    pub fn truncate(&mut self, n: usize) {
        let n = (self.dropped + n) * self.dim;
        each_buffer!(&mut self.data, x => x.truncate(n));
    }

    /// The `n` oldest rows as a matrix of their own, without spare room.
    #[must_use]
    pub fn copy_front(&self, n: usize) -> Self {
        let mut rows = Self { data: self.empty_buffer(n), dim: self.dim, dropped: 0 };
        rows.extend(self.slice(0..n));
        rows
    }

    fn empty_buffer(&self, rows: usize) -> Buffer {
        match &self.data {
            Buffer::F32(_) => Buffer::F32(Vec::with_capacity(rows * self.dim)),
            Buffer::F16(_) => Buffer::F16(Vec::with_capacity(rows * self.dim)),
            Buffer::Bf16(_) => Buffer::Bf16(Vec::with_capacity(rows * self.dim)),
        }
    }

    /// Rows `range` as f32.
    pub fn to_f32(&self, range: Range<usize>) -> Vec<f32> {
        let mut out = vec![0.0; range.len() * self.dim];
        self.slice(range).to_f32(&mut out);
        out
    }

    /// Puts `rows` before the ones held.
    pub fn prepend(&mut self, rows: Slice<'_>) {
        let mut all = Self { data: self.empty_buffer(rows.len() / self.dim + self.len()), dim: self.dim, dropped: 0 };
        all.extend(rows);
        all.extend(self.slice(0..self.len()));
        *self = all;
    }
}

fn size_of_element<T>(_: &[T]) -> usize {
    size_of::<T>()
}
