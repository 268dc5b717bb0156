//! Pages of tokens with a grid a token and group of channels, perhaps in other coordinates.
//!
//! KIVI's values have a scale and a zero-point, blocks and rotated tokens only a scale: `x' = scale (code - origin)`.

mod keys;
mod values;

use std::ops::Range;
use std::sync::Arc;

use half::f16;

pub use keys::TokenKeys;
pub use values::TokenValues;

use super::feedback::most_corrected;
use super::kvquant::{KvQuant, rest};
use super::outliers::Outliers;
use super::{Block, Factor, Kivi, Kvarn, Method, Plan, Rotated, SMALL, block, kvarn, stored_scale};
use crate::attend::Basis;
use crate::attend::codes::Levels;
use crate::tensor::Rows;

/// Tokens for which a page has room: whole blocks of codes, and few enough that their sums are exact.
const PAGE: usize = 128;

/// How tokens are coded.
#[derive(Clone, Debug, PartialEq)]
enum Coding {
    Kivi(Kivi),
    Block(Block),
    Rotated(Rotated, Arc<Basis>),
    Kvarn(Kvarn, Arc<Basis>),
    KvQuant(Arc<KvQuant>),
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
            Method::Kvarn(kvarn) => Coding::Kvarn(kvarn.clone(), plan.basis(|| Basis::hadamard(dim, kvarn.seed))),
            Method::KvQuant(kvquant) => Coding::KvQuant(Arc::clone(kvquant)),
            Method::Exact | Method::Graded(_) => panic!("{method:?} has no pages with a grid a token"),
        };
        Self { coding, dim }
    }

    fn bits(&self) -> u8 {
        match &self.coding {
            Coding::Kivi(kivi) => kivi.bits,
            Coding::Block(block) => block.bits,
            Coding::Rotated(rotated, _) => rotated.bits,
            Coding::Kvarn(kvarn, _) => kvarn.bits,
            Coding::KvQuant(kvquant) => kvquant.bits,
        }
    }

    /// What codes stand for, if not for themselves.
    fn levels(&self) -> Option<&Levels> {
        match &self.coding {
            Coding::Kivi(_) | Coding::Block(_) | Coding::Kvarn(..) => None,
            Coding::Rotated(rotated, _) => rotated.levels(),
            Coding::KvQuant(kvquant) => Some(kvquant.table.levels()),
        }
    }

    /// Where the outliers of a page lie.
    fn outliers(&self) -> Outliers {
        let each = if let Coding::KvQuant(kvquant) = &self.coding { kvquant.places(self.dim) } else { 0 };
        Outliers { each, tokens: PAGE }
    }

    /// Numbers that are stored for a group: its scale, and perhaps its zero-point.
    fn grid_numbers(&self) -> usize {
        if let Coding::Kivi(_) | Coding::Kvarn(..) | Coding::KvQuant(_) = self.coding { 2 } else { 1 }
    }

    /// The largest magnitude in the page's coordinates.
    fn longest(&self) -> f32 {
        if let Coding::Rotated(rotated, _) = &self.coding { rotated.longest() } else { f16::MAX.to_f32() }
    }

    /// The code that stands for 0, where no zero-point is stored.
    fn origin(&self) -> f32 {
        match &self.coding {
            Coding::Kivi(_) | Coding::Kvarn(..) | Coding::KvQuant(_) => 0.0,
            Coding::Block(block) => block.origin(),
            Coding::Rotated(rotated, _) => rotated.origin(),
        }
    }

    /// Channels that share a scale.
    fn group(&self) -> usize {
        let group = match &self.coding {
            Coding::Kivi(kivi) => kivi.group,
            Coding::Block(_) => block::SIZE,
            Coding::Rotated(rotated, _) => rotated.group,
            Coding::Kvarn(..) | Coding::KvQuant(_) => 0,
        };
        if group == 0 { self.dim } else { group.min(self.dim) }
    }

    fn groups(&self) -> usize {
        self.dim.div_ceil(self.group())
    }

    fn basis(&self) -> Option<&Arc<Basis>> {
        match &self.coding {
            Coding::Kivi(_) | Coding::Block(_) | Coding::KvQuant(_) => None,
            Coding::Rotated(_, basis) | Coding::Kvarn(_, basis) => Some(basis),
        }
    }

    /// Calls `put(token, codes, grids, outliers)` for the `n` oldest of `rows`, with the scale and the zero-point of every group,
    /// and the channels of outliers with what their codes lack. With `feedback` roundings are made up for. Returns factors of the
    /// channels, if they have any.
    fn encode(
        &self,
        rows: &Rows,
        n: usize,
        feedback: Option<&Factor>,
        mut put: impl FnMut(usize, &[u8], &[(f16, f16)], &[(u8, f16)]),
    ) -> Vec<f16> {
        let (mut codes, mut grids) = (vec![0; self.dim], vec![(f16::ZERO, f16::ZERO); self.groups()]);
        let mut x = rows.to_f32(0..n);
        if let Some(basis) = self.basis() {
            x.chunks_exact_mut(self.dim).for_each(|x| basis.apply(x));
        }
        let factors = if let Coding::Kvarn(..) = self.coding { kvarn::deviations(&x, self.dim).1 } else { Vec::new() };
        for (t, x) in x.chunks_exact_mut(self.dim).enumerate() {
            x.iter_mut().zip(&factors).for_each(|(x, factor)| *x /= factor.to_f32());
            if let Coding::KvQuant(kvquant) = &self.coding {
                let (grid, outliers) = encode_value(kvquant, x, &mut codes);
                put(t, &codes, &[grid], &outliers);
                continue;
            }
            if let Some(factor) = feedback {
                self.encode_fed_back(factor, x, &mut codes, &mut grids);
                put(t, &codes, &grids, &[]);
                continue;
            }
            let groups = x.chunks(self.group()).zip(codes.chunks_mut(self.group()));
            for ((x, codes), grid) in groups.zip(&mut grids) {
                *grid = match &self.coding {
                    Coding::Kivi(kivi) => kivi.encode(x, codes),
                    Coding::Kvarn(kvarn, _) => kvarn.grids.encode(x, codes),
                    Coding::Block(block) => (block.encode(x, codes), f16::ZERO),
                    Coding::Rotated(rotated, _) => (rotated.encode(x, codes), f16::ZERO),
                    Coding::KvQuant(_) => unreachable!("it has no groups"),
                };
            }
            put(t, &codes, &grids, &[]);
        }
        factors
    }

    /// Codes and grids of a vector with feedback. A group's grid is that of its numbers when their turn comes.
    fn encode_fed_back(&self, factor: &Factor, x: &mut [f32], codes: &mut [u8], grids: &mut [(f16, f16)]) {
        let exact = x.to_vec();
        let most = most_corrected(&exact, self.longest());
        for (j, first) in (0..self.dim).step_by(self.group()).enumerate() {
            let range = first..self.dim.min(first + self.group());
            let own = &mut x[range.clone()];
            for x in own.iter_mut() {
                *x = x.clamp(-most, most);
            }
            let own = &*own;
            grids[j] = match &self.coding {
                Coding::Kivi(kivi) => {
                    let grid = kivi.grid(own);
                    let (code, decode) = (|x| grid.code(kivi.bits, x), |code| grid.decode(code));
                    feed_back(factor, (range, most), (x, codes), code, decode);
                    (grid.scale, grid.zero)
                }
                Coding::Block(block) => {
                    let scale = block.scale(own);
                    let (stored, inverse) = (f16::from_f32(scale), if scale == 0.0 { 0.0 } else { 1.0 / scale });
                    let decode = |code| stored.to_f32() * (f32::from(code) - block.origin());
                    feed_back(factor, (range, most), (x, codes), |x| block.code(x * inverse), decode);
                    (stored, f16::ZERO)
                }
                Coding::Rotated(rotated, _) => {
                    let step = rotated.step(own);
                    let (code, decode) = (|x| rotated.code(x / step), |code| rotated.decode(code, step));
                    feed_back(factor, (range.clone(), most), (x, codes), code, decode);
                    (rotated.scale(&exact[range.clone()], &codes[range], step), f16::ZERO)
                }
                Coding::Kvarn(..) | Coding::KvQuant(_) => unreachable!("it has no feedback"),
            };
        }
    }
}

