//! Threads: work is done by a team, of which the caller is one.
//!
//! There are two kinds of team. Beside torch it is the one of the OpenMP runtime that torch has loaded ([`use_openmp`]):
//! torch's threads spin on their cores after each of its operations, so any others would have to compete with them,
//! while they themselves are there within a microsecond. Everywhere else it is a pool of rayon's, whose threads sleep
//! meanwhile and are there within about 50 microseconds.

#![deny(unsafe_code)]

#[cfg(unix)]
mod openmp;
mod own;
mod patience;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::error::{Error, Result};
use patience::Caller;

/// Multiply-adds that are worth the OpenMP team: 14 microseconds of one thread at 75 a nanosecond, which is what decoding
/// reaches in the first cache levels. The team takes 3, and what it reads lies in the caches of one core at first.
const WORTH_OPENMP: usize = 1 << 20;

/// Multiply-adds that each thread of our own pool must have to be worth waking: 110 microseconds of one thread. It takes 50.
const WORTH_OWN: usize = 1 << 23;

const ENV: &str = "KVPACK_NUM_THREADS";

static THREADS: AtomicUsize = AtomicUsize::new(1);

thread_local! {
    /// Whether this thread is at work in a team.
    static MEMBER: Cell<bool> = const { Cell::new(false) };
}

/// Sets how many threads the next calls use: `n`, but at least one, and at most what `KVPACK_NUM_THREADS` says.
pub fn set_threads(n: usize) {
    THREADS.store(n.max(1), Ordering::Relaxed);
}

/// How many threads the next calls use.
pub fn threads() -> usize {
    THREADS.load(Ordering::Relaxed).min(most_threads().unwrap_or(usize::MAX))
}

/// The most threads that the environment variable `KVPACK_NUM_THREADS` allows.
///
/// # Errors
/// [`Error::Option`] when it is not a positive whole number.
pub fn most_threads() -> Result<usize> {
    static MOST: OnceLock<Result<usize>> = OnceLock::new();
    MOST.get_or_init(|| parse(&std::env::var_os(ENV).unwrap_or_default().to_string_lossy())).clone()
}

fn parse(most: &str) -> Result<usize> {
    match most.parse() {
        _ if most.is_empty() => Ok(usize::MAX),
        Ok(n) if n > 0 => Ok(n),
        _ => Err(Error::Option { name: ENV, given: most.into(), accepted: "a positive whole number".into() }),
    }
}

/// From now on this process uses the threads of the OpenMP runtime that is loaded, if there is one; says whether.
pub fn use_openmp() -> bool {
    #[cfg(unix)]
    openmp::find();
    openmp_library().is_some()
}

/// File name of the OpenMP library in use; `None` when threads are our own.
pub fn openmp_library() -> Option<&'static str> {
    #[cfg(unix)]
    return openmp::runtime().map(openmp::Runtime::library);
    #[cfg(not(unix))]
    None
}

/// For how many threads to cut work of that many multiply-adds. Unlike how many [`map`] then finds, it is always the same:
/// sums are added up in the same order, whatever else the machine does.
pub fn threads_for(work: usize) -> usize {
    let threads = threads();
    if threads == 1 || work < WORTH_OPENMP.min(WORTH_OWN) {
        1
    } else if openmp_library().is_some() {
        if work < WORTH_OPENMP { 1 } else { threads }
    } else {
        (work / WORTH_OWN).clamp(1, threads)
    }
}

/// `f` of every item, in the items' order; `work` is about how many multiply-adds all of it takes. Inside `f` a further
/// call runs on its caller alone.
///
/// # Panics
/// When `f` does, with the same payload.
pub fn map<T: Send, R: Send>(work: usize, items: Vec<T>, f: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    let threads = threads_for(work).min(items.len());
    if threads <= 1 || MEMBER.get() || patience::is_over() {
        return items.into_iter().map(f).collect();
    }
    let n = items.len();
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let queue = Mutex::new(items.into_iter().zip(&mut results));
    let next = || lock(&queue).next();
    in_team(threads, n, || {
        while let Some((item, result)) = next() {
            *result = Some(f(item));
        }
    });
    drop(queue);
    results.into_iter().map(|result| result.expect("an item that panicked ends the call")).collect()
}

/// Runs `work` on the caller and on up to `threads - 1` others at once; it is over when `items` are done.
fn in_team(threads: usize, items: usize, work: impl Fn() + Sync) {
    seated(threads, items, work, |member| run(threads, member));
}

/// [`in_team`] for a team that `run` calls together: it runs the member on the caller and on any number of others.
fn seated(threads: usize, items: usize, work: impl Fn() + Sync, run: impl FnOnce(&(dyn Fn() + Sync))) {
    let others = AtomicUsize::new(threads - 1);
    let panicked = Mutex::new(None);
    let caller = Caller::new();
    let member = || {
        // torch's team may be larger than wanted here. Asking for a smaller one would end some of its threads. The caller's
        // seat is kept for it, however late it comes: it would wait for the others otherwise.
        let seat = || others.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| free.checked_sub(1)).is_ok();
        if !caller.is_here() && !seat() {
            return;
        }
        MEMBER.set(true);
        caller.time(|| {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(&work)) {
                lock(&panicked).get_or_insert(panic);
            }
        });
        MEMBER.set(false);
    };
    run(&member);
    caller.all_are_done(threads, items);
    if let Some(panic) = panicked.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

fn run(threads: usize, member: &(dyn Fn() + Sync)) {
    #[cfg(unix)]
    if let Some(openmp) = openmp::runtime() {
        return openmp.run(THREADS.load(Ordering::Relaxed).max(threads), &member);
    }
    own::run(threads, member);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
