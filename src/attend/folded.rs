//! Queries or weights with a page's scales folded in, as integers.
//!
//! Codes are small integers `c_o` on a grid `x_o = scale_o c_o + zero_o`, so
//!
//! ```text
//! sum_o w_o x_o = sum_o (w_o scale_o) c_o + sum_o w_o zero_o = step sum_o n_o c_o + offset
//! ```
//!
//! where `n_o = round(w_o scale_o / step)` are words of 16 bits and `step = max |w_o scale_o| / N`. The sum of integers is
//! exact. Rounding `w_o scale_o` moves the result by about `step / sqrt(12) |c|`, while rounding to codes moved `x` by
//! about `|w scale| / sqrt(12)`, and `|w scale| >= N step`. So the ratio of the two errors is at most `|c| / N`, as a rule
//! `|c| / (N sqrt(outer))` times a few: for N = 32767, codes of 8 bits and 128 of them at most 0.05, for 4 bits 0.003.

#![forbid(unsafe_code)]

use super::codes::padded_outer;

/// Rows of integers, one a query head; and the buffers to make them, used again and again.
#[derive(Default)]
pub struct Folded {
    /// `[rows, stride]`.
    pub words: Vec<i16>,
    /// Rows.
    pub rows: usize,
    /// Distance of rows: the outer rows of the codes, in whole blocks.
    pub stride: usize,
    /// What 1 in a row is worth.
    pub step: Vec<f32>,
    /// What a row adds to all sums.
    pub offset: Vec<f32>,
    /// `w scale` of all rows, before rounding.
    pub(super) products: Vec<f32>,
}

impl Folded {
    /// Zeros: `rows` rows for `outer` codes of `bits` bits.
    pub fn reset(&mut self, rows: usize, bits: u8, outer: usize) {
        self.rows = rows;
        self.stride = padded_outer(bits, outer);
        self.words.clear();
        self.words.resize(rows * self.stride, 0);
        self.step.clear();
        self.step.resize(rows, 0.0);
        self.offset.clear();
        self.offset.resize(rows, 0.0);
    }

    /// The largest word `N` with which `outer` products with codes of `bits` bits cannot overflow their sum of 32 bits.
    pub fn largest_word(bits: u8, outer: usize) -> f32 {
        let largest_code = i64::from(u8::MAX >> (8 - bits));
        (i64::from(i32::MAX) / (largest_code * outer.max(1) as i64)).min(i64::from(i16::MAX)) as f32
    }
}

/// Below this a largest product counts as 0: its inverse would not be finite.
pub(super) const SMALLEST: f32 = 1e-30;

/// Step, and its inverse, for products of at most `max` in magnitude.
pub(super) fn step_of(max: f32, largest_word: f32) -> (f32, f32) {
    if max < SMALLEST { (0.0, 0.0) } else { (max / largest_word, largest_word / max) }
}
