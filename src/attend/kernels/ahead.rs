//! Bytes that will be read next, asked for while others are worked on.
//!
//! Pages lie apart in memory, so the CPU's own prefetcher has to find each one anew, which costs a few times the latency
//! of memory a page. All requests at once would only queue up: they are spread over the work before.

/// Bytes still to be asked for.
pub struct Ahead<'a>(&'a [u8]);

impl<'a> Ahead<'a> {
    const LINE: usize = 64;

    /// Nothing asked for yet of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Bytes still to be asked for.
    pub fn left(&self) -> usize {
        self.0.len()
    }

    /// Asks for the next `bytes`, or so many as are left.
    #[inline]
    pub fn fetch(&mut self, bytes: usize) {
        let (now, later) = self.0.split_at(bytes.next_multiple_of(Self::LINE).min(self.0.len()));
        self.0 = later;
        for line in now.iter().step_by(Self::LINE) {
            prefetch(line);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn prefetch(byte: &u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    // SAFETY: a prefetch touches nothing, whatever the address; every x86-64 CPU has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(byte).cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: &u8) {}
