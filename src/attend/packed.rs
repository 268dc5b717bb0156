//! Packed numbers as the inner loops see them: parts of codes, each with a grid.

#![forbid(unsafe_code)]

use std::ops::Range;

use half::f16;
use half::slice::HalfBitsSliceExt;

use super::codes::{Codes, blocks, padded_outer};

/// Parts of packed numbers `x_i[o, l] = scale_i[o] code_i[o, l] + zero_i[o]`: a grid a part and outer row.
///
/// Part `i` of keys is a group of tokens (outer = channels, lanes = tokens), part `i` of values a group of channels
/// (outer = tokens, lanes = channels). Either lie in one run of words.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    /// All parts' codes and grids.
    pub words: &'a [u16],
    /// Bits of a code.
    pub bits: u8,
    /// Outer rows in use.
    pub outer: usize,
    /// Outer rows of codes before the ones in use; those, and ones behind, are not read.
    pub lead: usize,
    /// Parts.
    pub parts: usize,
    /// Lanes of a part; the last one may have fewer.
    pub width: usize,
    /// Lanes of a row of codes.
    pub lanes: usize,
    /// Distance of the parts' codes in `words`; 0 where they share their rows.
    pub codes_step: usize,
    /// Where the first part's scales begin in `words`.
    pub scales_at: usize,
    /// Where its zero-points do.
    pub zeros_at: usize,
    /// Distance of the parts' grids in `words`.
    pub grids_step: usize,
    /// The error (root mean square) that rounding to integers may add to a sum; where it would be more, rounding is finer.
    pub tolerance: f32,
}

/// Scales and zero-points, one an outer row.
#[derive(Clone, Copy)]
pub struct Grid<'a> {
    /// Factors of codes.
    pub scale: &'a [f16],
    /// What code 0 stands for.
    pub zero: &'a [f16],
}

impl<'a> Packed<'a> {
    /// Codes of part `i`, and which of their lanes are its.
    #[inline]
    pub fn codes(&self, i: usize) -> (Codes<'a>, Range<usize>) {
        let blocks = blocks(self.bits, self.lead + self.outer);
        let codes = Codes::new(self.bits, self.lanes, blocks, &self.words[i * self.codes_step..]);
        let first = if self.codes_step == 0 { i * self.width } else { 0 };
        (codes, first..(first + self.width).min(self.lanes))
    }

    /// The grid of part `i`, for the outer rows in use.
    #[inline]
    pub fn grid(&self, i: usize) -> Grid<'a> {
        let numbers = |at: usize| self.words[at + i * self.grids_step..][..self.outer].reinterpret_cast();
        Grid { scale: numbers(self.scales_at), zero: numbers(self.zeros_at) }
    }

    /// Outer rows of the codes: whole blocks around the ones in use.
    pub fn padded_outer(&self) -> usize {
        padded_outer(self.bits, self.lead + self.outer)
    }

    /// Columns of all parts side by side.
    pub fn columns(&self) -> usize {
        if self.codes_step == 0 { self.lanes } else { self.parts * self.width }
    }
}
