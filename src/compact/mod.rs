//! The `compact` family: tokens that leave a KV head become something smaller that still takes weight, a few weighted slots or a
//! state of constant size.
//!
//! To add a method: one file with a [`Compactor`] and its [`Summary`], and a row in [`make`].

#![forbid(unsafe_code)]

mod mean;

pub use mean::Mean;

use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

use crate::attend::Summary;
use crate::error::{Result, refuse};
use crate::evict::NewestQueries;
use crate::options::Options;

/// Tokens that are about to leave a KV head, oldest first, in the head's coordinates.
pub struct Leaving<'a> {
    /// Number of the KV head in its layer.
    pub head: usize,
    /// Keys `[n, key dim]`, dequantised, rotated.
    pub keys: &'a [f32],
    /// Values `[n, value dim]`.
    pub values: &'a [f32],
    /// Positions.
    pub positions: &'a [u32],
    /// The newest queries, where the eviction remembers them.
    pub queries: Option<&'a NewestQueries>,
}

/// What stands for tokens that left.
pub trait Compacted: Summary + Any {}

impl<T: Summary + Any> Compacted for T {}

/// A method that keeps something of tokens that leave.
pub trait Compactor: Debug + Send + Sync {
    /// What stands for these tokens and, with `before`, for all that left earlier; `None`: nothing.
    fn compact(&self, leaving: &Leaving<'_>, before: Option<&Arc<dyn Compacted>>) -> Option<Arc<dyn Compacted>>;
}

/// Nothing is kept of them: what evictions do by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forget;

impl Compactor for Forget {
    fn compact(&self, _: &Leaving<'_>, _: Option<&Arc<dyn Compacted>>) -> Option<Arc<dyn Compacted>> {
        None
    }
}

/// The compactor of that name.
///
/// # Errors
/// [`Error::Option`](crate::error::Error::Option) when there is none.
pub fn make(name: &str, _: &mut Options) -> Result<Arc<dyn Compactor>> {
    match name {
        "forget" => Ok(Arc::new(Forget)),
        "mean" => Ok(Arc::new(Mean)),
        _ => refuse("compact", name, "forget, mean"),
    }
}
