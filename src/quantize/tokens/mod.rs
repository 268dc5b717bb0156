//! Pages of tokens with a scale a token and group of channels: `x' = scale (code - origin)`, perhaps in other coordinates.

mod keys;
mod values;

use std::sync::Arc;

use half::f16;
use half::slice::HalfBitsSliceExt;

pub use keys::TokenKeys;
pub use values::TokenValues;

use super::{Block, Method, Plan, Rotated, block, levels};
use crate::attend::Basis;
use crate::tensor::Rows;

/// Tokens for which a page has room: whole blocks of codes, and few enough that their sums are exact.
const PAGE: usize = 128;

/// How tokens are coded.
#[derive(Clone, Debug, PartialEq)]
enum Coding {
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
            Method::Block(block) => Coding::Block(block.clone()),
            Method::Rotated(rotated) => {
                Coding::Rotated(rotated.clone(), plan.basis(|| Basis::hadamard(dim, rotated.seed)))
            }
            _ => panic!("{method:?} has no pages with a scale a token"),
        };
        Self { coding, dim }
    }

    fn bits(&self) -> u8 {
        match &self.coding {
            Coding::Block(block) => block.bits,
            Coding::Rotated(rotated, _) => rotated.bits,
        }
    }

    /// The code that stands for 0.
    fn origin(&self) -> f32 {
        match &self.coding {
            Coding::Block(block) => block.origin(),
            Coding::Rotated(rotated, _) => levels(rotated.bits) / 2.0,
        }
    }

    /// Channels that share a scale.
    fn group(&self) -> usize {
        let group = match &self.coding {
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
            Coding::Block(_) => None,
            Coding::Rotated(_, basis) => Some(basis),
        }
    }

    /// Calls `put(token, codes, scales)` for the `n` oldest of `rows`.
    fn encode(&self, rows: &Rows, n: usize, mut put: impl FnMut(usize, &[u8], &[f16])) {
        let (mut codes, mut scales) = (vec![0; self.dim], vec![f16::ZERO; self.groups()]);
        let mut x = rows.to_f32(0..n);
        for (t, x) in x.chunks_exact_mut(self.dim).enumerate() {
            if let Some(basis) = self.basis() {
                basis.apply(x);
            }
            let groups = x.chunks(self.group()).zip(codes.chunks_mut(self.group()));
            for ((x, codes), scale) in groups.zip(&mut scales) {
                *scale = match &self.coding {
                    Coding::Block(block) => block.encode(x, codes),
                    Coding::Rotated(rotated, _) => rotated.encode(x, codes),
                };
            }
            put(t, &codes, &scales);
        }
    }
}

/// The number in a word.
fn number(word: u16) -> f32 {
    f16::from_bits(word).to_f32()
}

/// The memory of words.
fn bytes_of(words: &[u16]) -> &[u8] {
    crate::tensor::Slice::F16(words.reinterpret_cast()).bytes()
}
