//! Exact rows: the model's own numbers, appended at the end and dropped at the front.

#![forbid(unsafe_code)]

use std::ops::Range;

use half::{bf16, f16};

use super::{Dtype, Slice};
use crate::memory;

enum Buffer {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Clone for Buffer {
    fn clone(&self) -> Self {
        match self {
            Self::F32(x) => Self::F32(memory::copied(x)),
            Self::F16(x) => Self::F16(memory::copied(x)),
            Self::Bf16(x) => Self::Bf16(memory::copied(x)),
        }
    }
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
    dim: u32,
    /// Rows at the front that are dropped but not yet reclaimed.
    dropped: u32,
    /// How many of them were dropped before [`Self::hold`]; those after are not reclaimed.
    held: Option<u32>,
}

/// How many rows there were, and in how much memory, when [`Rows::hold`] was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    rows: usize,
    capacity: usize,
}

/// Rows that a growing matrix of some size takes beyond its need: enough to amortise, small beside a page.
const SPARE_ROWS: usize = 16;

impl Rows {
    /// No rows of `dim` numbers.
    pub fn new(dtype: Dtype, dim: usize) -> Self {
        let data = match dtype {
            Dtype::F32 => Buffer::F32(Vec::new()),
            Dtype::F16 => Buffer::F16(Vec::new()),
            Dtype::Bf16 => Buffer::Bf16(Vec::new()),
        };
        Self { data, dim: dim as u32, dropped: 0, held: None }
    }

    /// What the numbers are.
    pub fn dtype(&self) -> Dtype {
        match self.data {
            Buffer::F32(_) => Dtype::F32,
            Buffer::F16(_) => Dtype::F16,
            Buffer::Bf16(_) => Dtype::Bf16,
        }
    }

    /// Rows held.
    pub fn len(&self) -> usize {
        each_buffer!(&self.data, x => x.len()) / self.dim() - self.dropped()
    }

    /// Whether no row is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Numbers in a row.
    pub fn dim(&self) -> usize {
        self.dim as usize
    }

    fn dropped(&self) -> usize {
        self.dropped as usize
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        each_buffer!(&self.data, x => x.capacity() * size_of_element(x))
    }

    /// Bytes that were allocated when [`Self::hold`] was called.
    pub fn bytes_when(&self, held: Held) -> usize {
        each_buffer!(&self.data, x => held.capacity * size_of_element(x))
    }

