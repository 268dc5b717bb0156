//! A rayon pool, for where torch's threads are not.

#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use rayon::{ThreadPool, ThreadPoolBuilder};

/// The pool, and the process whose threads it has: a fork has none of them.
static POOL: Mutex<Option<(u32, Arc<ThreadPool>)>> = Mutex::new(None);

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

/// The pool, with at least so many threads; `None` when the system grants them not, or another caller is at it.
fn pool(threads: usize) -> Option<Arc<ThreadPool>> {
    // Who forks may leave the lock taken in the child, for ever: nobody waits for it.
    let mut held = POOL.try_lock().ok()?;
    let process = std::process::id();
    match held.take() {
        Some((owner, pool)) if owner == process && pool.current_num_threads() >= threads => *held = Some((owner, pool)),
        // What is left of the parent's pool is let be: its end would be told to threads that are not there.
        Some((owner, pool)) if owner != process => std::mem::forget(pool),
        _ => {}
    }
    if held.is_none() {
        let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("kvpack-{i}")).build().ok()?;
        *held = Some((process, Arc::new(pool)));
    }
    held.as_ref().map(|(_, pool)| Arc::clone(pool))
}
