//! A layer by its public interface: what it computes, and in how many bytes.
//!
//! They stand here and not beside the crate, because the kernels take minutes to compile: so the tests do it once.

mod attention;
mod filled;
mod heads;
mod kvquant;
mod memory;
mod sliding;
mod sockets;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The number of threads is the process's: whoever needs a certain one holds the guard meanwhile.
pub fn threads(n: usize) -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    kvpack::pool::set_threads(n);
    turn
}
