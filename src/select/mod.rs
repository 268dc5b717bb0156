//! The `select` family: which of the tokens that are held a step of decoding reads. Nothing is deleted.
//!
//! To add a method: one file with a [`Selector`] and its [`PageIndex`], and a row in [`make`].

#![forbid(unsafe_code)]

mod quest;

pub use quest::Quest;

use std::fmt::Debug;
use std::sync::Arc;

use crate::attend::{KeyChunk, KeySegment, Part, Scratch};
use crate::error::{Result, refuse};
use crate::linalg::Mat;
use crate::options::Options;

/// A method that reads less.
pub trait Selector: Debug + Send + Sync {
    /// What it wants to know of a KV head's pages: nothing yet.
    fn index(&self) -> Box<dyn PageIndex>;
}

/// What a selector knows of the pages of one KV head: pages of whole segments, oldest first, that do not grow any more.
pub trait PageIndex: Send + Sync {
    /// Tokens whose pages are known.
    fn covered(&self) -> usize;

    /// Adds the pages of one more segment of keys of `dim` numbers, the first that is not covered.
    fn cover(&mut self, keys: Part<'_, dyn KeySegment>, dim: usize, scratch: &mut Scratch);

    /// Multiply-adds that [`Self::chosen`] takes for one query of keys of `dim` numbers.
    fn work(&self, dim: usize) -> usize;

    /// The chunks of `keys` that queries `q` `[G, dim]` are to read, in their order; `None` when they are to read all.
    fn chosen<'a>(
        &self,
        keys: &[Part<'a, dyn KeySegment>],
        q: Mat<'_>,
        scratch: &mut Scratch,
    ) -> Option<Vec<KeyChunk<'a>>>;

    /// Forgets all that is known where only `tokens` tokens are left, fewer than are covered.
    fn truncate(&mut self, tokens: usize);

    /// What [`Self::restore`] wants to know.
    fn mark(&self) -> IndexMark;

    /// Forgets the pages that were added since `mark`.
    fn restore(&mut self, mark: IndexMark);

    /// A copy.
    fn fork(&self) -> Box<dyn PageIndex>;
}

impl Clone for Box<dyn PageIndex> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

/// How much an index knew, and in how much memory.
#[derive(Clone, Copy, Debug)]
pub struct IndexMark {
    /// Pages.
    pub pages: usize,
    /// Their tokens.
    pub covered: usize,
    /// Room in its lists, in numbers.
    pub room: [usize; 3],
    /// Bytes allocated.
    pub bytes: usize,
}

/// The selector of that name.
///
/// # Errors
/// [`Error::Option`] when there is none, or an option is not accepted.
pub fn make(name: &str, options: &mut Options) -> Result<Arc<dyn Selector>> {
    match name {
        "quest" => Ok(Arc::new(Quest::from_options(options)?)),
        _ => refuse("select", name, "quest"),
    }
}
