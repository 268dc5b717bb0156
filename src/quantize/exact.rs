//! Exact: rows in the model's own dtype, in pages only so that they can be shared.

use crate::attend::{KeySegment, Scratch, ValueSegment};
use crate::tensor::Rows;

/// Tokens of a page: small, so that the copy of an open tail that every beam makes is small.
pub(super) const PAGE: usize = 64;

/// Whole pages are due.
pub(super) fn due(n: usize) -> usize {
    n / PAGE * PAGE
}

pub(super) fn seal(rows: &Rows, n: usize) -> (Rows, usize) {
    let n = n.min(PAGE);
    (rows.copy_front(n), n)
}

impl KeySegment for Rows {
    fn unit(&self) -> usize {
        1
    }

    fn scores(&self, q: &[f32], first: usize, n: usize, out: &mut [f32], stride: usize, scratch: &mut Scratch) {
        (scratch.kernels.dot_rows)(q, self.slice(first..first + n), self.dim(), out, stride);
    }

    fn tile(&self, first: usize, n: usize, out: &mut [f32], stride: usize, scratch: &mut Scratch) {
        let d = self.dim();
        let row = &mut scratch.folded;
        row.resize(d, 0.0);
        for t in 0..n {
            self.slice(first + t..first + t + 1).to_f32(row);
            for (c, x) in row.iter().enumerate() {
                out[c * stride + t] = *x;
            }
        }
    }
}

impl ValueSegment for Rows {
    fn accumulate(
        &self,
        w: &[f32],
        w_stride: usize,
        first: usize,
        n: usize,
        acc: &mut [f32],
        acc_stride: usize,
        scratch: &mut Scratch,
    ) {
        (scratch.kernels.add_rows)(w, w_stride, self.slice(first..first + n), self.dim(), acc, acc_stride);
    }

    fn tile(&self, first: usize, n: usize, out: &mut [f32], stride: usize, _: &mut Scratch) {
        let d = self.dim();
        for t in 0..n {
            self.slice(first + t..first + t + 1).to_f32(&mut out[t * stride..][..d]);
        }
    }
}
