//! Options by name, as a method's caller gives them: each method takes its own, and what nobody takes is refused.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::amount::Amount;
use crate::error::{Result, refuse};

/// What an option is given.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Yes or no.
    Flag(bool),
    /// A whole number.
    Whole(i64),
    /// Any number.
    Number(f64),
    /// A word.
    Text(String),
    /// Numbers in a row.
    Numbers(Vec<f32>),
    /// Rows of numbers.
    Table(Vec<Vec<f32>>),
    /// Pairs of whole numbers.
    Pairs(Vec<(i64, i64)>),
    /// Options of its own.
    Options(Options),
}

/// Options that were given and not yet taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options(BTreeMap<String, Value>);

impl Options {
    /// These, by name.
    pub fn new(given: impl IntoIterator<Item = (String, Value)>) -> Self {
        Self(given.into_iter().collect())
    }

    /// Whether nothing was given, or all of it taken.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes an option, if it was given.
    fn take<T>(
        &mut self,
        name: &'static str,
        accepted: &str,
        read: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(given) => match read(&given) {
                Some(value) => Ok(Some(value)),
                None => refuse(name, format!("{given:?}"), accepted),
            },
        }
    }

    /// Takes an option that has to be there.
    fn require<T>(&mut self, name: &'static str, accepted: &str, read: impl FnOnce(&Value) -> Option<T>) -> Result<T> {
        match self.take(name, accepted, read)? {
            Some(value) => Ok(value),
            None => refuse(name, "nothing", accepted),
        }
    }

    /// A whole number of that type.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option), as all of these, when it is not there or none.
    pub fn whole<T: TryFrom<i64>>(&mut self, name: &'static str) -> Result<T> {
        self.require(name, "whole numbers", read_whole)
    }

    /// A whole number, or nothing.
    ///
    /// # Errors
    /// When it is none.
    pub fn maybe_whole<T: TryFrom<i64>>(&mut self, name: &'static str) -> Result<Option<T>> {
        self.take(name, "whole numbers, or None", read_whole)
    }

    /// A number.
    ///
    /// # Errors
    /// When it is not there or none.
    pub fn number(&mut self, name: &'static str) -> Result<f32> {
        self.require(name, "numbers", read_number)
    }

    /// A number, or nothing.
    ///
    /// # Errors
    /// When it is none.
    pub fn maybe_number(&mut self, name: &'static str) -> Result<Option<f32>> {
        self.take(name, "numbers, or None", read_number)
    }

    /// Yes or no; not given: no.
    ///
    /// # Errors
    /// When it is neither.
    pub fn flag(&mut self, name: &'static str) -> Result<bool> {
        let read = |value: &Value| if let Value::Flag(flag) = value { Some(*flag) } else { None };
        Ok(self.take(name, "True, False", read)?.unwrap_or(false))
    }

    /// A word.
    ///
    /// # Errors
    /// When it is not there or none.
    pub fn text(&mut self, name: &'static str) -> Result<String> {
        let read = |value: &Value| if let Value::Text(text) = value { Some(text.clone()) } else { None };
        self.require(name, "words", read)
    }

    /// Tokens, or a share.
    ///
    /// # Errors
    /// When it is not there or neither.
    pub fn amount(&mut self, name: &'static str) -> Result<Amount> {
        let read = |value: &Value| match value {
            Value::Whole(n) => usize::try_from(*n).ok().map(Amount::Tokens),
            Value::Number(share) => Some(Amount::Share(*share)),
            _ => None,
        };
        self.require(name, "a whole number of tokens, or a share", read)
    }

    /// Numbers in a row.
    ///
    /// # Errors
    /// When they are not there or none.
    pub fn numbers(&mut self, name: &'static str) -> Result<Vec<f32>> {
        self.require(name, "a list of numbers", read_numbers)
    }

    /// Numbers in a row, or nothing.
    ///
    /// # Errors
    /// When they are none.
    pub fn maybe_numbers(&mut self, name: &'static str) -> Result<Option<Vec<f32>>> {
        self.take(name, "a list of numbers, or None", read_numbers)
    }

    /// Rows of numbers, or nothing.
    ///
    /// # Errors
    /// When they are none.
    pub fn table(&mut self, name: &'static str) -> Result<Option<Vec<Vec<f32>>>> {
        let read = |value: &Value| match value {
            Value::Table(rows) => Some(rows.clone()),
            Value::Pairs(pairs) => Some(pairs.iter().map(|&(a, b)| vec![a as f32, b as f32]).collect()),
            Value::Numbers(none) if none.is_empty() => Some(Vec::new()),
            _ => None,
        };
        self.take(name, "lists of numbers", read)
    }

    /// Pairs of whole numbers; not given: none.
    ///
    /// # Errors
    /// When they are no pairs.
    pub fn pairs<T: TryFrom<i64>>(&mut self, name: &'static str) -> Result<Vec<(T, T)>> {
        let read = |value: &Value| match value {
            Value::Pairs(pairs) => {
                pairs.iter().map(|&(a, b)| Some((T::try_from(a).ok()?, T::try_from(b).ok()?))).collect()
            }
            Value::Numbers(none) if none.is_empty() => Some(Vec::new()),
            _ => None,
        };
        Ok(self.take(name, "pairs of whole numbers", read)?.unwrap_or_default())
    }

    /// Options of an option, or nothing.
    ///
    /// # Errors
    /// When they are none.
    pub fn options(&mut self, name: &'static str) -> Result<Option<Self>> {
        let read = |value: &Value| if let Value::Options(options) = value { Some(options.clone()) } else { None };
        self.take(name, "options by name, or None", read)
    }

    /// What `make` makes of them, once all are taken.
    ///
    /// # Errors
    /// Those of `make`, or for what it left.
    pub fn all<T>(mut self, make: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let made = make(&mut self)?;
        match self.0.first_key_value() {
            None => Ok(made),
            Some((name, value)) => refuse("options", format!("{name}={value:?}"), "options that the method has"),
        }
    }
}

