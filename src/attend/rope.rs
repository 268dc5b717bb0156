//! Rotary positions (Su et al. 2021, arXiv 2104.09864): keys that are stored un-rotated, and turned when they are read.
//!
//! A key at position `p` is `R_p x`: every pair of channels turned by `p` times its frequency. A page of consecutive tokens
//! from position `s` on holds `x`, opens as `R_j x` for token `j`, with one table of angles for all pages, and has `R_s` as
//! its basis: `q . R_(s + j) x = (R_-s q) . (R_j x)`.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::Basis;
use super::kernels::Turn;
use super::mat::Mat;

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
    starts: Mutex<HashMap<u32, Arc<Basis>>>,
}

impl PartialEq for Rope {
    fn eq(&self, other: &Self) -> bool {
        self.pairs == other.pairs && self.frequencies == other.frequencies
    }
}

impl Rope {
    /// Pairs of channels `(a, b)`, each channel in at most one, and the angle (radians) that each is turned by from one position
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
    pub fn basis(&self, start: usize) -> Arc<Basis> {
        let start = start as u32;
        let mut starts = self.starts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(starts.entry(start).or_insert_with(|| Arc::new(self.turned(start))))
    }

    /// The coordinates of keys that are `distance` positions behind where they count as being.
    pub fn turned(&self, distance: u32) -> Basis {
        let angles = self.frequencies.iter().map(|&f| sin_cos(f64::from(f) * f64::from(distance)));
        let turns = angles.map(|(sin, cos)| [cos, sin]).collect();
        Basis::Turned { pairs: Arc::clone(&self.pairs), turns }
    }

    /// How un-rotated keys with these grids are opened from token `first` of a page on.
    pub fn turn<'a>(&'a self, scale: &'a [f32], zero: &'a [f32], first: usize) -> Turn<'a> {
        // Without pairs there is nothing behind the first column.
        let first = first.min(self.cos.len());
        let mat = |angles: &'a [f32]| Mat::new(&angles[first..], self.pairs.len(), SPAN);
        Turn { scale, zero, pairs: &self.pairs, cos: mat(&self.cos), sin: mat(&self.sin) }
    }

    /// Turns `x`, of token `j` of a page, by `j` positions, back.
    pub fn undo(&self, j: usize, x: &mut [f32]) {
        for (i, &(a, b)) in self.pairs.iter().enumerate() {
            let (cos, sin) = (self.cos[i * SPAN + j], self.sin[i * SPAN + j]);
            let (a, b) = (usize::from(a), usize::from(b));
            (x[a], x[b]) = (x[a] * cos + x[b] * sin, x[b] * cos - x[a] * sin);
        }
    }

    /// The pairs of channels, with the angle from one position to the next.
    pub fn pairs(&self) -> Vec<(usize, usize, f64)> {
        let both = self.pairs.iter().zip(&self.frequencies);
        both.map(|(&(a, b), &f)| (usize::from(a), usize::from(b), f64::from(f))).collect()
    }

    /// Turns `x`, of position `p`, back to position 0.
    pub fn turn_back(&self, p: u32, x: &mut [f32]) {
        for (&(a, b), &frequency) in self.pairs.iter().zip(&self.frequencies) {
            let (sin, cos) = sin_cos(f64::from(frequency) * f64::from(p));
            let (a, b) = (usize::from(a), usize::from(b));
            (x[a], x[b]) = (x[a] * cos + x[b] * sin, x[b] * cos - x[a] * sin);
        }
    }

    /// Bytes allocated.
    pub fn bytes(&self) -> usize {
        let starts = self.starts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let of_basis: usize = starts.values().map(|basis| basis.bytes()).sum();
        size_of::<Self>() + 4 * (2 * self.cos.len() + 2 * self.frequencies.len()) + of_basis
    }
}

fn sin_cos(angle: f64) -> (f32, f32) {
    let (sin, cos) = angle.sin_cos();
    (sin as f32, cos as f32)
}
