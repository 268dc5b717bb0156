//! kvpack makes the KV cache of transformers models small and fast on CPUs.
//!
//! The map of the house, from the bottom up; arrows run one way only:
//!
//! | room | what it is |
//! |---|---|
//! | `slabs` | the allocator of the Python package: apart from the heap of the process |
//! | [`memory`] | memory that may be refused |
//! | [`error`] | one error enum: what was wrong, what was given, what is accepted |
//! | [`amount`] | tokens, or a share of some |
//! | [`options`] | options by name |
//! | [`pool`] | threads: torch's own team, or ours |
//! | [`tensor`] | borrowed views over f32 / f16 / bf16 memory, and exact rows |
//! | [`linalg`] | small matrices, maps to other coordinates, rotary positions, random numbers |
//! | [`mod@format`] | packed codes, the grids that they count on, queries and weights as integers |
//! | [`kernels`] | the inner loops: one file an instruction set, and the loops once for all |
//! | [`attend`] | reading: segments, summaries, online softmax, one query and many |
//! | [`quantize`] | fewer bits: one file a method, one file a kind of page |
//! | [`evict`] | fewer tokens: one file a method, with what it remembers |
//! | [`select`] | fewer tokens read: one file a method, with its index of pages |
//! | [`compact`] | tokens that become slots or a state |
//! | [`prune`] | heads of which less is held |
//! | [`share`] | layers that read what others hold |
//! | [`cache`] | the manager: layers, sequences, KV heads, sides, pages, tails, memory |
//! | `binding` | `PyO3` only: extract, validate, release the GIL, call, map the error |
//!
//! A forward's life: [`cache::Cache::update`] takes a layer's keys and values as they are, and flushes what earlier ones left;
//! [`cache::Cache::attend`] stores and reads them. Whatever fails, [`cache::Cache::roll_back`] undoes it in all layers.
//!
//! A layer's life: [`cache::Layer::append`] takes a forward's keys and values into exact tails,
//! [`cache::Layer::attend`] reads sealed pages and tails as they are, [`cache::Layer::flush`] does in its order what is
//! due: slide, stream, evict, compact, seal, index.

// The tests of the public interface name the crate as its users do.
#[cfg(test)]
extern crate self as kvpack;

pub mod amount;
pub mod attend;
#[cfg(feature = "python")]
mod binding;
pub mod cache;
pub mod compact;
pub mod error;
pub mod evict;
pub mod format;
pub mod kernels;
pub mod linalg;
pub mod memory;
pub mod options;
pub mod pool;
pub mod prune;
pub mod quantize;
pub mod select;
pub mod share;
#[cfg(target_os = "linux")]
pub mod slabs;
pub mod tensor;
#[cfg(test)]
mod tests;
