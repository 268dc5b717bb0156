//! Codings of tokens with a grid a token and group of channels, perhaps in other coordinates.
//!
//! Some have a scale and a zero-point, others only a scale: `x' = scale (code - origin)`. Each coding is in its method's file.

#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::sync::Arc;

use half::f16;

use super::compensation::{Compensated, Compensation};
use super::pages::Outliers;
use super::{Factor, f16_limit};
use crate::format::Levels;
use crate::linalg::Map;
use crate::memory;
use crate::tensor::Rows;

/// Tokens for which a page has room: whole blocks of codes, and few enough that their sums are exact.
pub(super) const PAGE: usize = 128;

/// How the numbers of a token become codes.
pub(super) trait TokenCoding: Debug + Send + Sync {
    /// Bits of a code.
    fn bits(&self) -> u8;

    /// What codes stand for, if not for themselves.
    fn levels(&self) -> Option<&Levels> {
        None
    }

    /// Channels that share a grid; 0: all.
    fn group(&self) -> usize;

    /// The code that stands for 0 where no zero-point is stored; `None`: one is.
    fn origin(&self) -> Option<f32> {
        None
    }

    /// The largest magnitude in the page's coordinates.
    fn longest(&self) -> f32 {
        f16_limit()
    }

    /// Places for outliers in a vector of `dim` numbers.
    fn places(&self, _dim: usize) -> usize {
        0
    }

    /// Factors of the channels of a block `x` of vectors of `dim` numbers, which are divided by them first; empty: they have none.
    fn factors(&self, _x: &[f32], _dim: usize) -> Vec<f16> {
        Vec::new()
    }

    /// The codes of a group, its scale and its zero-point.
    fn encode(&self, x: &[f32], codes: &mut [u8]) -> (f16, f16);

    /// The same, where roundings are made up for; a coding that knows nothing of that rounds as ever.
    fn encode_compensated(&self, group: Compensated<'_>) -> (f16, f16) {
        group.encode_apart(|x, codes| self.encode(x, codes))
    }

    /// Codes and grids of a token, and the channels of outliers with what their codes lack.
    fn encode_token(&self, x: &[f32], codes: &mut [u8], grids: &mut [(f16, f16)]) -> Vec<(u8, f16)> {
        let group = if self.group() == 0 { x.len() } else { self.group() };
        for ((x, codes), grid) in x.chunks(group).zip(codes.chunks_mut(group)).zip(grids) {
            *grid = self.encode(x, codes);
        }
        Vec::new()
    }

    /// The tokens `x` of `dim` numbers, in groups of `group`; with a `compensation` roundings are made up for.
    fn encode_all(&self, x: &mut [f32], [dim, group]: [usize; 2], compensation: Option<&Factor>) -> Encoded {
        let factors = self.factors(x, dim);
        let (tokens, groups) = (x.len() / dim, dim.div_ceil(group));
        let mut out = Encoded {
            codes: memory::zeros(x.len()),
            grids: memory::filled((f16::ZERO, f16::ZERO), tokens * groups),
            outliers: Vec::new(),
            factors,
        };
        let places = out.codes.chunks_exact_mut(dim).zip(out.grids.chunks_exact_mut(groups));
        for (x, (codes, grids)) in x.chunks_exact_mut(dim).zip(places) {
            x.iter_mut().zip(&out.factors).for_each(|(x, factor)| *x /= factor.to_f32());
            let Some(factor) = compensation else {
                out.outliers.push(self.encode_token(x, codes, grids));
                continue;
            };
            let mut compensation = Compensation::new(factor, x, codes, self.longest());
            for (first, grid) in (0..dim).step_by(group).zip(grids) {
                *grid = self.encode_compensated(compensation.group(first..dim.min(first + group)));
            }
            out.outliers.push(Vec::new());
        }
        out
    }
}

/// Encoded tokens.
pub(super) struct Encoded {
    /// `[tokens, dim]`.
    pub(super) codes: Vec<u8>,
    /// Scale and zero-point of every group, `[tokens, groups]`.
    pub(super) grids: Vec<(f16, f16)>,
    /// Of every token the channels of outliers, with what their codes lack.
    pub(super) outliers: Vec<Vec<(u8, f16)>>,
    /// Factors of the channels, if they have any.
    pub(super) factors: Vec<f16>,
}

/// A coding whose groups store a scale alone, which is what pages of keys have room for.
pub(super) trait ScaledCoding: TokenCoding {}

/// A coding of vectors of `dim` numbers, perhaps in other coordinates. Each page has one: it is small.
#[derive(Clone, Debug)]
pub(super) struct Format {
    coding: Arc<dyn TokenCoding>,
    map: Option<Arc<Map>>,
    /// Numbers of a vector in those coordinates.
    dim: u32,
    group: u32,
}

impl Format {
    pub(super) fn new(coding: Arc<dyn TokenCoding>, map: Option<Arc<Map>>, dim: usize) -> Self {
        let dim = map.as_ref().map_or(dim, |map| map.dim(dim));
        let group = if coding.group() == 0 { dim } else { coding.group().min(dim) };
        Self { coding, map, dim: dim as u32, group: group as u32 }
    }

    pub(super) fn dim(&self) -> usize {
        self.dim as usize
    }

    pub(super) fn bits(&self) -> u8 {
        self.coding.bits()
    }

    /// What codes stand for, if not for themselves.
    pub(super) fn levels(&self) -> Option<&Levels> {
        self.coding.levels()
    }

    /// Where the outliers of a page of so many tokens lie.
    pub(super) fn outliers(&self, tokens: usize) -> Outliers {
        Outliers { each: self.coding.places(self.dim()), tokens }
    }

    /// Numbers that are stored for a group: its scale, and perhaps its zero-point.
    pub(super) fn grid_numbers(&self) -> usize {
        1 + usize::from(self.coding.origin().is_none())
    }

    /// The code that stands for 0, where no zero-point is stored.
    pub(super) fn origin(&self) -> f32 {
        self.coding.origin().unwrap_or(0.0)
    }

    /// Channels that share a scale.
    pub(super) fn group(&self) -> usize {
        self.group as usize
    }

    pub(super) fn groups(&self) -> usize {
        self.dim().div_ceil(self.group())
    }

    pub(super) fn map(&self) -> Option<&Arc<Map>> {
        self.map.as_ref()
    }

    /// The `n` oldest of `rows`; with a `compensation` roundings are made up for.
    pub(super) fn encode(&self, rows: &Rows, n: usize, compensation: Option<&Factor>) -> Encoded {
        let mut x = rows.to_f32(0..n);
        if let Some(map) = &self.map {
            x = map.apply_rows(&x, rows.dim());
        }
        self.coding.encode_all(&mut x, [self.dim(), self.group()], compensation)
    }
}
