//! Packed codes: a matrix of small unsigned integers `[outer, lanes]`, packed along `outer`.
//!
//! Keys put tokens in lanes (outer = channels), values put channels in lanes (outer = tokens), so that no horizontal sum
//! is ever needed. Codes are multiplied as 16-bit integers, two outer rows at a time (`pmaddwd` and its like), so a lane
//! is a pair of 16-bit words: word 0 holds even outer rows, word 1 odd ones, the pairs `j = 0, 1, ...` one above the other.
//!
//! | bits | outer rows of a block | where outer row `2 j + p` of a lane is |
//! |---|---:|---|
//! | 8, 4, 2 | 4, 8, 16 | word `p`, at bit `bits j` |
//! | 3 | 16 | its two low bits as for 2; its high bit at bit `8 p + j` of a third word |
//!
//! A block is a row of all lanes' pairs of words, for 3 bits followed by a row of their third words.

#![forbid(unsafe_code)]

/// The unit of lanes: every instruction set works on a multiple or on all of these.
pub const LANES: usize = 8;

/// Outer rows of the largest block.
pub const MOST_OUTER: usize = 16;

/// The binary logarithm of [`block`]: the inner loops ask for blocks too often to divide.
const fn block_log2(bits: u8) -> u32 {
    match bits {
        8 => 2,
        4 => 3,
        _ => MOST_OUTER.trailing_zeros(),
    }
}

/// Outer rows that are packed together.
pub const fn block(bits: u8) -> usize {
    1 << block_log2(bits)
}

/// Blocks that hold `outer` rows.
pub const fn blocks(bits: u8, outer: usize) -> usize {
    (outer + block(bits) - 1) >> block_log2(bits)
}

/// `outer` rounded up to whole blocks.
pub const fn padded_outer(bits: u8, outer: usize) -> usize {
    blocks(bits, outer) << block_log2(bits)
}

/// Words of `[outer, lanes]` codes; `lanes` is a multiple of [`LANES`].
pub const fn packed_len(bits: u8, outer: usize, lanes: usize) -> usize {
    blocks(bits, outer) * block_words(bits, lanes)
}

/// Words of one block.
pub const fn block_words(bits: u8, lanes: usize) -> usize {
    if bits == 3 { 3 * lanes } else { 2 * lanes }
}

/// What codes of at most 4 bits stand for, before a grid: small integers instead of the codes themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Levels([u8; 16]);

impl Levels {
    /// The levels of codes 0, 1, ...; code 0 must stand for 0, which is what the loops find beside a code.
    ///
    /// # Panics
    /// When it does not, or there are more than 16.
    pub fn new(levels: &[u8]) -> Self {
        assert!(levels.first() == Some(&0) && levels.len() <= 16, "{levels:?}");
        let mut all = [0; 16];
        all[..levels.len()].copy_from_slice(levels);
        Self(all)
    }

    /// What `code` stands for.
    pub fn of(&self, code: u8) -> u8 {
        self.0[usize::from(code)]
    }

    /// All levels; those of codes that do not occur are 0.
    pub fn bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

/// Packed codes, borrowed.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    bits: u8,
    lanes: usize,
    blocks: usize,
    words: &'a [u16],
    levels: Option<&'a Levels>,
}

impl<'a> Codes<'a> {
    /// The first `blocks` blocks of codes of `bits` (2, 3, 4 or 8) bits in rows of `lanes`.
    ///
    /// # Panics
    /// When `words` are fewer, or `lanes` is not a multiple of [`LANES`].
    #[inline]
    pub fn new(bits: u8, lanes: usize, blocks: usize, words: &'a [u16]) -> Self {
        assert!(matches!(bits, 2 | 3 | 4 | 8), "{bits}-bit codes");
        assert!(lanes > 0 && lanes.is_multiple_of(LANES));
        Self { bits, lanes, blocks, words: &words[..blocks * block_words(bits, lanes)], levels: None }
    }

    /// The same codes, standing for `levels`.
    ///
    /// # Panics
    /// When the codes have 8 bits.
    #[inline]
    #[must_use]
    pub fn with_levels(self, levels: Option<&'a Levels>) -> Self {
        assert!(self.bits <= 4 || levels.is_none(), "a table of 16 for {}-bit codes", self.bits);
        Self { levels, ..self }
    }

