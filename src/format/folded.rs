//! Queries or weights with a part's scales folded in, as integers.
//!
//! Packed numbers are small integers on a grid, `x_o = scale_o c_o + zero_o`. With `m` in the middle of the codes,
//!
//! ```text
//! sum_o w_o x_o = sum_o (w_o scale_o) (c_o - m) + sum_o w_o (zero_o + m scale_o)
//!               = step sum_o n_o (c_o - m)      + sum_o w_o (zero_o + m scale_o)
//!               = step sum_o n_o c_o + offset,   offset = sum_o w_o (zero_o + m scale_o) - step m sum_o n_o
//! ```
//!
//! where `n_o = round(w_o scale_o / step)` are words of 16 bits and `step = max |w_o scale_o| / N`. The sum of integers is
//! exact. Rounding `w_o scale_o` moves the result by about `step / sqrt(12) |c - m|`, while rounding to codes shifted it by
//! about `|w scale| / sqrt(12)`, and `|w scale| >= N step`. So the ratio of the two errors is at most `|c - m| / N`: for
//! `N = 32767` and 128 codes of 8 bits about 0.025, of 4 bits 0.002, and far less as soon as several `w_o` matter.
//!
//! A logit's error is absolute, and large logits have a large step: where [`rounding_error`] is beyond what a caller
//! tolerates, what rounding left over becomes words too, `2 N` times finer, whose sums are added.

#![forbid(unsafe_code)]

use super::packed::Packed;
use crate::memory;

/// Rows of integers, one a part and query head; and the buffers to make them, used again and again.
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
    /// Its inverse.
    pub inverse: Vec<f32>,
    /// What a row adds to all sums.
    pub offset: Vec<f32>,
    /// `w scale` before rounding, a row a part and query head.
    pub products: Vec<f32>,
}

impl Folded {
    /// Room for `heads` rows a part of `packed` and as many for what rounding one part leaves over; zeros where no outer row
    /// is in use.
    pub fn reset(&mut self, heads: usize, packed: &Packed<'_>) {
        self.rows = (packed.parts + 1) * heads;
        self.stride = packed.padded_outer();
        if packed.outer < self.stride {
            self.words.clear();
        }
        memory::resize(&mut self.words, self.rows * self.stride);
        memory::resize(&mut self.step, self.rows);
        memory::resize(&mut self.inverse, self.rows);
        memory::resize(&mut self.offset, self.rows);
        let products = packed.parts * heads * packed.outer;
        let products = products.max(self.products.len());
        memory::resize(&mut self.products, products);
    }
}

/// The largest word `N` with which `outer` products with codes up to `largest` cannot overflow their sum of 32 bits.
pub fn largest_word(largest: u8, outer: usize) -> f32 {
    (i64::from(i32::MAX) / (i64::from(largest) * outer.max(1) as i64)).min(i64::from(i16::MAX)) as f32
}

/// The middle of codes up to `largest`.
pub fn middle(largest: u8) -> f32 {
    f32::from(largest) / 2.0
}

/// How much finer the words of what rounding left over are: at most half a step becomes at most `N`.
pub const FINER: f32 = 65534.0;

/// What rounding with `step` adds to sums over `outer` codes up to `largest`, root mean square: for codes that are spread
/// evenly, `step / sqrt(12)` times their `m / sqrt(3)` times `sqrt(outer)`.
pub fn rounding_error(step: f32, largest: u8, outer: usize) -> f32 {
    step * middle(largest) * (outer as f32).sqrt() / 6.0
}

/// Step, and its inverse, for products of at most `max` in magnitude; below 1e-30, whose inverse would not be finite, 0.
pub fn step_of(max: f32, largest_word: f32) -> (f32, f32) {
    if max < 1e-30 { (0.0, 0.0) } else { (max / largest_word, largest_word / max) }
}
