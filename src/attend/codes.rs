//! Packed codes: a matrix of small unsigned integers `[outer, lanes]`, packed along `outer`.
//!
//! Lanes stay apart, one byte each, so that eight of them widen to one vector of floats with a single
//! instruction and no horizontal sum is ever needed. Keys put tokens in lanes (outer = channels), values
//! put channels in lanes (outer = tokens).
//!
//! Eight outer rows make a block of `bits` byte rows, `lanes` bytes each:
//!
//! | bits | byte rows of a block |
//! |---|---|
//! | 8 | row `o` holds outer `o` |
//! | 4 | row `r` holds outer `2r` (low nibble) and `2r + 1` |
//! | 2 | row `r` holds outer `4r .. 4r + 3`, two bits each from the lowest up |
//! | 3 | rows 0 and 1: the two low bits, as for 2; row 2: bit `o` is the high bit of outer `o` |

#![forbid(unsafe_code)]

/// Outer rows in a block, and the unit of lanes.
pub const BLOCK: usize = 8;

/// Bytes of `[outer, lanes]` codes of `bits` bits; both sizes are multiples of [`BLOCK`].
pub fn packed_len(bits: u8, outer: usize, lanes: usize) -> usize {
    outer / BLOCK * usize::from(bits) * lanes
}

/// Packed codes, borrowed.
#[derive(Clone, Copy)]
pub struct Codes<'a> {
    bits: u8,
    lanes: usize,
    data: &'a [u8],
}

impl<'a> Codes<'a> {
    /// Codes of `bits` (2, 3, 4 or 8) bits in rows of `lanes` bytes.
    ///
    /// # Panics
    /// When `data` is not a whole number of blocks, or `lanes` not a multiple of [`BLOCK`].
    pub fn new(bits: u8, lanes: usize, data: &'a [u8]) -> Self {
        assert!(matches!(bits, 2 | 3 | 4 | 8), "{bits}-bit codes");
        assert!(lanes > 0 && lanes.is_multiple_of(BLOCK) && data.len().is_multiple_of(usize::from(bits) * lanes));
        Self { bits, lanes, data }
    }

    /// Bits of one code.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// Bytes of a byte row.
    pub fn lanes(self) -> usize {
        self.lanes
    }

    /// Outer rows.
    pub fn outer(self) -> usize {
        self.data.len() / (usize::from(self.bits) * self.lanes) * BLOCK
    }

    /// The bytes, block after block.
    pub fn data(self) -> &'a [u8] {
        self.data
    }

    /// The code at `[outer, lane]`.
    pub fn get(self, outer: usize, lane: usize) -> u8 {
        places(self.bits, self.lanes, outer, lane)
            .into_iter()
            .flatten()
            .fold(0, |code, p| code | (self.data[p.byte] >> p.shift & p.mask) << p.up)
    }
}

/// Packs one block, `codes` `[8, lanes]` one a byte, into the `bits * lanes` bytes of `packed`, whose bits at rows
/// with a code other than 0 must still be 0.
pub fn pack_block(bits: u8, codes: &[u8], packed: &mut [u8]) {
    let lanes = codes.len() / BLOCK;
    for (o, codes) in codes.chunks_exact(lanes).enumerate() {
        for p in places(bits, lanes, o, 0).into_iter().flatten() {
            for (byte, code) in packed[p.byte..p.byte + lanes].iter_mut().zip(codes) {
                *byte |= (code >> p.up & p.mask) << p.shift;
            }
        }
    }
}

/// Where some bits of a code lie: `mask` at `shift` of `byte`, worth `1 << up` in the code.
struct Place {
    byte: usize,
    shift: usize,
    mask: u8,
    up: usize,
}

fn places(bits: u8, lanes: usize, outer: usize, lane: usize) -> [Option<Place>; 2] {
    let (block, o) = (outer / BLOCK, outer % BLOCK);
    let byte = |row: usize| (block * usize::from(bits) + row) * lanes + lane;
    match bits {
        8 => [Some(Place { byte: byte(o), shift: 0, mask: 0xff, up: 0 }), None],
        4 => [Some(Place { byte: byte(o / 2), shift: o % 2 * 4, mask: 0xf, up: 0 }), None],
        2 => [Some(Place { byte: byte(o / 4), shift: o % 4 * 2, mask: 3, up: 0 }), None],
        _ => [
            Some(Place { byte: byte(o / 4), shift: o % 4 * 2, mask: 3, up: 0 }),
            Some(Place { byte: byte(2), shift: o, mask: 1, up: 2 }),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_put_is_got(bits in prop::sample::select(vec![2u8, 3, 4, 8]), blocks in 1usize..4, lane_blocks in 1usize..5, seed: u64) {
            let (outer, lanes) = (blocks * BLOCK, lane_blocks * BLOCK);
            let code = |o: usize, l: usize| {
                ((seed ^ (o * 31 + l) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8 & (u8::MAX >> (8 - bits))
            };
            let mut data = vec![0; packed_len(bits, outer, lanes)];
            for (b, packed) in data.chunks_exact_mut(usize::from(bits) * lanes).enumerate() {
                let block: Vec<u8> = (0..BLOCK * lanes).map(|i| code(b * BLOCK + i / lanes, i % lanes)).collect();
                pack_block(bits, &block, packed);
            }
            let codes = Codes::new(bits, lanes, &data);
            prop_assert_eq!(codes.outer(), outer);
            for o in 0..outer {
                for l in 0..lanes {
                    prop_assert_eq!(codes.get(o, l), code(o, l));
                }
            }
        }
    }
}
