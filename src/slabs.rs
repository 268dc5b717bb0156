//! The allocator of the Python package: its memory lies apart from the heap of the process.
//!
//! A prompt leaves thousands of pages of some kilobytes behind, each made between torch's tensors of many megabytes that come
//! and go. On one heap those pages, and even the few bytes that list them, settle in the gaps: the next large tensor fits
//! nowhere, and the process grows to several times what it holds. Here memory of one size shares a slab: a mapping that is
//! given back when its last piece goes; room in it that was never used is not resident. What is larger has a mapping of its
//! own.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Larger memory has a mapping of its own: it is rare, and to map it costs little beside filling it.
const MOST: usize = 1 << 17;
/// Bytes of a slab, and its alignment: the slab of an address is found by a mask. It is the size of a huge page, too.
const SLAB: usize = 1 << 21;
/// Slabs of one size from which on they ask for huge pages: those are resident as a whole, but a long cache that is read from
/// end to end misses no translations.
const MANY: usize = 4;
/// Sizes are rounded up to whole cache lines, which is also the alignment.
const LINE: usize = 64;

/// The allocator.
pub struct Slabs;

/// Whose memory of some layout is.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// A slot of so many lines in a slab.
    Slot(usize),
    /// A mapping.
    Mapping,
    /// Memory that is aligned to more than a line, of which there is next to none.
    System,
}

impl Place {
    fn of(layout: Layout) -> Self {
        match layout.size() {
            _ if layout.align() > LINE => Self::System,
            size @ ..=MOST => Self::Slot(size.div_ceil(LINE)),
            _ => Self::Mapping,
        }
    }
}

/// What a slab begins with.
struct Slab {
    /// Neighbours in the list of slabs with room, of the same size.
    next: *mut Slab,
    previous: *mut Slab,
    /// Slots that were given back, each holding the address of the next.
    free: *mut *mut u8,
    /// Where the slots that were never used begin.
    fresh: usize,
    /// Slots in use.
    used: usize,
}

/// Slabs of memory of one size.
#[derive(Clone, Copy)]
struct List {
    /// The first of those with room.
    first: *mut Slab,
    /// How many there are, full ones too.
    count: usize,
}

/// A list for each number of lines.
struct Lists {
    locked: AtomicBool,
    lists: UnsafeCell<[List; MOST / LINE + 1]>,
}

// SAFETY: the lists, and all slabs, are only touched under the lock.
unsafe impl Sync for Lists {}

static LISTS: Lists = Lists {
    locked: AtomicBool::new(false),
    lists: UnsafeCell::new([List { first: null_mut(), count: 0 }; MOST / LINE + 1]),
};

impl Lists {
    fn lock(&self) {
        while self.locked.swap(true, Ordering::Acquire) {
            std::thread::yield_now();
        }
    }

    fn unlock(&self) {
        self.locked.store(false, Ordering::Release);
    }

    /// Runs `work`, which must not allocate, under the lock.
    fn locked<R>(&self, work: impl FnOnce() -> R) -> R {
        survive_forks();
        self.lock();
        let result = work();
        self.unlock();
        result
    }

    /// A list, under the lock.
    #[allow(clippy::mut_from_ref)]
    unsafe fn of(&self, lines: usize) -> &mut List {
        // SAFETY: nobody else has the lock; `lines` is that of a size of ours.
        unsafe { &mut (*self.lists.get())[lines] }
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
                Place::Mapping => map(layout.size()),
                Place::Slot(lines) => LISTS.locked(|| take(lines)),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above; a new mapping is zero.
        unsafe {
            match Place::of(layout) {
                Place::System => System.alloc_zeroed(layout),
                Place::Mapping => map(layout.size()),
                Place::Slot(_) => {
                    let p = self.alloc(layout);
                    if !p.is_null() {
                        p.write_bytes(0, layout.size());
                    }
                    p
                }
            }
        }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        // SAFETY: as above; memory of this layout came from there.
        unsafe {
            match Place::of(layout) {
                Place::System => System.dealloc(p, layout),
                Place::Mapping => unmap(p, layout.size()),
                Place::Slot(lines) => LISTS.locked(|| give_back(p, lines)),
            }
        }
    }

