//! The `share` family: layers that read what another layer holds.
//!
//! To add a method: one file with a [`Share`], and a row in [`make`].

#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Result, refuse};
use crate::options::Options;

/// A method by which layers share what they hold.
pub trait Share: Debug + Send + Sync {
    /// The layer that holds the tokens of `layer`: itself, or an earlier one.
    fn source(&self, layer: usize) -> usize;
}

/// Every layer holds its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Apart;

impl Share for Apart {
    fn source(&self, layer: usize) -> usize {
        layer
    }
}

/// The method of that name.
///
/// # Errors
/// [`Error::Option`](crate::error::Error::Option) when there is none.
pub fn make(name: &str, _: &mut Options) -> Result<Arc<dyn Share>> {
    match name {
        "apart" => Ok(Arc::new(Apart)),
        _ => refuse("share", name, "apart"),
    }
}
