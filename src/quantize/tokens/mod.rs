//! Pages of tokens with a grid a token and group of channels, perhaps in other coordinates.
//!
//! KIVI's values have a scale and a zero-point, blocks and rotated tokens only a scale: `x' = scale (code - origin)`.

mod keys;
mod values;

use std::sync::Arc;

use half::f16;

pub use keys::TokenKeys;
pub use values::TokenValues;

use super::{Block, Kivi, Method, Plan, Rotated, block, levels};
use crate::attend::Basis;
use crate::tensor::Rows;

/// Tokens for which a page has room: whole blocks of codes, and few enough that their sums are exact.
const PAGE: usize = 128;

/// How tokens are coded.
#[derive(Clone, Debug, PartialEq)]
enum Coding {
    Kivi(Kivi),
    Block(Block),
    Rotated(Rotated, Arc<Basis>),
}

/// A coding of vectors of `dim` numbers.
#[derive(Clone, Debug, PartialEq)]
struct Format {
    coding: Coding,
    dim: usize,
}

impl Format {
    /// # Panics
    /// When the method has no such pages.
    fn new(method: &Method, plan: &mut Plan, dim: usize) -> Self {
        let coding = match method {
            Method::Kivi(kivi) => Coding::Kivi(kivi.clone()),
            Method::Block(block) => Coding::Block(block.clone()),
            Method::Rotated(rotated) => {
                Coding::Rotated(rotated.clone(), plan.basis(|| Basis::hadamard(dim, rotated.seed)))
            }
            _ => panic!("{method:?} has no pages with a grid a token"),
        };
        Self { coding, dim }
    }

    fn bits(&self) -> u8 {
        match &self.coding {
            Coding::Kivi(kivi) => kivi.bits,
            Coding::Block(block) => block.bits,
            Coding::Rotated(rotated, _) => rotated.bits,
        }
    }

    /// Numbers that are stored for a group: its scale, and perhaps its zero-point.
    fn grid_numbers(&self) -> usize {
        if let Coding::Kivi(_) = self.coding { 2 } else { 1 }
    }

    /// The code that stands for 0, where no zero-point is stored.
    fn origin(&self) -> f32 {
        match &self.coding {
            Coding::Kivi(_) => 0.0,
            Coding::Block(block) => block.origin(),
            Coding::Rotated(rotated, _) => levels(rotated.bits) / 2.0,
        }
    }

    /// Channels that share a scale.
    fn group(&self) -> usize {
        let group = match &self.coding {
            Coding::Kivi(kivi) => kivi.group,
            Coding::Block(_) => block::SIZE,
            Coding::Rotated(rotated, _) => rotated.group,
        };
        if group == 0 { self.dim } else { group.min(self.dim) }
    }

    fn groups(&self) -> usize {
        self.dim.div_ceil(self.group())
    }

    fn basis(&self) -> Option<&Arc<Basis>> {
        match &self.coding {
            Coding::Kivi(_) | Coding::Block(_) => None,
            Coding::Rotated(_, basis) => Some(basis),
        }
    }

    /// Calls `put(token, codes, grids)` for the `n` oldest of `rows`, with the scale and the zero-point of every group.
    fn encode(&self, rows: &Rows, n: usize, mut put: impl FnMut(usize, &[u8], &[(f16, f16)])) {
        let (mut codes, mut grids) = (vec![0; self.dim], vec![(f16::ZERO, f16::ZERO); self.groups()]);
        let mut x = rows.to_f32(0..n);
        for (t, x) in x.chunks_exact_mut(self.dim).enumerate() {
            if let Some(basis) = self.basis() {
                basis.apply(x);
            }
            let groups = x.chunks(self.group()).zip(codes.chunks_mut(self.group()));
            for ((x, codes), grid) in groups.zip(&mut grids) {
                *grid = match &self.coding {
                    Coding::Kivi(kivi) => kivi.encode(x, codes),
                    Coding::Block(block) => (block.encode(x, codes), f16::ZERO),
                    Coding::Rotated(rotated, _) => (rotated.encode(x, codes), f16::ZERO),
                };
            }
            put(t, &codes, &grids);
        }
    }
}
