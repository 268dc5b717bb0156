//! A rayon pool, for where torch's threads are not.

#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rayon::{ThreadPool, ThreadPoolBuilder};

static POOL: Mutex<Option<Arc<ThreadPool>>> = Mutex::new(None);

/// The process that the pool's threads are of; a fork has none of them.
static PROCESS: AtomicU32 = AtomicU32::new(0);

/// Runs `member` on the caller and on `threads - 1` threads of the pool, or on as many as the system grants.
pub(super) fn run(threads: usize, member: &(dyn Fn() + Sync)) {
    match pool(threads - 1) {
        Some(pool) => pool.in_place_scope(|scope| {
            (1..threads).for_each(|_| scope.spawn(|_| member()));
            member();
        }),
        None => member(),
    }
}

/// The pool, with at least so many threads; `None` when the system grants them not.
fn pool(threads: usize) -> Option<Arc<ThreadPool>> {
    let here = std::process::id();
    let same =
        PROCESS.compare_exchange(0, here, Ordering::Relaxed, Ordering::Relaxed).map_or_else(|p| p == here, |_| true);
    // Where a fork left the lock taken, it is so for ever, and nobody waits for it.
    let mut held = if same { super::lock(&POOL) } else { POOL.try_lock().ok()? };
    if !same {
        // The parent's pool is let be: its end would be told to threads that are not there.
        std::mem::forget(held.take());
        PROCESS.store(here, Ordering::Relaxed);
    }
    if held.as_ref().is_none_or(|pool| pool.current_num_threads() < threads) {
        let name = |i| format!("kvpack-{i}");
        *held = Some(Arc::new(ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().ok()?));
    }
    held.clone()
}