    unsafe fn realloc(&self, p: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: by the caller's contract all sizes are valid, and the old memory is at least as large as what is copied.
        unsafe {
            let new = Layout::from_size_align_unchecked(size, layout.align());
            match (Place::of(layout), Place::of(new)) {
                (Place::System, Place::System) => System.realloc(p, layout, size),
                (Place::Mapping, Place::Mapping) => remap(p, layout.size(), size),
                (old, same) if old == same => p,
                _ => {
                    let moved = self.alloc(new);
                    if !moved.is_null() {
                        p.copy_to_nonoverlapping(moved, size.min(layout.size()));
                        self.dealloc(p, layout);
                    }
                    moved
                }
            }
        }
    }
}

/// A slot of so many lines; null when the system has no memory. Under the lock.
unsafe fn take(lines: usize) -> *mut u8 {
    // SAFETY: slabs in a list have room: a slot that was given back, or fresh ones.
    unsafe {
        let list = LISTS.of(lines);
        if list.first.is_null() {
            let slab = map_slab(list.count >= MANY);
            if slab.is_null() {
                return null_mut();
            }
            list.count += 1;
            link(slab, lines);
        }
        let slab = &mut *LISTS.of(lines).first;
        slab.used += 1;
        let slot = if slab.free.is_null() {
            let slot = std::ptr::from_mut(slab).cast::<u8>().add(slab.fresh);
            slab.fresh += lines * LINE;
            slot
        } else {
            let slot = slab.free;
            slab.free = (*slot).cast();
            slot.cast()
        };
        if !has_room(slab, lines) {
            unlink(slab, lines);
        }
        slot
    }
}

/// Takes a slot of so many lines back. Under the lock.
unsafe fn give_back(p: *mut u8, lines: usize) {
    // SAFETY: the slot's slab begins at the multiple of `SLAB` before it.
    unsafe {
        let slab = p.map_addr(|address| address & !(SLAB - 1)).cast::<Slab>();
        if !has_room(&*slab, lines) {
            link(slab, lines);
        }
        let slot = p.cast::<*mut u8>();
        slot.write((*slab).free.cast());
        (*slab).free = slot;
        (*slab).used -= 1;
        // One empty slab stays, or a buffer that comes and goes would map and unmap every time.
        let alone = (*slab).next.is_null() && (*slab).previous.is_null();
        if (*slab).used == 0 && !alone {
            unlink(slab, lines);
            LISTS.of(lines).count -= 1;
            unmap(slab.cast(), SLAB);
        }
    }
}

fn has_room(slab: &Slab, lines: usize) -> bool {
    !slab.free.is_null() || slab.fresh + lines * LINE <= SLAB
}

unsafe fn link(slab: *mut Slab, lines: usize) {
    // SAFETY: under the lock, all slabs in the list are mapped.
    unsafe {
        let list = LISTS.of(lines);
        (*slab).previous = null_mut();
        (*slab).next = list.first;
        if let Some(next) = list.first.as_mut() {
            next.previous = slab;
        }
        list.first = slab;
    }
}

unsafe fn unlink(slab: *mut Slab, lines: usize) {
    // SAFETY: as above, and the slab is one of them.
    unsafe {
        let (previous, next) = ((*slab).previous, (*slab).next);
        match previous.as_mut() {
            Some(previous) => previous.next = next,
            None => LISTS.of(lines).first = next,
        }
        if let Some(next) = next.as_mut() {
            next.previous = previous;
        }
        ((*slab).previous, (*slab).next) = (null_mut(), null_mut());
    }
}

/// A new slab, aligned to its size: twice as much is mapped, and what is beside it given back. Null when there is no memory.
unsafe fn map_slab(huge: bool) -> *mut Slab {
    // SAFETY: the header is written into new memory.
    unsafe {
        let p = map(2 * SLAB);
        if p.is_null() {
            return null_mut();
        }
        let before = p.align_offset(SLAB);
        let slab = p.add(before);
        if before > 0 {
            unmap(p, before);
        }
        if before < SLAB {
            unmap(slab.add(SLAB), SLAB - before);
        }
        if huge {
            // A wish: where the system has no huge pages, nothing is lost.
            libc::madvise(slab.cast(), SLAB, libc::MADV_HUGEPAGE);
        }
        let (slab, fresh) = (slab.cast::<Slab>(), size_of::<Slab>().next_multiple_of(LINE));
        slab.write(Slab { next: null_mut(), previous: null_mut(), free: null_mut(), fresh, used: 0 });
        slab
    }
}