fn read_whole<T: TryFrom<i64>>(value: &Value) -> Option<T> {
    if let Value::Whole(n) = value { T::try_from(*n).ok() } else { None }
}

fn read_numbers(value: &Value) -> Option<Vec<f32>> {
    if let Value::Numbers(numbers) = value { Some(numbers.clone()) } else { None }
}

fn read_number(value: &Value) -> Option<f32> {
    match value {
        Value::Whole(n) => Some(*n as f32),
        Value::Number(x) => Some(*x as f32),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(given: &[(&str, Value)]) -> Options {
        Options::new(given.iter().map(|(name, value)| ((*name).into(), value.clone())))
    }

    #[test]
    fn options_are_taken_once_and_what_is_left_is_refused() {
        let given = options(&[("bits", Value::Whole(4)), ("share", Value::Number(0.5)), ("seed", Value::Whole(-1))]);
        let read = given.clone().all(|options| {
            assert_eq!(options.whole::<u8>("bits"), Ok(4));
            assert_eq!(options.amount("share"), Ok(Amount::Share(0.5)));
            assert!(options.whole::<u8>("bits").unwrap_err().to_string().contains("nothing"));
            assert!(options.whole::<u64>("seed").unwrap_err().to_string().contains("-1"));
            options.maybe_number("none")
        });
        assert_eq!(read, Ok(None));
        assert!(given.all(|options| options.whole::<u8>("bits")).unwrap_err().to_string().contains("seed"));
    }

    #[test]
    fn pairs_fit_their_type() {
        let pairs = |pairs: &[(i64, i64)]| options(&[("pairs", Value::Pairs(pairs.to_vec()))]).pairs::<u16>("pairs");
        assert_eq!(pairs(&[(0, 4), (1, 5)]), Ok(vec![(0, 4), (1, 5)]));
        assert!(pairs(&[(0, -1)]).is_err());
        assert!(pairs(&[(0, 1 << 16)]).is_err());
    }
}
