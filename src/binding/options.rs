//! Options by name: keyword arguments become [`Options`].

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyInt};

use super::errors::to_python;
use crate::error::refuse;
use crate::options::{Options, Value};

/// The options that a call was given; those that are `None` count as not given.
pub(super) fn options(given: Option<&Bound<'_, PyDict>>) -> PyResult<Options> {
    let mut read = Vec::new();
    for (name, value) in given.into_iter().flatten() {
        if !value.is_none() {
            read.push((name.extract::<String>()?, self::value(&value)?));
        }
    }
    Ok(Options::new(read))
}

fn value(given: &Bound<'_, PyAny>) -> PyResult<Value> {
    if let Ok(own) = given.cast::<PyDict>() {
        return Ok(Value::Options(options(Some(own))?));
    }
    if let Ok(flag) = given.cast::<PyBool>() {
        return Ok(Value::Flag(flag.is_true()));
    }
    if given.is_instance_of::<PyInt>() {
        return Ok(Value::Whole(given.extract()?));
    }
    if let Ok(text) = given.extract() {
        return Ok(Value::Text(text));
    }
    if let Ok(number) = given.extract() {
        return Ok(Value::Number(number));
    }
    if let Ok(pairs) = given.extract::<Vec<(i64, i64)>>()
        && !pairs.is_empty()
    {
        return Ok(Value::Pairs(pairs));
    }
    if let Ok(numbers) = given.extract() {
        return Ok(Value::Numbers(numbers));
    }
    if let Ok(rows) = given.extract() {
        return Ok(Value::Table(rows));
    }
    refuse("option", given.get_type(), "flags, numbers, words, lists of numbers, options by name")
        .map_err(|error| to_python(given.py(), &error))
}
