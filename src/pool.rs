//! Threads: an own rayon pool, as large as the caller says, made anew after a fork, and not used at all for
//! work that is smaller than the cost of waking it.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

/// Numbers (dequantised and multiplied) below which the calling thread does all of it: about a millisecond's worth.
/// torch's own threads spin on their cores for a while after each of its operations, so that inside a model a worker
/// that is woken for less comes too late to be of use.
const WORTH_WAKING: usize = 1 << 23;

static THREADS: AtomicUsize = AtomicUsize::new(1);

struct Pool {
    threads: usize,
    process: u32,
    workers: Arc<rayon::ThreadPool>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

/// Sets how many threads the next calls use; at least one.
pub fn set_threads(n: usize) {
    THREADS.store(n.max(1), Ordering::Relaxed);
}

/// How many threads the next calls use.
pub fn threads() -> usize {
    THREADS.load(Ordering::Relaxed)
}

/// `f` of every item, in the items' order; `work` is about how many numbers all of it touches.
pub fn map<T: Send, R: Send>(work: usize, items: Vec<T>, f: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    let threads = threads();
    let worth_waking = threads > 1 && items.len() > 1 && work >= WORTH_WAKING;
    match worth_waking.then(|| pool(threads)).flatten() {
        Some(pool) => pool.install(|| items.into_par_iter().map(f).collect()),
        None => items.into_iter().map(f).collect(),
    }
}

/// The pool of that size; `None` when the system refuses more threads, and then the caller works alone.
fn pool(threads: usize) -> Option<Arc<rayon::ThreadPool>> {
    let process = std::process::id();
    let mut slot = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(held) = slot.as_ref().filter(|held| held.threads == threads && held.process == process) {
        return Some(Arc::clone(&held.workers));
    }
    let workers =
        rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kvpack-{i}")).build().ok()?;
    let workers = Arc::new(workers);
    let old = slot.replace(Pool { threads, process, workers: Arc::clone(&workers) });
    if let Some(old) = old.filter(|old| old.process != process) {
        // Its threads stayed in the parent process: joining them here would wait for ever.
        std::mem::forget(old);
    }
    Some(workers)
}
