//! Rotary positions (Su et al. 2021, arXiv 2104.09864): keys that are stored pre-RoPE, and rotated when they are read.
//!
//! A key at position `p` is `R_p x`: every pair of channels rotated by `p` times its frequency. A page of consecutive tokens
//! from position `s` on holds `x`, opens as `R_j x` for token `j`, with one table of angles for all pages, and has `R_s` as
//! its map: `q . R_(s + j) x = (R_-s q) . (R_j x)`.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::Map;
use super::mat::Mat;
use crate::error::{Result, refuse};
use crate::options::Options;

/// Positions of a page for which there are angles.
pub const SPAN: usize = 128;

/// Frequencies of the pairs of channels, and what follows from them.
#[derive(Debug)]
pub struct Rope {
    pairs: Arc<[(u16, u16)]>,
    frequencies: Box<[f32]>,
    /// The largest channel in a pair, and one.
    channels: usize,
    /// `[pairs, SPAN]`.
    cos: Box<[f32]>,
    sin: Box<[f32]>,
    starts: Mutex<HashMap<u32, Arc<Map>>>,
}

impl PartialEq for Rope {
    fn eq(&self, other: &Self) -> bool {
        self.pairs == other.pairs && self.frequencies == other.frequencies
    }
}

impl Rope {
    /// Pairs of channels `(a, b)`, each channel in at most one, and the angle (radians) that each is rotated by from one position
    /// to the next. Equal ones are the same object: all layers of a model share one.
    ///
    /// # Panics
    /// When there are not as many frequencies as pairs.
    pub fn shared(pairs: &[(u16, u16)], frequencies: &[f32]) -> Arc<Self> {
        static KNOWN: Mutex<Vec<Weak<Rope>>> = Mutex::new(Vec::new());
        assert_eq!(pairs.len(), frequencies.len());
        let mut known = KNOWN.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        known.retain(|rope| rope.strong_count() > 0);
        let same = |rope: &Arc<Self>| *rope.pairs == *pairs && *rope.frequencies == *frequencies;
        if let Some(rope) = known.iter().filter_map(Weak::upgrade).find(same) {
            return rope;
        }
        let rope = Arc::new(Self::new(pairs, frequencies));
        known.push(Arc::downgrade(&rope));
        rope
    }

    /// Those of `pairs` with `frequencies`, as options give them.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when a channel is in two pairs, or a frequency is missing or not finite.
    pub fn of(options: &mut Options) -> Result<Arc<Self>> {
        let pairs: Vec<(u16, u16)> = options.pairs("pairs")?;
        let frequencies = options.maybe_numbers("frequencies")?.unwrap_or_default();
        let mut channels: Vec<u16> = pairs.iter().flat_map(|&(a, b)| [a, b]).collect();
        channels.sort_unstable();
        let twice = channels.windows(2).any(|pair| pair[0] == pair[1]);
        if twice || pairs.len() != frequencies.len() || frequencies.iter().any(|f| !f.is_finite()) {
            return refuse(
                "rotation",
                format!("{pairs:?} with frequencies {frequencies:?}"),
                "pairs of channels, each in at most one, and a finite frequency for each",
            );
        }
        Ok(Self::shared(&pairs, &frequencies))
    }

    fn new(pairs: &[(u16, u16)], frequencies: &[f32]) -> Self {
        let angles = frequencies.iter().flat_map(|&f| (0..SPAN).map(move |j| f64::from(f) * j as f64));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles.map(sin_cos).unzip();
        Self {
            channels: pairs.iter().map(|&(a, b)| usize::from(a.max(b)) + 1).max().unwrap_or(0),
            pairs: pairs.into(),
            frequencies: frequencies.into(),
            cos: cos.into(),
            sin: sin.into(),
            starts: Mutex::default(),
        }
    }

    /// The largest channel in a pair, and one.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// The coordinates of a page that begins at position `start`.
    pub fn map(&self, start: usize) -> Arc<Map> {
        let start = start as u32;
        let mut starts = self.starts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(starts.entry(start).or_insert_with(|| Arc::new(self.shifted(start))))
    }

    /// The coordinates of keys that are `distance` positions behind where they count as being.
    pub fn shifted(&self, distance: u32) -> Map {
        let angles = self.angles(distance).collect();
        Map::Rotated { pairs: Arc::clone(&self.pairs), angles }
    }

    /// Cosine and sine of the angle of each pair at position `p`.
    fn angles(&self, p: u32) -> impl Iterator<Item = [f32; 2]> {
        self.frequencies.iter().map(move |&f| sin_cos(f64::from(f) * f64::from(p))).map(|(sin, cos)| [cos, sin])
    }

    /// How pre-RoPE keys with these grids are opened from token `first` of a page on.
    pub fn rotate<'a>(&'a self, scale: &'a [f32], zero: &'a [f32], first: usize) -> Rotate<'a> {
        // Without pairs there is nothing behind the first column.
        let first = first.min(self.cos.len());
        let mat = |angles: &'a [f32]| Mat::new(&angles[first..], self.pairs.len(), SPAN);
        Rotate { scale, zero, pairs: &self.pairs, cos: mat(&self.cos), sin: mat(&self.sin) }
    }

    /// Rotates `x`, of token `j` of a page, by `j` positions, back.
    pub fn undo(&self, j: usize, x: &mut [f32]) {
        for (i, &pair) in self.pairs.iter().enumerate() {
            rotate(x, pair, [self.cos[i * SPAN + j], -self.sin[i * SPAN + j]]);
        }
    }

    /// Rotates `x`, of position `p`, back to position 0.
    pub fn undo_position(&self, p: u32, x: &mut [f32]) {
        for (&pair, [cos, sin]) in self.pairs.iter().zip(self.angles(p)) {
            rotate(x, pair, [cos, -sin]);
        }
    }

    /// The pairs of channels, with the angle from one position to the next.
    pub fn pairs(&self) -> Vec<(usize, usize, f64)> {
        let both = self.pairs.iter().zip(&self.frequencies);
        both.map(|(&(a, b), &f)| (usize::from(a), usize::from(b), f64::from(f))).collect()
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        let starts = self.starts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let of_maps: usize = starts.values().map(|map| map.bytes()).sum();
        size_of::<Self>() + 4 * (2 * self.cos.len() + 2 * self.frequencies.len()) + of_maps
    }
}

/// A grid a row, then a rotation of pairs of rows by an angle a pair and column.
#[derive(Clone, Copy)]
pub struct Rotate<'a> {
    /// A factor a row.
    pub scale: &'a [f32],
    /// What is added to a row.
    pub zero: &'a [f32],
    /// Rows `(a, b)`: `a <- a cos - b sin`, `b <- a sin + b cos`; each row is in at most one pair.
    pub pairs: &'a [(u16, u16)],
    /// A row a pair.
    pub cos: Mat<'a>,
    /// A row a pair.
    pub sin: Mat<'a>,
}

/// Rotates the pair `(a, b)` of `x`: `a <- a cos - b sin`, `b <- a sin + b cos`.
pub(super) fn rotate(x: &mut [f32], (a, b): (u16, u16), [cos, sin]: [f32; 2]) {
    let (a, b) = (usize::from(a), usize::from(b));
    (x[a], x[b]) = (x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos);
}

fn sin_cos(angle: f64) -> (f32, f32) {
    let (sin, cos) = angle.sin_cos();
    (sin as f32, cos as f32)
}
