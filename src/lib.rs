//! kvpack makes the KV cache of transformers models small and fast on CPUs.
//!
//! The map of the house, from the bottom up; arrows run one way only:
//!
//! | room | what it is |
//! |---|---|
//! | [`error`] | one error enum: what was wrong, what was given, what is accepted |
//! | [`tensor`] | borrowed views over f32 / f16 / bf16 memory, and exact rows |
//! | [`memory`] | memory that may be refused |
//! | `slabs` | the allocator of the Python package: apart from the heap of the process |
//! | [`pool`] | threads: torch's own team, or ours |
//! | [`attend`] | reading: segments, online softmax, one query and many; `kernels` has one file an instruction set, and the loops once for all |
//! | [`quantize`] | writing with fewer bits: one file a method |
//! | [`evict`] | writing fewer tokens: one file a method |
//! | [`cache`] | the manager: layers, sequences, KV heads, pages, tails, memory |
//! | `binding` | `PyO3` only: extract, validate, release the GIL, call, map the error |
//!
//! A forward's life: [`cache::Cache::update`] takes a layer's keys and values as they are, and settles what earlier ones left;
//! [`cache::Cache::attend`] stores and reads them. Whatever fails, [`cache::Cache::roll_back`] undoes it in all layers.
//!
//! A layer's life: [`cache::Layer::append`] takes a forward's keys and values into exact tails,
//! [`cache::Layer::attend`] reads sealed pages and tails as they are, [`cache::Layer::settle`] seals what the codec's
//! rule says is due.

// The tests of the public interface name the crate as its users do.
#[cfg(test)]
extern crate self as kvpack;

pub mod amount;
pub mod attend;
#[cfg(feature = "python")]
mod binding;
pub mod cache;
pub mod error;
pub mod evict;
pub mod memory;
pub mod pool;
pub mod quantize;
#[cfg(target_os = "linux")]
pub mod slabs;
pub mod tensor;
#[cfg(test)]
mod tests;