    /// The numbers of rows `range`, one row after the other.
    pub fn slice(&self, range: Range<usize>) -> Slice<'_> {
        let at = (range.start + self.dropped()) * self.dim()..(range.end + self.dropped()) * self.dim();
        match &self.data {
            Buffer::F32(x) => Slice::F32(&x[at]),
            Buffer::F16(x) => Slice::F16(&x[at]),
            Buffer::Bf16(x) => Slice::Bf16(&x[at]),
        }
    }

    /// Makes room for `n` more rows; amortised over many small calls.
    pub fn reserve(&mut self, n: usize) {
        let free = self.held.unwrap_or(self.dropped) as usize;
        let dim = self.dim();
        let need = self.len() + self.dropped() - free + n;
        each_buffer!(&mut self.data, x => {
            if x.len() + n * dim > x.capacity() {
                if free > 0 {
                    x.drain(..free * dim);
                    self.dropped -= free as u32;
                    self.held = self.held.map(|_| 0);
                }
                let rows = need + (need / 4).clamp(1, SPARE_ROWS);
                if need * dim > x.capacity() {
                    memory::reserve(x, rows * dim - x.len());
                }
            }
        });
    }

    /// Appends rows; `rows` holds a whole number of them, in this matrix's dtype.
    ///
    /// # Panics
    /// When the dtype differs (checked at the boundary).
    pub fn extend(&mut self, rows: Slice<'_>) {
        self.reserve(rows.len() / self.dim());
        match (&mut self.data, rows) {
            (Buffer::F32(x), Slice::F32(r)) => x.extend_from_slice(r),
            (Buffer::F16(x), Slice::F16(r)) => x.extend_from_slice(r),
            (Buffer::Bf16(x), Slice::Bf16(r)) => x.extend_from_slice(r),
            _ => panic!("rows of another dtype"),
        }
    }

    /// Appends a row, rounded to this matrix's dtype.
    pub fn push(&mut self, row: &[f32]) {
        self.reserve(1);
        match &mut self.data {
            Buffer::F32(x) => x.extend_from_slice(row),
            Buffer::F16(x) => x.extend(row.iter().copied().map(f16::from_f32)),
            Buffer::Bf16(x) => x.extend(row.iter().copied().map(bf16::from_f32)),
        }
    }

    /// Drops the `n` oldest rows and gives back memory that is no longer of use.
    pub fn drop_front(&mut self, n: usize) {
        self.dropped += n as u32;
        if self.held.is_none() {
            self.reclaim();
        }
    }

    fn reclaim(&mut self) {
        let (dim, held, dropped) = (self.dim(), self.len(), self.dropped());
        each_buffer!(&mut self.data, x => {
            let wasteful = x.capacity() > (held + held / 2 + 2 * SPARE_ROWS) * dim;
            if wasteful || dropped > held + SPARE_ROWS {
                x.drain(..dropped * dim);
                self.dropped = 0;
            }
            if wasteful {
                x.shrink_to((held + SPARE_ROWS) * dim);
            }
        });
    }

    /// From now on, until [`Self::release`], what is dropped at the front or appended can be undone by [`Self::restore`].
    pub fn hold(&mut self) -> Held {
        self.held = Some(self.dropped);
        Held { rows: self.len(), capacity: self.capacity() }
    }

    /// Gives back the memory of what was dropped since [`Self::hold`].
    pub fn release(&mut self) {
        if self.held.take().is_some_and(|before| before < self.dropped) {
            self.reclaim();
        }
    }

    /// Undoes what was dropped at the front and appended since [`Self::hold`].
    pub fn restore(&mut self, Held { rows, capacity }: Held) {
        self.dropped = self.held.take().unwrap_or(self.dropped);
        self.truncate(rows);
        each_buffer!(&mut self.data, x => if x.capacity() > capacity { x.shrink_to(capacity) });
    }

    /// Numbers that there is room for.
    fn capacity(&self) -> usize {
        each_buffer!(&self.data, x => x.capacity())
    }

    /// Keeps the `n` oldest rows.
    pub fn truncate(&mut self, n: usize) {
        let n = (self.dropped() + n) * self.dim();
        each_buffer!(&mut self.data, x => x.truncate(n));
    }

    /// Rows `range` as a matrix of their own, without spare room.
    #[must_use]
    pub fn copy(&self, range: Range<usize>) -> Self {
        let mut rows = Self { data: self.empty_buffer(range.len()), dim: self.dim, dropped: 0, held: None };
        rows.extend(self.slice(range));
        rows
    }

    /// Some rows as a matrix of their own, without spare room.
    #[must_use]
    pub fn take(&self, rows: &[usize]) -> Self {
        let mut taken = Self { data: self.empty_buffer(rows.len()), dim: self.dim, dropped: 0, held: None };
        for &row in rows {
            taken.extend(self.slice(row..row + 1));
        }
        taken
    }

    /// Two matrices of a dtype, one after the other, without spare room.
    #[must_use]
    pub fn joined(first: &Self, second: &Self) -> Self {
        let rows = first.len() + second.len();
        let mut all = Self { data: first.empty_buffer(rows), dim: first.dim, dropped: 0, held: None };
        for rows in [first, second] {
            all.extend(rows.slice(0..rows.len()));
        }
        all
    }

    fn empty_buffer(&self, rows: usize) -> Buffer {
        match &self.data {
            Buffer::F32(_) => Buffer::F32(memory::with_capacity(rows * self.dim())),
            Buffer::F16(_) => Buffer::F16(memory::with_capacity(rows * self.dim())),
            Buffer::Bf16(_) => Buffer::Bf16(memory::with_capacity(rows * self.dim())),
        }
    }

    /// Rows `range` as f32.
    pub fn to_f32(&self, range: Range<usize>) -> Vec<f32> {
        let mut out = memory::zeros(range.len() * self.dim());
        self.slice(range).to_f32(&mut out);
        out
    }

    /// Puts `rows` before the ones held.
    pub fn prepend(&mut self, rows: Slice<'_>) {
        let mut all = Self {
            data: self.empty_buffer(rows.len() / self.dim() + self.len()),
            dim: self.dim,
            dropped: 0,
            held: None,
        };
        all.extend(rows);
        all.extend(self.slice(0..self.len()));
        *self = all;
    }
}

fn size_of_element<T>(_: &[T]) -> usize {
    size_of::<T>()
}
