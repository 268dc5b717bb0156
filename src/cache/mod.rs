//! The manager: who holds which tokens, in how many bytes.
//!
//! A [`Cache`] holds the layers of a model, and what a forward that is under way has changed in them: it is all or nothing.
//! [`cache`] is the only place that sees more than one layer. A [`Layer`] holds the sequences of a batch, a sequence its KV heads, a head two sides (keys and values) and the
//! positions of its tokens. A side is a list of sealed segments and an exact tail. Sequences and pages are shared
//! behind `Arc` and copied before a change, so beams, returned sequences and forks of a prompt cost one prompt; and a
//! [snapshot] of what was before a forward costs next to nothing.

#![forbid(unsafe_code)]

mod append;
#[allow(clippy::module_inception)] // what the room is called is what is in it
mod cache;
mod choose;
mod flush;
mod forward;
mod head;
mod layer;
mod look;
mod memory;
mod observe;
mod packed;
mod read;
mod recording;
mod rows;
mod seal;
mod side;
#[cfg(test)]
mod side_tests;
mod slide;
mod snapshot;
mod step;
mod stream;
mod tasks;

pub use append::{LayerQueries, New};
pub use cache::{Cache, Counts, Foreign, Given, Which};
pub use head::KvHead;
pub use layer::{Layer, Methods, Shape};
pub use memory::Memory;
pub use read::Request;
pub use side::Segment;
