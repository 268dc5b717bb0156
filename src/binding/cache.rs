//! The Python class around [`cache::Cache`]: its lock. What it does is in files by use: [`super::step`], [`super::rows`],
//! [`super::look`].

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use pyo3::prelude::*;

use super::errors::to_python;
use super::methods::{Layer, Share};
use crate::cache;
use crate::error::{Error, Result, caught};

/// Keys and values of a model's layers. Tensors are `(pointer, dtype, shape, strides)`.
#[pyclass(frozen, module = "kvpack._kvpack")]
pub(super) struct Cache(Mutex<cache::Cache>);

thread_local! {
    /// The caches that this thread is at work in. A method may call a function of Python's, which must not wait for one of them.
    static HELD: RefCell<Vec<*const Mutex<cache::Cache>>> = const { RefCell::new(Vec::new()) };
}

/// A locked cache.
pub(super) struct Locked<'a>(MutexGuard<'a, cache::Cache>);

impl<'a> Locked<'a> {
    fn new(of: &Mutex<cache::Cache>, guard: MutexGuard<'a, cache::Cache>) -> Self {
        HELD.with_borrow_mut(|held| held.push(of));
        Self(guard)
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        HELD.with_borrow_mut(Vec::pop);
    }
}

impl Deref for Locked<'_> {
    type Target = cache::Cache;

    fn deref(&self) -> &cache::Cache {
        &self.0
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut cache::Cache {
        &mut self.0
    }
}

impl Cache {
    /// Waits while another thread is at work.
    pub(super) fn lock(&self) -> Result<Locked<'_>> {
        if HELD.with_borrow(|held| held.contains(&std::ptr::from_ref(&self.0))) {
            return Err(Error::Reentered);
        }
        Ok(Locked::new(&self.0, self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Does not wait: `None` while a thread is at work.
    pub(super) fn try_lock(&self) -> Option<Locked<'_>> {
        let guard = match self.0.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(Locked::new(&self.0, guard))
    }

    /// Changes it, without the GIL: waits while another thread is at work. Afterwards Python brings back what it holds itself of
    /// forwards that were rolled back.
    pub(super) fn change<R: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&mut cache::Cache) -> Result<R> + Send,
    ) -> PyResult<R> {
        let changed = py.detach(|| {
            let mut cache = self.lock()?;
            Ok((caught(|| f(&mut cache)), cache.take_undone(), cache.take_abandoned()))
        });
        let (result, undone, abandoned) = changed.map_err(|e| to_python(py, &e))?;
        for undo in undone {
            if let Some(undo) = undo.downcast_ref::<Py<PyAny>>() {
                undo.call0(py)?;
            }
        }
        if let Some(layers) = abandoned {
            py.import("kvpack._forwards")?.call_method1("rolled_back", layers)?;
        }
        result.map_err(|e| to_python(py, &e))
    }

    /// Looks at it; while somebody changes it, waits without the GIL.
    pub(super) fn look<R: Send>(
        &self,
        py: Python<'_>,
        f: impl FnOnce(&cache::Cache) -> Result<R> + Send,
    ) -> PyResult<R> {
        let result = match self.try_lock() {
            Some(cache) => caught(|| f(&cache)),
            None => py.detach(|| self.lock().and_then(|cache| caught(|| f(&cache)))),
        };
        result.map_err(|e| to_python(py, &e))
    }

    pub(super) fn holding(cache: cache::Cache) -> Self {
        Self(Mutex::new(cache))
    }
}

#[pymethods]
impl Cache {
    /// Empty layers; `None` are held elsewhere. `shared` are those that other layers read too, `last` is the last one that forwards
    /// come to, `last_is_read` whether attention reads that one, `share` says which layers read what others hold.
    #[new]
    #[pyo3(signature = (layers, shared, *, last, last_is_read, share=None))]
    fn new(
        layers: Vec<Option<Py<Layer>>>,
        shared: Vec<bool>,
        last: usize,
        last_is_read: bool,
        share: Option<&Share>,
    ) -> Self {
        let layer = |(layer, shared): (Option<Py<Layer>>, bool)| layer.map(|layer| (layer.get().0.clone(), shared));
        let cache = cache::Cache::new(layers.into_iter().zip(shared).map(layer).collect(), last, last_is_read);
        Self::holding(match share {
            Some(share) => cache.with_share(&*share.0),
            None => cache,
        })
    }
}
