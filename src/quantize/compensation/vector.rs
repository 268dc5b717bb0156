//! One vector, rounded number by number with compensation.

use std::ops::Range;

use super::{Factor, most_corrected};

/// A vector whose numbers are rounded one after the other, each error made up for by those behind it.
pub(in crate::quantize) struct Compensation<'a> {
    factor: &'a Factor,
    /// The numbers as they were.
    exact: Vec<f32>,
    x: &'a mut [f32],
    codes: &'a mut [u8],
    most: f32,
}

impl<'a> Compensation<'a> {
    /// Of `x`, in a method that holds numbers up to `limit`.
    pub(in crate::quantize) fn new(factor: &'a Factor, x: &'a mut [f32], codes: &'a mut [u8], limit: f32) -> Self {
        let exact = x.to_vec();
        let most = most_corrected(&exact, limit);
        Self { factor, exact, x, codes, most }
    }

    /// The next group of numbers, whose grid is that of what they are when their turn comes.
    pub(in crate::quantize) fn group(&mut self, range: Range<usize>) -> Compensated<'_> {
        for x in &mut self.x[range.clone()] {
            *x = x.clamp(-self.most, self.most);
        }
        Compensated {
            factor: self.factor,
            exact: &self.exact,
            x: &mut *self.x,
            codes: &mut *self.codes,
            most: self.most,
            range,
        }
    }
}

/// A group of numbers that share a grid, when their turn has come.
pub(in crate::quantize) struct Compensated<'a> {
    factor: &'a Factor,
    exact: &'a [f32],
    x: &'a mut [f32],
    codes: &'a mut [u8],
    most: f32,
    range: Range<usize>,
}

impl<'a> Compensated<'a> {
    /// The numbers before they are rounded.
    pub(in crate::quantize) fn numbers(&self) -> &[f32] {
        &self.x[self.range.clone()]
    }

    /// Codes them one after the other, and passes on what each code lacks. Returns what the numbers were before anything was made
    /// up for, and the codes.
    pub(in crate::quantize) fn encode(
        self,
        code: impl Fn(f32) -> u8,
        decode: impl Fn(u8) -> f32,
    ) -> (&'a [f32], &'a [u8]) {
        let Self { factor, exact, x, codes, most, range } = self;
        for k in range.clone() {
            x[k] = x[k].clamp(-most, most);
            codes[k] = code(x[k]);
            let error = x[k] - decode(codes[k]);
            factor.pass_on(k, error, &mut x[k + 1..]);
        }
        (&exact[range.clone()], &codes[range])
    }

    /// Codes them all at once, and passes nothing on.
    pub(in crate::quantize) fn encode_apart<T>(self, encode: impl FnOnce(&[f32], &mut [u8]) -> T) -> T {
        encode(&self.x[self.range.clone()], &mut self.codes[self.range])
    }
}
