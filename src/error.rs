//! One error enum: what was wrong, what was given, what is accepted.

#![forbid(unsafe_code)]

use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::memory::OutOfMemory;

/// Everything that kvpack refuses. Each variant becomes a Python exception of its own class (`kvpack.errors`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An option's value is not accepted.
    #[error("{name}={given} is not accepted; accepted: {accepted}")]
    Option {
        /// The option's name as users write it.
        name: &'static str,
        /// The value that was given.
        given: String,
        /// The values that would do.
        accepted: String,
    },
    /// A tensor's shape does not fit the cache or its own companions.
    #[error("{what}: given {given}, expected {expected}")]
    Shape {
        /// Which tensor, and which of its sizes.
        what: &'static str,
        /// The size that was given.
        given: String,
        /// The size that would do.
        expected: String,
    },
    /// A tensor's dtype is not supported, or not the one that this cache holds.
    #[error("{what} has dtype {given}, expected {expected}")]
    Dtype {
        /// Which tensor.
        what: &'static str,
        /// Its dtype.
        given: String,
        /// The dtype that would do.
        expected: String,
    },
    /// A key or a value is NaN or infinite.
    #[error(
        "{what} hold a NaN or an infinity at [batch {}, head {}, token {}, dim {}]; only finite numbers are accepted",
        at[0], at[1], at[2], at[3]
    )]
    NonFinite {
        /// `"keys"` or `"values"`.
        what: &'static str,
        /// Index of the first such number.
        at: [usize; 4],
    },
    /// A key or a value is too large for the codec's scales.
    #[error(
        "{what} hold a number beyond {limit} in magnitude at [batch {}, head {}, token {}, dim {}]; this codec stores its \
         scales as float16, use kvpack.Exact()",
        at[0], at[1], at[2], at[3]
    )]
    TooLarge {
        /// `"keys"` or `"values"`.
        what: &'static str,
        /// The largest magnitude accepted, rounded.
        limit: u64,
        /// Index of the first such number.
        at: [usize; 4],
    },
    /// A crop reaches tokens that are no longer held exactly.
    #[error("cannot remove {asked} tokens: {}", reach(*.reachable, *.seen))]
    Crop {
        /// Tokens that were to be removed.
        asked: usize,
        /// Tokens that can be removed.
        reachable: usize,
        /// Tokens that were seen.
        seen: usize,
    },
    /// The cache is in use by another thread at this moment.
    #[error("this cache is in use by another thread; give each thread its own cache (cache.fork() shares the pages)")]
    Busy,
    /// A function that the cache calls asks the cache.
    #[error(
        "this cache is calling the function that asks it something, in the midst of a change; such a function sees what it is given \
         alone"
    )]
    Reentered,
    /// Keys or values of an earlier state of a layer are used.
    #[error(
        "these keys and values were returned by an earlier update (given version {given}, expected {expected}): the cache has \
         changed since, use what the last update returned; is another thread using it?"
    )]
    Stale {
        /// The version that was given.
        given: u64,
        /// The layer's.
        expected: u64,
    },
    /// The system has no memory left for something large.
    #[error("no memory for {bytes} bytes more; free some, or take fewer bits, fewer tokens or a smaller batch")]
    Memory {
        /// How many bytes were wanted.
        bytes: usize,
    },
    /// Code of the caller's failed, which a method calls: what it raised.
    #[error("a function of the caller's failed: {0:?}")]
    Raised(Raised),
    /// A defect of kvpack itself.
    #[error("internal error, please report it: {0}")]
    Internal(String),
}

/// How far a crop may go, and why no further.
fn reach(reachable: usize, seen: usize) -> String {
    if reachable == seen {
        return format!("only {seen} were seen");
    }
    format!(
        "at most {reachable} can be removed exactly, older ones are packed with loss; call activate_past_recording() before the \
         tokens that may have to go, or keep a fork() of the cache"
    )
}

/// What code of the caller's raised, to be handed back to the caller as it is.
#[derive(Clone)]
pub struct Raised(pub Arc<dyn Any + Send + Sync>);

impl PartialEq for Raised {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Raised {}

impl fmt::Debug for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an error of its own")
    }
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Refuses an option.
///
/// # Errors
/// [`Error::Option`], always.
pub fn refuse<T>(name: &'static str, given: impl fmt::Display, accepted: impl Into<String>) -> Result<T> {
    Err(Error::Option { name, given: given.to_string(), accepted: accepted.into() })
}

/// Turns a panic of `f` into an error.
///
/// # Errors
/// Those of `f`; [`Error::Memory`] where memory was refused; else [`Error::Internal`].
pub fn caught<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        if let Some(&OutOfMemory { bytes }) = panic.downcast_ref() {
            return Err(Error::Memory { bytes });
        }
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).into()));
        Err(Error::Internal(text.unwrap_or_else(|| "unknown panic".into())))
    })
}
