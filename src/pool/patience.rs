//! A team is as slow as its last member. Where other processes keep the cores busy, that one may come milliseconds late
//! again and again, and then the caller is faster alone: it tries a team again after ten times what it lost, so that
//! such a machine costs it at most a tenth of its time.

#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, ThreadId};
use std::time::Instant;

/// Microseconds that a team may keep its caller waiting: sleeping threads wake within 60, and a
/// scheduler's time slice is 3000.
const LATE: u64 = 160;
const LATE_A_THREAD: u64 = 20;

/// Alone for so many times what was lost.
const ALONE: u64 = 10;

/// When teams may be tried again.
static ALONE_UNTIL: AtomicU64 = AtomicU64::new(0);

/// Microseconds since the first call.
fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_micros() as u64
}

/// Whether to work alone for now.
pub(super) fn is_over() -> bool {
    let until = ALONE_UNTIL.load(Ordering::Relaxed);
    until > 0 && now() < until
}

/// The caller's times, from before a team is called together until all of it has left.
pub(super) struct Caller {
    thread: ThreadId,
    start: u64,
    worked: AtomicU64,
}

impl Caller {
    /// The team is called.
    pub(super) fn new() -> Self {
        Self { thread: thread::current().id(), start: now(), worked: AtomicU64::new(0) }
    }

    /// Whether this thread is the caller.
    pub(super) fn is_here(&self) -> bool {
        thread::current().id() == self.thread
    }

    /// Does a member's work; how long it took is noted when the member is the caller.
    pub(super) fn time(&self, work: impl FnOnce()) {
        if self.is_here() {
            let start = now();
            work();
            self.worked.store(now() - start, Ordering::Relaxed);
        } else {
            work();
        }
    }

    /// All `items` are done, by up to `threads` members.
    pub(super) fn all_are_done(self, threads: usize, items: usize) {
        let (end, worked) = (now(), self.worked.into_inner());
        // When the caller found nothing left, the others had up to one item each at hand; items differ, so allow for two.
        let others = worked * 2 * threads as u64 / items as u64;
        let waited = end - self.start - worked;
        if waited > LATE + LATE_A_THREAD * threads as u64 + others {
            ALONE_UNTIL.store(end + ALONE * waited, Ordering::Relaxed);
        }
    }
}
