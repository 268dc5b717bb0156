//! Threads that live as long as one call. They are started in about 50 microseconds, not much later than sleeping ones
//! wake (40), and in return no state is left that a fork, a nested call or a second caller could stumble over.

#![forbid(unsafe_code)]

use std::thread::{Builder, scope};

/// Runs `member` on the caller and on `threads - 1` new threads, or as many as the system grants.
pub(super) fn run(threads: usize, member: &(impl Fn() + Sync)) {
    scope(|scope| {
        for i in 1..threads {
            if Builder::new().name(format!("kvpack-{i}")).spawn_scoped(scope, member).is_err() {
                break;
            }
        }
        member();
    });
}
