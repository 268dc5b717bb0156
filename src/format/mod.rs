//! Formats: small integers in words, the grids that they count on, and queries and weights as integers.

pub mod codes;
pub mod folded;
pub mod packed;

pub use codes::{Codes, Levels};
pub use folded::Folded;
pub use packed::{Grids, Packed};

/// `n` rounded up to a multiple of eight lanes.
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(codes::LANES)
}

/// Rows of a tile of keys of `dim` numbers: whole blocks of codes.
pub fn tile_rows(dim: usize) -> usize {
    dim.next_multiple_of(codes::MOST_OUTER)
}
