//! The `prune` family: KV heads, and numbers of keys and values, that are not held at all.
//!
//! To add a method: one file with a [`Prune`], and a row in [`make`].

#![forbid(unsafe_code)]

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Result, refuse};
use crate::linalg::Map;
use crate::options::Options;

/// What is held of a KV head.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Pruned {
    /// All.
    #[default]
    Whole,
    /// Nothing: its output is 0.
    Gone,
    /// Keys and values in coordinates of their own, of as many numbers or fewer.
    Sliced {
        /// Those of keys; `None`: the model's.
        keys: Option<Arc<Map>>,
        /// Those of values; `None`: the model's.
        values: Option<Arc<Map>>,
    },
}

impl Pruned {
    /// What leads to the coordinates of the head's keys, if they are not the model's.
    pub fn key_map(&self) -> Option<&Arc<Map>> {
        if let Self::Sliced { keys, .. } = self { keys.as_ref() } else { None }
    }

    /// What leads to the coordinates of the head's values, if they are not the model's.
    pub fn value_map(&self) -> Option<&Arc<Map>> {
        if let Self::Sliced { values, .. } = self { values.as_ref() } else { None }
    }
}

/// A method that holds less of some heads.
pub trait Prune: Debug + Send + Sync {
    /// What is held of KV head number `head` of the layer, whose keys have `key_dim` numbers and values `value_dim`.
    fn head(&self, head: usize, key_dim: usize, value_dim: usize) -> Pruned;
}

/// All heads are held whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep;

impl Prune for Keep {
    fn head(&self, _: usize, _: usize, _: usize) -> Pruned {
        Pruned::Whole
    }
}

/// The method of that name.
///
/// # Errors
/// [`Error::Option`](crate::error::Error::Option) when there is none.
pub fn make(name: &str, _: &mut Options) -> Result<Arc<dyn Prune>> {
    match name {
        "keep" => Ok(Arc::new(Keep)),
        _ => refuse("prune", name, "keep"),
    }
}