    /// What the codes stand for, if not for themselves.
    pub fn levels(self) -> Option<&'a Levels> {
        self.levels
    }

    /// What the code at `[outer, lane]` stands for.
    pub fn level(self, outer: usize, lane: usize) -> u8 {
        let code = self.get(outer, lane);
        self.levels.map_or(code, |levels| levels.of(code))
    }

    /// Bits of one code.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Columns.
    pub fn lanes(self) -> usize {
        self.lanes
    }

    /// Rows, whole blocks of them.
    pub fn outer(self) -> usize {
        self.blocks << block_log2(self.bits)
    }

    /// The words, block after block.
    pub fn words(self) -> &'a [u16] {
        self.words
    }

    /// The code at `[outer, lane]`.
    pub fn get(self, outer: usize, lane: usize) -> u8 {
        places(self.bits, self.lanes, outer, lane)
            .into_iter()
            .flatten()
            .fold(0, |code, p| code | ((self.words[p.word] >> p.shift & p.mask) << p.up) as u8)
    }
}

/// Writes row `outer` of `[.., lanes]` codes, one a byte; the row must still be 0 in `words`.
pub fn put_row(bits: u8, codes: &[u8], outer: usize, words: &mut [u16]) {
    let lanes = codes.len();
    for p in places(bits, lanes, outer, 0).into_iter().flatten() {
        let step = if p.third { 1 } else { 2 };
        for (word, &code) in words[p.word..].iter_mut().step_by(step).zip(codes) {
            *word |= (u16::from(code) >> p.up & p.mask) << p.shift;
        }
    }
}

/// Writes the codes of one lane, all its outer rows one a byte; they must still be 0 in `words`.
pub fn put_lane(bits: u8, lanes: usize, codes: &[u8], lane: usize, words: &mut [u16]) {
    let width = if bits == 3 { 2 } else { u32::from(bits) };
    for (codes, words) in codes.chunks(block(bits)).zip(words.chunks_exact_mut(block_words(bits, lanes))) {
        let mut pair = [0u16; 2];
        let mut third = 0;
        for (o, &code) in codes.iter().enumerate() {
            pair[o % 2] |= (u16::from(code) & ((1 << width) - 1)) << (width * (o as u32 / 2));
            third |= u16::from(code >> 2) << (8 * (o % 2) + o / 2);
        }
        words[2 * lane..2 * lane + 2].copy_from_slice(&pair);
        if bits == 3 {
            words[2 * lanes + lane] = third;
        }
    }
}

/// Where some bits of a code lie: `mask` at `shift` of `word`, worth `1 << up` in the code.
struct Place {
    word: usize,
    /// Whether that is a third word, of which a lane has one.
    third: bool,
    shift: usize,
    mask: u16,
    up: usize,
}

fn places(bits: u8, lanes: usize, outer: usize, lane: usize) -> [Option<Place>; 2] {
    let first = outer / block(bits) * block_words(bits, lanes);
    let (pair, parity) = (outer % block(bits) / 2, outer % 2);
    let width = if bits == 3 { 2 } else { usize::from(bits) };
    let low =
        Place { word: first + 2 * lane + parity, third: false, shift: width * pair, mask: (1 << width) - 1, up: 0 };
    let high = Place { word: first + 2 * lanes + lane, third: true, shift: 8 * parity + pair, mask: 1, up: 2 };
    [Some(low), (bits == 3).then_some(high)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_put_is_got(bits in prop::sample::select(vec![2u8, 3, 4, 8]), blocks in 1usize..4, lane_blocks in 1usize..5, seed: u64) {
            let (outer, lanes) = (blocks * block(bits), lane_blocks * LANES);
            let code = |o: usize, l: usize| {
                ((seed ^ (o * 31 + l) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 & (u8::MAX >> (8 - bits))
            };
            let mut words = vec![0; packed_len(bits, outer, lanes)];
            for o in 0..outer {
                let row: Vec<u8> = (0..lanes).map(|l| code(o, l)).collect();
                put_row(bits, &row, o, &mut words);
            }
            let mut by_lane = vec![0; words.len()];
            for l in 0..lanes {
                let column: Vec<u8> = (0..outer).map(|o| code(o, l)).collect();
                put_lane(bits, lanes, &column, l, &mut by_lane);
            }
            prop_assert_eq!(&words, &by_lane);
            let codes = Codes::new(bits, lanes, blocks, &words);
            prop_assert_eq!(codes.outer(), outer);
            prop_assert_eq!(words.len() * 16, outer * lanes * usize::from(bits));
            for o in 0..outer {
                for l in 0..lanes {
                    prop_assert_eq!(codes.get(o, l), code(o, l));
                }
            }
        }
    }
}
