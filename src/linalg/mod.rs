//! Small matrices, changes of coordinates, rotary positions, random numbers.

mod map;
#[cfg(test)]
mod map_tests;
mod mat;
mod random;
mod rope;

pub use map::{Map, MappedRows, Matrix};
pub use mat::{Mat, MatMut};
pub use random::random;
pub use rope::{Rope, Rotate, SPAN};
