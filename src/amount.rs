//! How many tokens: so many, or a share.

#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// A number of tokens, or a share of some.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Amount {
    /// So many.
    Tokens(usize),
    /// From 0 to 1.
    Share(f64),
}

impl Amount {
    /// In tokens, where a share is one of `all`; parts of a token do not count.
    pub fn tokens(self, all: usize) -> usize {
        match self {
            Self::Tokens(n) => n,
            Self::Share(share) => (share * all as f64) as usize,
        }
    }

    /// Checks that it is above 0, or with `none` at least 0, and no share beyond 1.
    ///
    /// # Errors
    /// [`Error::Option`] for `name` when it is not.
    pub fn check(self, name: &'static str, none: bool) -> Result<()> {
        let refuse = |given: String, accepted: &str| Err(Error::Option { name, given, accepted: accepted.into() });
        match self {
            Self::Tokens(0) if !none => {
                refuse("0".into(), "whole numbers of tokens from 1, or a share above 0 up to 1.0")
            }
            Self::Share(share) if !(share <= 1.0 && (share > 0.0 || none && share == 0.0)) => {
                refuse(share.to_string(), "a share above 0 up to 1.0, or a whole number of tokens")
            }
            _ => Ok(()),
        }
    }
}
