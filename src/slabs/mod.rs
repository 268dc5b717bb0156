//! The allocator of the Python package: its memory lies apart from the heap of the process.
//!
//! A prompt leaves thousands of pages of some kilobytes behind, each made between torch's tensors of many megabytes that come
//! and go. On one heap those pages, and even the few bytes that list them, settle in the gaps: the next large tensor fits
//! nowhere, and the process grows to several times what it holds. Here memory of about one size shares slabs.
//!
//! What is resident is what is held, and little more: sizes are rounded up by a sixteenth at most; empty slabs, but for a few,
//! go back to the system; and when what was given back in the other slabs exceeds 8 MB and a 32nd of what is held, the system
//! takes the memory behind half of it, and returns it as zeros when it is wanted again. What is larger than a slab's slots
//! has a mapping of its own; of those that were given back 8 MB are kept for the next of their size.
//!
//! Some slabs are kept that nobody has used yet: addresses, no memory. When the system refuses more, small requests are served
//! from them, so that an error can be made and reported. [`refill`] says whether they are whole; who asks for much, or often,
//! asks it first ([`crate::memory`]).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

mod heap;
mod maps;
mod slab;
mod system;

use heap::Heap;

/// Larger memory has a mapping of its own.
const MOST: usize = 1 << 17;
/// Bytes of a slab, and its alignment: the slab of an address is found by a mask. It is the size of a huge page, too.
const SLAB: usize = 1 << 21;
/// Sizes are rounded up to whole cache lines, which is also the alignment.
const LINE: usize = 64;
/// What the system gives and takes.
const PAGE: usize = 4096;
/// Classes between a size and twice that size.
const STEPS: usize = 16;
const CLASSES: usize = class_of(MOST) + 1;

/// The class of a size: the number of lines up to 16 of them, then the steps of a sixteenth of a power of two.
const fn class_of(size: usize) -> usize {
    let lines = size.div_ceil(LINE);
    let shift = if lines < STEPS { 0 } else { (lines / STEPS).ilog2() };
    shift as usize * STEPS + lines.div_ceil(1 << shift)
}

/// The largest size of a class.
const fn size_of_class(class: usize) -> usize {
    let shift = (class / STEPS).saturating_sub(1);
    ((class - shift * STEPS) << shift) * LINE
}

/// The allocator.
pub struct Slabs;

/// Whose memory of some layout is.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// A slot of a class in a slab.
    Slot(usize),
    /// A mapping of some bytes.
    Mapping(usize),
    /// Memory that is aligned to more than a line, of which there is next to none.
    System,
}

impl Place {
    fn of(layout: Layout) -> Self {
        match layout.size() {
            _ if layout.align() > LINE => Self::System,
            size @ ..=MOST => Self::Slot(class_of(size)),
            size => Self::Mapping(size_of_class(class_of(size))),
        }
    }
}

/// The heap of the process, with a lock that may be taken where no memory can be had.
struct Shared {
    locked: AtomicBool,
    heap: UnsafeCell<Heap>,
}

// SAFETY: the heap, and all slabs, are only touched under the lock.
unsafe impl Sync for Shared {}

static HEAP: Shared = Shared { locked: AtomicBool::new(false), heap: UnsafeCell::new(Heap::new()) };

/// Whether the reserve may have been touched.
static SHORT: AtomicBool = AtomicBool::new(false);

/// Whether small requests can be served for now: there is memory, or at least a reserve that is whole.
pub(crate) fn refill() -> bool {
    !SHORT.load(Ordering::Relaxed)
        || HEAP.locked(|heap| {
            let whole = heap.refill();
            SHORT.store(!whole, Ordering::Relaxed);
            whole
        })
}

impl Shared {
    fn lock(&self) {
        while self.locked.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    fn unlock(&self) {
        self.locked.store(false, Ordering::Release);
    }

    /// Runs `work`, which must not allocate, under the lock.
    fn locked<R>(&self, work: impl FnOnce(&mut Heap) -> R) -> R {
        survive_forks();
        self.lock();
        // SAFETY: nobody else has the lock.
        let result = work(unsafe { &mut *self.heap.get() });
        self.unlock();
        result
    }
}

// SAFETY: slots of a slab do not overlap, are aligned to `LINE`, and hold as many of it as the layout needs; mappings are
// aligned to more. An address of some layout goes back to the place that the same layout came from.
unsafe impl GlobalAlloc for Slabs {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is the system allocator's; slabs are touched under the lock.
        unsafe {
            match Place::of(layout) {
                Place::System => System.alloc(layout),
                Place::Mapping(size) => HEAP.locked(|heap| heap.take_mapping(size)),
                Place::Slot(class) => HEAP.locked(|heap| heap.take(class)),
            }
        }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as above; memory of this layout came from there.
        unsafe {
            match Place::of(layout) {
                Place::System => System.dealloc(p, layout),
                Place::Mapping(size) => HEAP.locked(|heap| heap.maps.give_back(p, size)),
                Place::Slot(_) => HEAP.locked(|heap| heap.give_back(p)),
            }
        }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: by the caller's contract all sizes are valid, and the old memory is at least as large as what is copied.
        unsafe {
            let new = Layout::from_size_align_unchecked(size, layout.align());
            match (Place::of(layout), Place::of(new)) {
                (Place::System, Place::System) => System.realloc(p, layout, size),
                (old, same) if old == same => p,
                (Place::Mapping(size), Place::Mapping(new)) => system::remap(p, size, new),
                _ => {
                    let shifted = self.alloc(new);
                    if !shifted.is_null() {
                        p.copy_to_nonoverlapping(shifted, size.min(layout.size()));
                        self.dealloc(p, layout);
                    }
                    shifted
                }
            }
        }
    }
}

/// Nobody holds the lock while the process forks: whoever did would not exist in the child.
fn survive_forks() {
    extern "C" fn lock() {
        HEAP.lock();
    }
    extern "C" fn unlock() {
        HEAP.unlock();
    }
    static ONCE: Once = Once::new();
    #[cfg(not(miri))]
    ONCE.call_once(|| {
        // SAFETY: the handlers only take and release the lock.
        unsafe { libc::pthread_atfork(Some(lock), Some(unlock), Some(unlock)) };
    });
}

#[cfg(test)]
mod tests;
