//! Mappings that were given back: buffers of a step of attention come again at once, in about the same size.

use std::ptr::null_mut;

use super::system;

/// How many are kept, and how many bytes of them.
const MOST_KEPT: usize = 8;
pub(super) const BYTES_KEPT: usize = 8 << 20;

/// Kept mappings with their sizes, the oldest first.
pub(super) struct Maps {
    kept: [(*mut u8, usize); MOST_KEPT],
    n: usize,
    bytes: usize,
}

impl Maps {
    pub(super) const fn new() -> Self {
        Self { kept: [(null_mut(), 0); MOST_KEPT], n: 0, bytes: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// One of `size` bytes, the newest; null where none is kept.
    pub(super) fn take(&mut self, size: usize) -> *mut u8 {
        let newest = self.kept[..self.n].iter().rposition(|&(_, kept)| kept == size);
        newest.map_or(null_mut(), |i| self.remove(i))
    }

    /// Keeps one that nobody uses, in place of the oldest ones; the largest go back at once.
    pub(super) unsafe fn give_back(&mut self, p: *mut u8, size: usize) {
        // SAFETY: by the caller's contract, and of all that are kept, nobody uses them.
        unsafe {
            if size > BYTES_KEPT {
                return system::unmap(p, size, super::PAGE);
            }
            while self.n == MOST_KEPT || self.bytes + size > BYTES_KEPT {
                self.drop_oldest();
            }
            self.kept[self.n] = (p, size);
            (self.n, self.bytes) = (self.n + 1, self.bytes + size);
        }
    }

    /// Gives all of them back to the system.
    pub(super) fn clear(&mut self) {
        while self.n > 0 {
            // SAFETY: nobody uses it.
            unsafe { self.drop_oldest() };
        }
    }

    unsafe fn drop_oldest(&mut self) {
        let size = self.kept[0].1;
        let p = self.remove(0);
        // SAFETY: by the caller's contract.
        unsafe { system::unmap(p, size, super::PAGE) };
    }

    fn remove(&mut self, i: usize) -> *mut u8 {
        let (p, size) = self.kept[i];
        self.kept.copy_within(i + 1..self.n, i);
        (self.n, self.bytes) = (self.n - 1, self.bytes - size);
        p
    }
}
