//! Memory that may be refused: what is large, or made for every page, is asked for here, so that a system without memory
//! is an error of one call and not the end of the process.

#![forbid(unsafe_code)]

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicIsize, Ordering};

/// What a refusal unwinds with, to the border of the crate: there it becomes [`crate::error::Error::Memory`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemory {
    /// How many bytes were wanted.
    pub bytes: usize,
}

/// Room for exactly `more` numbers beside those that `numbers` holds.
///
/// # Panics
/// With [`OutOfMemory`] when there is none.
#[inline]
pub fn reserve<T>(numbers: &mut Vec<T>, more: usize) {
    if more > numbers.capacity() - numbers.len() {
        grow(numbers, more);
    }
}

/// Buffers that are used again have the room, so that this is rare.
#[cold]
fn grow<T>(numbers: &mut Vec<T>, more: usize) {
    if is_last() || !is_there() || numbers.try_reserve_exact(more).is_err() {
        // Without the panic hook: this is an answer, not a defect.
        resume_unwind(Box::new(OutOfMemory { bytes: (numbers.len() + more).saturating_mul(size_of::<T>()) }));
    }
}

/// Which of the next requests is to be refused; 0, or less after it was, when none is.
static SERVED: AtomicIsize = AtomicIsize::new(0);

/// Has the `n`-th request from now on be refused, whichever thread's it is, as if there were no memory: for tests of what a
/// fault leaves behind. 0: none. Returns how many requests were to be served yet.
pub fn refuse(n: usize) -> usize {
    SERVED.swap(n.cast_signed(), Ordering::Relaxed).max(0).cast_unsigned()
}

/// Whether this request is the one to be refused.
fn is_last() -> bool {
    SERVED.load(Ordering::Relaxed) > 0 && SERVED.fetch_sub(1, Ordering::Relaxed) == 1
}

/// No numbers, with room for `n`.
///
/// # Panics
/// As [`reserve`].
pub fn with_capacity<T>(n: usize) -> Vec<T> {
    let mut numbers = Vec::new();
    reserve(&mut numbers, n);
    numbers
}

/// `n` times `value`.
///
/// # Panics
/// As [`reserve`].
pub fn filled<T: Clone>(value: T, n: usize) -> Vec<T> {
    let mut numbers = with_capacity(n);
    numbers.resize(n, value);
    numbers
}

/// `n` zeros.
///
/// # Panics
/// As [`reserve`].
pub fn zeros<T: Clone + Default>(n: usize) -> Vec<T> {
    filled(T::default(), n)
}

/// A copy.
///
/// # Panics
/// As [`reserve`].
pub fn copied<T: Copy>(numbers: &[T]) -> Vec<T> {
    let mut copy = with_capacity(numbers.len());
    copy.extend_from_slice(numbers);
    copy
}

/// Adds `more` at the end; amortised over many small calls.
///
/// # Panics
/// As [`reserve`].
pub fn append<T: Copy>(numbers: &mut Vec<T>, more: &[T]) {
    if more.len() > numbers.capacity() - numbers.len() {
        reserve(numbers, more.len().max(numbers.len()));
    }
    numbers.extend_from_slice(more);
}

/// Makes `numbers` `n` long, with zeros at the end.
///
/// # Panics
/// As [`reserve`].
#[inline]
pub fn resize<T: Clone + Default>(numbers: &mut Vec<T>, n: usize) {
    reserve(numbers, n.saturating_sub(numbers.len()));
    numbers.resize(n, T::default());
}

/// All items.
///
/// # Panics
/// As [`reserve`].
pub fn collected<T>(items: impl ExactSizeIterator<Item = T>) -> Vec<T> {
    let mut all = with_capacity(items.len());
    all.extend(items);
    all
}

/// Whether the allocator can still serve small requests, which cannot be refused.
fn is_there() -> bool {
    #[cfg(target_os = "linux")]
    return crate::slabs::refill();
    #[cfg(not(target_os = "linux"))]
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::catch_unwind;

    #[test]
    fn what_cannot_be_had_unwinds_with_its_size() {
        let refused = |ask: fn()| *catch_unwind(ask).unwrap_err().downcast::<OutOfMemory>().unwrap();
        assert_eq!(refused(|| drop(zeros::<f32>(1 << 60))), OutOfMemory { bytes: 1 << 62 });
        assert_eq!(refused(|| drop(with_capacity::<u8>(1 << 62))), OutOfMemory { bytes: 1 << 62 });
        assert_eq!(refused(|| drop(filled(1u64, usize::MAX))), OutOfMemory { bytes: usize::MAX });
        assert_eq!(refused(|| resize(&mut vec![1.0f32], 1 << 60)), OutOfMemory { bytes: 1 << 62 });
        assert_eq!(refused(|| reserve(&mut vec![0u8; 8], (1 << 62) - 8)), OutOfMemory { bytes: 1 << 62 });
    }

    #[test]
    fn what_is_there_is_as_asked() {
        assert_eq!(zeros::<u32>(3), [0, 0, 0]);
        assert_eq!(filled(2.0, 2), [2.0, 2.0]);
        assert_eq!(copied(&[1, 2]), [1, 2]);
        assert_eq!(collected([1, 2].into_iter()), [1, 2]);
        let mut numbers = copied(&[1, 2, 3]);
        resize(&mut numbers, 5);
        assert_eq!(numbers, [1, 2, 3, 0, 0]);
        append(&mut numbers, &[7, 8]);
        assert_eq!(numbers, [1, 2, 3, 0, 0, 7, 8]);
        resize(&mut numbers, 1);
        assert_eq!(numbers, [1]);
        let room = with_capacity::<f64>(7);
        assert!(room.is_empty() && room.capacity() >= 7);
    }
}
