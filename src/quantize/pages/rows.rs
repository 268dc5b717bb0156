//! Exact rows as a page: in the model's own dtype.

#![forbid(unsafe_code)]

use crate::attend::{KeySegment, Scratch, ValueSegment, Weights};
use crate::kernels::Ahead;
use crate::linalg::{Mat, MatMut};
use crate::memory;
use crate::quantize::exact::PAGE;
use crate::tensor::Rows;

/// f32 in a cache line.
const LINE: usize = 16;

/// Takes the first of some tokens of `other`, up to a whole page.
pub(super) fn join(rows: &mut Rows, other: &Rows, tokens: &[usize]) -> usize {
    let taken = &tokens[..tokens.len().min(PAGE.saturating_sub(rows.len()))];
    if !taken.is_empty() {
        *rows = Rows::joined(rows, &other.take(taken));
    }
    taken.len()
}

impl KeySegment for Rows {
    fn granularity(&self) -> usize {
        1
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        self.slice(first..first + n).bytes()
    }

    fn scores(
        &self,
        q: Mat<'_>,
        first: usize,
        n: usize,
        out: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        (scratch.kernels.dot_rows)(q, self.slice(first..first + n), self.dim(), out, ahead);
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, scratch: &mut Scratch) {
        let d = self.dim();
        memory::resize(&mut scratch.buffer, LINE * d);
        // Rows of `out` lie far apart: each of its cache lines is written at once.
        for t in (0..n).step_by(LINE) {
            let m = LINE.min(n - t);
            let rows = &mut scratch.buffer[..m * d];
            self.slice(first + t..first + t + m).to_f32(rows);
            for c in 0..d {
                for (x, row) in out.row(c)[t..t + m].iter_mut().zip(rows.chunks_exact(d)) {
                    *x = row[c];
                }
            }
        }
    }
}

impl ValueSegment for Rows {
    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        self.slice(first..first + n).bytes()
    }

    fn accumulate(
        &self,
        weights: Weights<'_>,
        first: usize,
        n: usize,
        acc: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        (scratch.kernels.add_rows)(weights.of, self.slice(first..first + n), self.dim(), acc, ahead);
    }

    fn tile(&self, first: usize, n: usize, mut out: MatMut<'_>, _: &mut Scratch) {
        for t in 0..n {
            self.slice(first + t..first + t + 1).to_f32(&mut out.row(t)[..self.dim()]);
        }
    }
}