/// Codes numbers `range` of a vector one after the other: `code` and `decode` are those of their group's grid, and what a code
/// lacks is passed on to all numbers behind it, which stay within `most`.
fn feed_back(
    factor: &Factor,
    (range, most): (Range<usize>, f32),
    (x, codes): (&mut [f32], &mut [u8]),
    code: impl Fn(f32) -> u8,
    decode: impl Fn(u8) -> f32,
) {
    for k in range {
        x[k] = x[k].clamp(-most, most);
        codes[k] = code(x[k]);
        let error = x[k] - decode(codes[k]);
        factor.pass_on(k, error, &mut x[k + 1..]);
    }
}

/// The grid of a value, and its outliers.
fn encode_value(kvquant: &KvQuant, x: &[f32], codes: &mut [u8]) -> ((f16, f16), Vec<(u8, f16)>) {
    let (range, outliers) = kvquant.value_range(x);
    kvquant.encode(x, codes, |_| range);
    let (scale, zero) = kvquant.grid(range.0, range.1);
    let mut grid = (f16::from_f32(scale), f16::from_f32(zero));
    if scale < SMALL {
        // Halves are coarse near 0: codes go by the grid as it is stored, and nothing is better than what errs more than that.
        grid.0 = stored_scale(scale, 0.0);
        let stored = (grid.0.to_f32(), grid.1.to_f32());
        let mut error = 0.0;
        for (c, (code, &x)) in codes.iter_mut().zip(x).enumerate() {
            *code = if stored.0 > 0.0 { kvquant.table.nearest((x - stored.1) / stored.0) } else { 0 };
            if !outliers.contains(&(c as u8)) {
                error += (x - kvquant.decode(*code, stored)).powi(2) - x.powi(2);
            }
        }
        if error >= 0.0 {
            grid = (f16::ZERO, f16::ZERO);
        }
    }
    let lacks = |channel: u8| {
        let c = usize::from(channel);
        rest(x[c], kvquant.decode(codes[c], (grid.0.to_f32(), grid.1.to_f32())))
    };
    (grid, outliers.into_iter().map(|channel| (channel, lacks(channel))).collect())
}