/// New memory, which is zero; null when there is none.
unsafe fn map(size: usize) -> *mut u8 {
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a mapping somewhere, of nothing.
    let p = unsafe { libc::mmap(null_mut(), size, access, kind, -1, 0) };
    if p == libc::MAP_FAILED { null_mut() } else { p.cast() }
}

unsafe fn unmap(p: *mut u8, size: usize) {
    // SAFETY: by the caller's contract nobody uses that memory any more.
    unsafe { libc::munmap(p.cast(), size) };
}

unsafe fn remap(p: *mut u8, size: usize, new: usize) -> *mut u8 {
    // SAFETY: by the caller's contract the old address is not used any more.
    let p = unsafe { libc::mremap(p.cast(), size, new, libc::MREMAP_MAYMOVE) };
    if p == libc::MAP_FAILED { null_mut() } else { p.cast() }
}

/// Nobody holds the lock while the process forks: whoever did would not exist in the child.
fn survive_forks() {
    extern "C" fn lock() {
        LISTS.lock();
    }
    extern "C" fn unlock() {
        LISTS.unlock();
    }
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the handlers only take and release the lock.
        unsafe { libc::pthread_atfork(Some(lock), Some(unlock), Some(unlock)) };
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 16).unwrap()
    }

    /// Memory that knows what was written to it.
    struct Held(*mut u8, usize, u8);

    impl Held {
        fn new(size: usize, fill: u8) -> Self {
            // SAFETY: the memory has that size.
            unsafe {
                let p = Slabs.alloc(layout(size));
                p.write_bytes(fill, size);
                Self(p, size, fill)
            }
        }

        fn resize(&mut self, size: usize) {
            // SAFETY: it came from `Slabs` with the old size, and has the new one then.
            unsafe {
                self.0 = Slabs.realloc(self.0, layout(self.1), size);
                let kept = std::slice::from_raw_parts(self.0, size.min(self.1));
                assert!(kept.iter().all(|&x| x == self.2), "what was held is moved");
                self.0.write_bytes(self.2, size);
            }
            self.1 = size;
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            // SAFETY: it came from `Slabs` with that size.
            unsafe {
                let held = std::slice::from_raw_parts(self.0, self.1);
                assert!(held.iter().all(|&x| x == self.2), "nobody else wrote here");
                Slabs.dealloc(self.0, layout(self.1));
            }
        }
    }

    proptest! {
        #[test]
        fn memory_is_its_holders_alone(sizes in prop::collection::vec((1usize..200_000, 0usize..50, 1usize..200_000), 1..100)) {
            let mut held: Vec<Held> = Vec::new();
            for (i, (size, which, other)) in sizes.into_iter().enumerate() {
                held.push(Held::new(size, i as u8));
                assert!(held[held.len() - 1].0.addr().is_multiple_of(LINE));
                let n = held.len();
                match which % 3 {
                    0 => drop(held.swap_remove(which % n)),
                    1 => held[which % n].resize(other),
                    _ => {}
                }
            }
        }
    }

    /// Slabs with room for memory of that size.
    fn listed(size: usize) -> usize {
        LISTS.locked(|| {
            // SAFETY: under the lock, all slabs in the list are mapped.
            let next = |slab: &*mut Slab| unsafe { slab.as_ref() }.map(|slab| slab.next);
            let first = unsafe { LISTS.of(size.div_ceil(LINE)).first };
            std::iter::successors(Some(first), next).filter(|slab| !slab.is_null()).count()
        })
    }

    #[test]
    fn slabs_go_back_to_the_system() {
        let mut pages: Vec<Held> = (0..20_000).map(|i| Held::new(5120, i as u8)).collect();
        let mut some = Vec::new();
        while let Some(page) = pages.pop() {
            some.extend(pages.len().is_multiple_of(1000).then_some(page));
        }
        assert!(listed(5120) >= some.len() - 1, "a slab stays while one of its pages does");
        drop(some);
        // The other tests hold a few sizes meanwhile, and one that is empty stays.
        assert!(listed(5120) <= 3, "{} slabs stay", listed(5120));
    }

    #[test]
    fn threads_share_slabs() {
        std::thread::scope(|scope| {
            for fill in 0..4 {
                scope.spawn(move || {
                    for round in 1..50 {
                        let mut held: Vec<Held> = (0..100).map(|i| Held::new(1024 + 64 * (i % 7), fill)).collect();
                        held.rotate_left(round);
                    }
                });
            }
        });
    }
}
