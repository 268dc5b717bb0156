//! A team is as slow as its last member. Where other processes keep the cores busy, that one may come milliseconds late
//! again and again, and then the caller is faster alone: it tries a team again after ten times what it lost, so that
//! such a machine costs it at most a tenth of its time.

#![forbid(unsafe_code)]

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, ThreadId};
use std::time::Instant;

/// Microseconds that a member may be late: sleeping threads wake within 60, and a scheduler's time slice is 3000.
const LATE: u64 = 200;

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

/// The caller's times during one piece of work.
pub(super) struct Caller {
    thread: ThreadId,
    start: u64,
    done: AtomicU64,
}

impl Caller {
    /// The work starts.
    pub(super) fn new() -> Self {
        let start = now();
        Self { thread: thread::current().id(), start, done: AtomicU64::new(start) }
    }

    /// A member found nothing left to do; only the caller's own time counts.
    pub(super) fn is_done(&self) {
        if thread::current().id() == self.thread {
            self.done.store(now(), Ordering::Relaxed);
        }
    }

    /// All `items` are done, by up to `threads` members.
    pub(super) fn all_are_done(self, threads: usize, items: usize) {
        let (end, done) = (now(), self.done.into_inner());
        // When the caller found nothing left, the others had up to one item each at hand; items differ, so allow for two.
        let allowed = LATE + (done - self.start) * 2 * threads as u64 / items as u64;
        let lost = end - done;
        if lost > allowed {
            ALONE_UNTIL.store(end + ALONE * lost, Ordering::Relaxed);
        }
    }
}
