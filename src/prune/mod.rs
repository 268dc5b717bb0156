//! The `prune` family: what is held of each KV head: all of it, fewer bits, the first and the newest tokens, fewer numbers of keys
//! and values, or nothing.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use crate::compact::Compactor;
use crate::error::{Result, refuse};
use crate::linalg::Map;
use crate::quantize::Codecs;

/// What is held of a KV head, where that is not all of it, stored as the layer's heads are.
#[derive(Clone, Debug, Default)]
pub struct Pruned {
    /// Which tokens.
    pub tokens: Tokens,
    /// How they are stored; `None`: as those of the layer.
    pub codecs: Option<Codecs>,
    /// The coordinates of keys, of as many numbers or fewer; `None`: the model's.
    pub keys: Option<Arc<Map>>,
    /// Those of values.
    pub values: Option<Arc<Map>>,
}

/// The tokens that a KV head holds.
#[derive(Clone, Debug, Default)]
pub enum Tokens {
    /// Those that evictions leave.
    #[default]
    All,
    /// The first and the newest ones.
    Streaming(Streaming),
    /// None: the head's output is 0.
    Gone,
}

/// The first and the newest tokens of a sequence, as in `StreamingLLM` (arXiv 2309.17453), but of some heads alone.
#[derive(Clone, Debug)]
pub struct Streaming {
    /// How many of the first tokens stay.
    pub sinks: usize,
    /// How many of the newest ones.
    pub window: usize,
    /// What becomes of the others; `None`: nothing.
    pub compactor: Option<Arc<dyn Compactor>>,
}

impl Streaming {
    /// So many at least leave together: pages are cut, and sequences copied for a forward that may fail, that much more rarely.
    pub fn together(&self) -> usize {
        (self.window / 8).clamp(1, 32)
    }
}

/// A method that holds less of some heads.
pub trait Prune: Debug + Send + Sync {
    /// What is held of KV head number `head` of the layer, whose keys have `key_dim` numbers and values `value_dim`; `None`: all.
    fn head(&self, head: usize, key_dim: usize, value_dim: usize) -> Option<Arc<Pruned>>;

    /// The codecs that some heads have of their own.
    fn codecs(&self) -> Vec<&Codecs> {
        Vec::new()
    }

    /// Whether some head lets tokens go, whatever an eviction does.
    fn is_ragged(&self) -> bool {
        false
    }

    /// Checks that a layer has so many KV heads.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when the method was made for another number.
    fn check(&self, _heads: usize) -> Result<()> {
        Ok(())
    }
}

/// What was chosen for some KV heads of a layer, by number; of all others everything is held.
#[derive(Clone, Debug)]
pub struct Heads(BTreeMap<usize, Arc<Pruned>>);

/// What holds of some heads so much, by number, and of all others everything.
///
/// # Errors
/// [`Error::Option`](crate::error::Error::Option) for a window of no tokens.
pub fn make(heads: impl IntoIterator<Item = (usize, Pruned)>) -> Result<Arc<dyn Prune>> {
    Ok(Arc::new(Heads::new(heads)?))
}

impl Heads {
    fn new(heads: impl IntoIterator<Item = (usize, Pruned)>) -> Result<Self> {
        let heads: BTreeMap<_, _> = heads.into_iter().map(|(h, head)| (h, Arc::new(head))).collect();
        for head in heads.values() {
            if let Tokens::Streaming(Streaming { window: 0, .. }) = head.tokens {
                return refuse("window", 0, "whole numbers from 1");
            }
        }
        Ok(Self(heads))
    }
}

impl Prune for Heads {
    fn head(&self, head: usize, _: usize, _: usize) -> Option<Arc<Pruned>> {
        self.0.get(&head).cloned()
    }

    fn codecs(&self) -> Vec<&Codecs> {
        self.0.values().filter_map(|head| head.codecs.as_ref()).collect()
    }

    fn is_ragged(&self) -> bool {
        self.0.values().any(|head| !matches!(head.tokens, Tokens::All))
    }

    fn check(&self, heads: usize) -> Result<()> {
        match self.0.last_key_value() {
            Some((&last, _)) if last >= heads => {
                refuse("prune", format!("KV head {last}"), format!("KV heads below {heads}, as many as this layer has"))
            }
            _ => Ok(()),
        }
    }
}
