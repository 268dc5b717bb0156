//! Bytes that will be read next, asked for while others are worked on.
//!
//! Pages lie apart in memory, so the CPU's own prefetcher has to find each one anew, which costs a few times the latency
//! of memory a page. All requests at once would only queue up: they are spread over the work before.

/// Cache lines still to be asked for.
pub struct Ahead<'a>(&'a [[u8; Ahead::LINE]]);

impl<'a> Ahead<'a> {
    /// Bytes of a line.
    pub const LINE: usize = 64;

    /// Nothing asked for yet of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes.as_chunks().0)
    }

    /// Lines still to be asked for.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// Asks for all lines at once, for the second level of the cache only: the first would have lost them when they are read.
    pub fn fetch_far(self) {
        for line in self.0 {
            prefetch::<true>(&line[0]);
        }
    }

    /// Asks for the next `lines`, or so many as are left.
    #[inline]
    pub fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            let Some((line, later)) = self.0.split_first() else { return };
            prefetch::<false>(&line[0]);
            self.0 = later;
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn prefetch<const FAR: bool>(byte: &u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    let byte = std::ptr::from_ref(byte).cast();
    // SAFETY: a prefetch touches nothing, whatever the address; every x86-64 CPU has it.
    unsafe { if FAR { _mm_prefetch::<_MM_HINT_T1>(byte) } else { _mm_prefetch::<_MM_HINT_T0>(byte) } };
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch<const FAR: bool>(_: &u8) {}
