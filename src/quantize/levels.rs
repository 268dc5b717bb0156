//! Levels that are not evenly spaced: tables of what codes stand for.

use crate::format::codes::Levels;

/// Levels in ascending order, as a table of bytes: code `i` stands for `first + span table_i / 255`.
///
/// The table is what the inner loops multiply with, so levels are rounded to 255ths of their span: less than a tenth of the
/// error of 16 levels.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    levels: Levels,
    /// Half way between neighbours; behind the last one infinity.
    boundaries: [f32; 16],
    /// The lowest level.
    pub first: f32,
    /// From the lowest to the highest level.
    pub span: f32,
}

/// The highest entry of a table.
pub(super) const TOP: f32 = 255.0;

impl Table {
    /// Of 2 to 16 numbers in ascending order, not all equal.
    pub fn new(levels: &[f32]) -> Self {
        let (first, last) = (levels[0], levels[levels.len() - 1]);
        let span = last - first;
        let bytes: Vec<u8> = levels.iter().map(|l| ((l - first) / span * TOP).round() as u8).collect();
        let mut boundaries = [f32::INFINITY; 16];
        for (boundary, pair) in boundaries.iter_mut().zip(bytes.windows(2)) {
            *boundary = f32::from(pair[0]).midpoint(f32::from(pair[1]));
        }
        Self { levels: Levels::new(&bytes), boundaries, first, span }
    }

    /// The table.
    pub fn levels(&self) -> &Levels {
        &self.levels
    }

    /// The code whose entry is nearest to `x`, given in units of the table; half way the lower one.
    pub fn nearest(&self, x: f32) -> u8 {
        self.boundaries.iter().map(|&boundary| u8::from(x > boundary)).sum()
    }
}

/// The levels of least square error for numbers with a standard normal distribution (Lloyd 1982, Max 1960): the positive half.
pub(super) const fn lloyd_max(bits: u8) -> &'static [f32] {
    match bits {
        2 => &[0.4528, 1.5104],
        3 => &[0.2451, 0.7560, 1.3439, 2.1519],
        _ => &[0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_is_nearest() {
        for bits in [2, 3, 4] {
            let half = lloyd_max(bits);
            let levels: Vec<f32> = half.iter().rev().map(|l| -l).chain(half.iter().copied()).collect();
            let table = Table::new(&levels);
            for i in -50..=305 {
                let x = i as f32 + 0.25;
                let distance = |code: usize| (f32::from(table.levels().of(code as u8)) - x).abs();
                let best = (0..levels.len()).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap();
                assert_eq!(usize::from(table.nearest(x)), best, "{x}");
            }
            for (code, &level) in levels.iter().enumerate() {
                let entry = f32::from(table.levels().of(code as u8));
                assert!((table.first + table.span * entry / TOP - level).abs() <= table.span / TOP / 2.0 + 1e-6);
            }
        }
    }

    /// Lloyd's condition: every level is the mean of the numbers that are nearest to it.
    #[test]
    fn levels_are_the_means_of_their_cells() {
        for bits in [2, 3, 4] {
            let half = lloyd_max(bits);
            let edges: Vec<f64> =
                [0.0].into_iter().chain(half.windows(2).map(|l| f64::from(l[0]).midpoint(l[1].into()))).collect();
            for (i, &level) in half.iter().enumerate() {
                let end = edges.get(i + 1).copied().unwrap_or(12.0);
                let steps = 20_000;
                let (mut mass, mut moment) = (0.0, 0.0);
                for k in 0..steps {
                    let x = edges[i] + (end - edges[i]) * (f64::from(k) + 0.5) / f64::from(steps);
                    mass += (-x * x / 2.0).exp();
                    moment += x * (-x * x / 2.0).exp();
                }
                assert!((moment / mass - f64::from(level)).abs() < 2e-4, "{bits} bits, level {i}");
            }
        }
    }
}
