//! The allocator of the Python package: its memory lies apart from the heap of the process.
//!
//! A prompt leaves thousands of pages of some kilobytes behind, each made between torch's tensors of many megabytes that come
//! and go. On one heap those pages, and even the few bytes that list them, settle in the gaps: the next large tensor fits
//! nowhere, and the process grows to several times what it holds. Here memory of about one size shares slabs.
//!
//! What is resident is what is held, and little more: sizes are rounded up by a sixteenth at most; an empty slab goes back to
//! the system; and as soon as what was given back in slabs that are still in use reaches a 32nd of what is held (and
//! 8 MB), the system takes the memory behind it, and returns it as zeros when it is wanted again. What is larger than a
//! slab's slots has a mapping of its own.
//!
//! Some slabs are kept that nobody has used yet: addresses, no memory. When the system refuses more, small requests are served
//! from them, so that an error can be made and reported. [`refill`] says whether they are whole; who asks for much, or often,
//! asks it first ([`crate::memory`]).

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Larger memory has a mapping of its own: it is rare, and to map it costs little beside filling it.
pub(crate) const MOST: usize = 1 << 17;
/// Bytes of a slab, and its alignment: the slab of an address is found by a mask. It is the size of a huge page, too.
const SLAB: usize = 1 << 21;
/// Slabs of one class from which on they ask for huge pages: those are resident as a whole, but a long cache that is read from
/// end to end misses no translations.
const MANY: usize = 8;
/// Sizes are rounded up to whole cache lines, which is also the alignment.
const LINE: usize = 64;
/// What the system gives and takes.
const PAGE: usize = 4096;
/// Classes between a size and twice that size.
const STEPS: usize = 16;
const CLASSES: usize = class_of(MOST) + 1;
/// Slabs that are kept for when the system has no memory.
const RESERVE: usize = 8;
/// Empty slabs that are kept as they are, or a buffer that comes and goes would map and unmap every time.
const WARM: usize = 2;
/// Bytes that were given back and may stay resident; and of how many held bytes one more may.
const IDLE: usize = 8 << 20;
const HELD_AN_IDLE: usize = 32;

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
    /// A mapping.
    Mapping,
    /// Memory that is aligned to more than a line, of which there is next to none.
    System,
}

impl Place {
    fn of(layout: Layout) -> Self {
        match layout.size() {
            _ if layout.align() > LINE => Self::System,
            size @ ..=MOST => Self::Slot(class_of(size)),
            _ => Self::Mapping,
        }
    }
}

/// What a slab begins with. Two bits a slot follow: those of the idle ones, which were given back and may be resident, then
/// those of the bare ones, behind which there is no memory; slots in use have neither.
struct Slab {
    /// Neighbours in the list of slabs with room, of the same class.
    next: *mut Slab,
    previous: *mut Slab,
    class: usize,
    slots: usize,
    /// Where the slots begin.
    first: usize,
    used: usize,
    idle: usize,
    /// Words of bits before which no slot is idle, and none bare.
    idle_from: usize,
    bare_from: usize,
    huge: bool,
}

/// Slabs of one class.
#[derive(Clone, Copy)]
struct List {
    /// The first of those with room.
    first: *mut Slab,
    /// How many there are, full ones too.
    count: usize,
}

/// All slabs.
struct Heap {
    lists: [List; CLASSES],
    /// Empty slabs: first the reserve, of which nothing is resident, then warm ones.
    spare: [*mut Slab; RESERVE + WARM],
    spares: usize,
    /// Bytes of slots in use, and of idle ones.
    held: usize,
    idle: usize,
    /// Whether the reserve was touched, or is not there yet.
    short: bool,
    /// Where new slabs come from; the tests know a system that has none.
    system: unsafe fn(usize, usize) -> *mut u8,
}

impl Heap {
    const fn new() -> Self {
        let lists = [List { first: null_mut(), count: 0 }; CLASSES];
        Self {
            lists,
            spare: [null_mut(); RESERVE + WARM],
            spares: 0,
            held: 0,
            idle: 0,
            short: true,
            system: system::map,
        }
    }

    /// A slot of a class; null when the system has no memory.
    unsafe fn take(&mut self, mut class: usize) -> *mut u8 {
        // SAFETY: slabs in a list are mapped and have room.
        unsafe {
            if self.lists[class].first.is_null() && !self.add_slab(class) {
                // At the very end any larger slot will do.
                match (class..CLASSES).find(|&class| !self.lists[class].first.is_null()) {
                    Some(larger) => class = larger,
                    None => return null_mut(),
                }
            }
            let slab = self.lists[class].first;
            let idle = (*slab).idle > 0;
            let slot = take_bit(slab, idle);
            if idle {
                (*slab).idle -= 1;
                self.idle -= size_of_class(class);
            }
            (*slab).used += 1;
            self.held += size_of_class(class);
            if (*slab).used == (*slab).slots {
                self.unlink(slab);
            }
            slab.cast::<u8>().add((*slab).first + slot * size_of_class(class))
        }
    }

    /// Takes a slot back.
    unsafe fn give_back(&mut self, p: *mut u8) {
        // SAFETY: the slot's slab begins at the multiple of `SLAB` before it.
        unsafe {
            let slab = p.map_addr(|address| address & !(SLAB - 1)).cast::<Slab>();
            let size = size_of_class((*slab).class);
            if (*slab).used == (*slab).slots {
                self.link(slab);
            }
            give_bit(slab, (p.addr() - slab.addr() - (*slab).first) / size);
            ((*slab).used, (*slab).idle) = ((*slab).used - 1, (*slab).idle + 1);
            (self.held, self.idle) = (self.held - size, self.idle + size);
            if (*slab).used == 0 {
                self.remove(slab);
            } else if self.idle > IDLE + self.held / HELD_AN_IDLE {
                self.strip();
            }
        }
    }

    /// Makes a slab for a class; false when there is no memory.
    unsafe fn add_slab(&mut self, class: usize) -> bool {
        // SAFETY: a spare slab is mapped, and nobody's.
        unsafe {
            let warm = self.spares > RESERVE;
            let mut slab = if warm { null_mut() } else { (self.system)(SLAB, SLAB).cast::<Slab>() };
            if slab.is_null() {
                if self.spares == 0 {
                    return false;
                }
                self.spares -= 1;
                slab = self.spare[self.spares];
                self.short |= !warm;
            }
            SHORT.fetch_or(self.short, Ordering::Relaxed);
            let huge = self.lists[class].count >= MANY;
            if huge {
                system::advise(slab.cast(), SLAB, system::HUGE);
            }
            lay_out(slab, class, warm, huge);
            self.idle += (*slab).idle * size_of_class(class);
            self.lists[class].count += 1;
            self.link(slab);
            true
        }
    }

    /// Removes an empty slab.
    unsafe fn remove(&mut self, slab: *mut Slab) {
        // SAFETY: it is mapped, and nobody uses it.
        unsafe {
            let class = (*slab).class;
            self.unlink(slab);
            self.lists[class].count -= 1;
            self.idle -= (*slab).idle * size_of_class(class);
            if self.spares == self.spare.len() {
                return system::unmap(slab.cast(), SLAB, SLAB);
            }
            if (*slab).huge {
                system::advise(slab.cast(), SLAB, system::NOT_HUGE);
            }
            if self.spares < RESERVE {
                system::advise(slab.cast(), SLAB, system::UNWANTED);
            }
            self.spare[self.spares] = slab;
            self.spares += 1;
        }
    }

    /// Gives the memory behind all idle slots back to the system.
    unsafe fn strip(&mut self) {
        for list in &self.lists {
            let mut slab = list.first;
            while !slab.is_null() {
                // SAFETY: slabs in a list are mapped; free slots are nobody's.
                unsafe {
                    if (*slab).idle > 0 {
                        strip(slab);
                    }
                    slab = (*slab).next;
                }
            }
        }
        self.idle = 0;
    }

    /// Makes the reserve whole, if there is memory; says whether it is.
    fn refill(&mut self) -> bool {
        while self.spares < RESERVE {
            // SAFETY: a new mapping is nobody's.
            let slab = unsafe { (self.system)(SLAB, SLAB) };
            if slab.is_null() {
                return false;
            }
            self.spare[self.spares] = slab.cast();
            self.spares += 1;
        }
        self.short = false;
        true
    }

    unsafe fn link(&mut self, slab: *mut Slab) {
        // SAFETY: all slabs in the list are mapped.
        unsafe {
            let list = &mut self.lists[(*slab).class];
            (*slab).previous = null_mut();
            (*slab).next = list.first;
            if !list.first.is_null() {
                (*list.first).previous = slab;
            }
            list.first = slab;
        }
    }

    unsafe fn unlink(&mut self, slab: *mut Slab) {
        // SAFETY: as above, and the slab is one of them.
        unsafe {
            let (previous, next) = ((*slab).previous, (*slab).next);
            if previous.is_null() {
                self.lists[(*slab).class].first = next;
            } else {
                (*previous).next = next;
            }
            if !next.is_null() {
                (*next).previous = previous;
            }
            ((*slab).previous, (*slab).next) = (null_mut(), null_mut());
        }
    }
}

/// Writes a slab's beginning, all slots idle or all bare.
unsafe fn lay_out(slab: *mut Slab, class: usize, idle: bool, huge: bool) {
    // SAFETY: the slab is mapped and nobody's; its bits end before its first slot.
    unsafe {
        let (begin, size) = (size_of::<Slab>(), size_of_class(class));
        let words = ((SLAB - begin) / size).div_ceil(64);
        let first = (begin + 2 * words * size_of::<u64>()).next_multiple_of(LINE);
        let slots = (SLAB - first) / size;
        let (next, previous) = (null_mut(), null_mut());
        let (used, idle_from, bare_from) = (0, 0, 0);
        slab.write(Slab {
            next,
            previous,
            class,
            slots,
            first,
            used,
            idle: if idle { slots } else { 0 },
            idle_from,
            bare_from,
            huge,
        });
        for word in 0..words {
            let free = u64::MAX >> (64 - slots.saturating_sub(64 * word).clamp(1, 64));
            let free = if 64 * word < slots { free } else { 0 };
            bits(slab, true).add(word).write(if idle { free } else { 0 });
            bits(slab, false).add(word).write(if idle { 0 } else { free });
        }
    }
}

/// Words of the bits of idle slots, or of bare ones.
unsafe fn words(slab: *mut Slab) -> usize {
    // SAFETY: the slab is mapped.
    unsafe { ((SLAB - size_of::<Slab>()) / size_of_class((*slab).class)).div_ceil(64) }
}

/// The bits of idle slots, or of bare ones.
unsafe fn bits(slab: *mut Slab, idle: bool) -> *mut u64 {
    // SAFETY: they follow the slab's beginning.
    unsafe { slab.cast::<u8>().add(size_of::<Slab>()).cast::<u64>().add(if idle { 0 } else { words(slab) }) }
}

/// Finds and takes the first slot that is idle, or bare: there is one.
unsafe fn take_bit(slab: *mut Slab, idle: bool) -> usize {
    // SAFETY: a bit is set at or after the word that the slab remembers.
    unsafe {
        let (bits, mut word) = (bits(slab, idle), if idle { (*slab).idle_from } else { (*slab).bare_from });
        while *bits.add(word) == 0 {
            word += 1;
        }
        let bit = (*bits.add(word)).trailing_zeros() as usize;
        *bits.add(word) &= !(1 << bit);
        *(if idle { &raw mut (*slab).idle_from } else { &raw mut (*slab).bare_from }) = word;
        64 * word + bit
    }
}

/// Makes a slot idle.
unsafe fn give_bit(slab: *mut Slab, slot: usize) {
    // SAFETY: it is one of the slab's.
    unsafe {
        *bits(slab, true).add(slot / 64) |= 1 << (slot % 64);
        (*slab).idle_from = (*slab).idle_from.min(slot / 64);
    }
}

/// Makes a slab's idle slots bare: the system takes back the whole pages in runs of free slots.
unsafe fn strip(slab: *mut Slab) {
    // SAFETY: free slots are nobody's, and the bits are those of all slots.
    unsafe {
        let (slots, size) = ((*slab).slots, size_of_class((*slab).class));
        let (idle, bare) = (bits(slab, true), bits(slab, false));
        let is = |bits: *mut u64, slot: usize| *bits.add(slot / 64) >> (slot % 64) & 1 == 1;
        let (mut slot, mut stripped) = (0, false);
        while slot < slots {
            let (begin, mut any) = (slot, false);
            while slot < slots && (is(idle, slot) || is(bare, slot)) {
                any |= is(idle, slot);
                slot += 1;
            }
            let from = ((*slab).first + begin * size).next_multiple_of(PAGE);
            let to = if slot == slots { SLAB } else { ((*slab).first + slot * size) / PAGE * PAGE };
            if any && from < to {
                system::advise(slab.cast::<u8>().add(from), to - from, system::UNWANTED);
                stripped = true;
            }
            slot += 1;
        }
        if stripped && (*slab).huge {
            // Or the system would fill the gaps with memory again.
            system::advise(slab.cast(), SLAB, system::NOT_HUGE);
            (*slab).huge = false;
        }
        for word in 0..words(slab) {
            *bare.add(word) |= std::mem::take(&mut *idle.add(word));
        }
        ((*slab).idle, (*slab).bare_from) = (0, 0);
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
                Place::Mapping => system::map(layout.size(), PAGE),
                Place::Slot(class) => HEAP.locked(|heap| heap.take(class)),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above; a new mapping is zero.
        unsafe {
            match Place::of(layout) {
                Place::System => System.alloc_zeroed(layout),
                Place::Mapping => system::map(layout.size(), PAGE),
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
                Place::Mapping => system::unmap(p, layout.size(), PAGE),
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
                (Place::Mapping, Place::Mapping) => system::remap(p, layout.size(), size),
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

/// What the system gives and takes: zeroed memory of a size and alignment, null when there is none.
#[cfg(not(miri))]
mod system {
    use super::{PAGE, null_mut};

    pub(super) const HUGE: i32 = libc::MADV_HUGEPAGE;
    pub(super) const NOT_HUGE: i32 = libc::MADV_NOHUGEPAGE;
    pub(super) const UNWANTED: i32 = libc::MADV_DONTNEED;

    /// More than asked for is mapped where a page's alignment will not do, and what is beside it given back.
    pub(super) unsafe fn map(size: usize, align: usize) -> *mut u8 {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let more = if align > PAGE { align } else { 0 };
        // SAFETY: a mapping somewhere, of nothing; nobody uses its ends yet.
        unsafe {
            let p = libc::mmap(null_mut(), size + more, access, kind, -1, 0);
            if p == libc::MAP_FAILED {
                return null_mut();
            }
            let p = p.cast::<u8>();
            let before = if more > 0 { p.align_offset(align) } else { 0 };
            if before > 0 {
                libc::munmap(p.cast(), before);
            }
            if before < more {
                libc::munmap(p.add(before + size).cast(), more - before);
            }
            p.add(before)
        }
    }

    pub(super) unsafe fn unmap(p: *mut u8, size: usize, _: usize) {
        // SAFETY: by the caller's contract nobody uses that memory any more.
        unsafe { libc::munmap(p.cast(), size) };
    }

    pub(super) unsafe fn remap(p: *mut u8, size: usize, new: usize) -> *mut u8 {
        // SAFETY: by the caller's contract the old address is not used any more.
        let p = unsafe { libc::mremap(p.cast(), size, new, libc::MREMAP_MAYMOVE) };
        if p == libc::MAP_FAILED { null_mut() } else { p.cast() }
    }

    /// Wishes: where the system cannot follow, nothing is lost.
    pub(super) unsafe fn advise(p: *mut u8, size: usize, advice: i32) {
        // SAFETY: by the caller's contract nobody needs what is in unwanted memory.
        unsafe { libc::madvise(p.cast(), size, advice) };
    }
}

/// Miri's system: it knows no mappings.
#[cfg(miri)]
mod system {
    use super::{GlobalAlloc, Layout, PAGE, System};

    pub(super) const HUGE: i32 = 0;
    pub(super) const NOT_HUGE: i32 = 1;
    pub(super) const UNWANTED: i32 = 2;

    pub(super) unsafe fn map(size: usize, align: usize) -> *mut u8 {
        unsafe { System.alloc_zeroed(Layout::from_size_align_unchecked(size, align)) }
    }

    pub(super) unsafe fn unmap(p: *mut u8, size: usize, align: usize) {
        unsafe { System.dealloc(p, Layout::from_size_align_unchecked(size, align)) }
    }

    pub(super) unsafe fn remap(p: *mut u8, size: usize, new: usize) -> *mut u8 {
        unsafe { System.realloc(p, Layout::from_size_align_unchecked(size, PAGE), new) }
    }

    pub(super) unsafe fn advise(p: *mut u8, size: usize, advice: i32) {
        if advice == UNWANTED {
            unsafe { p.write_bytes(0, size) };
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
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Miri is slow.
    const CASES: u32 = if cfg!(miri) { 2 } else { 64 };

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

    #[test]
    fn a_class_is_at_most_a_sixteenth_larger() {
        for size in (1..=MOST).step_by(if cfg!(miri) { 997 } else { 1 }) {
            let (class, room) = (class_of(size), size_of_class(class_of(size)));
            assert!(class < CLASSES && size <= room && room < size + LINE.max(size / STEPS + 1), "{size}");
            assert!(size <= LINE || size_of_class(class - 1) < size, "{size}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() })]

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

        /// Of memory that comes and goes in any order: what is idle is bounded, and the books are right.
        #[test]
        fn little_is_idle(steps in prop::collection::vec((1usize..=MOST, 1usize..40, 0usize..100), 1..60)) {
            let (mut heap, mut held) = (Own(Heap::new()), Vec::new());
            for (size, n, share) in steps {
                held.extend((0..n).map(|_| heap.take(size)));
                let keep = held.len() * share / 100;
                let at = held.len() / 3;
                held.rotate_left(at);
                for p in held.drain(keep..) {
                    heap.give_back(p);
                    let (held, idle) = heap.counted();
                    assert_eq!((held, idle), (heap.0.held, heap.0.idle));
                    assert!(idle <= IDLE + held / HELD_AN_IDLE, "{idle} of {held}");
                }
            }
            for p in held {
                heap.give_back(p);
            }
            heap.is_empty();
        }
    }

    /// A heap of a test's own.
    struct Own(Heap);

    impl Own {
        fn take(&mut self, size: usize) -> *mut u8 {
            // SAFETY: the heap is ours; the slot has that size.
            unsafe {
                let p = self.0.take(class_of(size));
                p.write_bytes(1, size);
                p
            }
        }

        fn give_back(&mut self, p: *mut u8) {
            // SAFETY: it came from this heap.
            unsafe { self.0.give_back(p) }
        }

        /// Slabs with room.
        fn listed(&self) -> impl Iterator<Item = &Slab> {
            // SAFETY: all slabs in the lists are mapped.
            let of = |slab: *mut Slab| unsafe { slab.as_ref() };
            self.0.lists.iter().flat_map(move |list| std::iter::successors(of(list.first), move |slab| of(slab.next)))
        }

        /// Bytes held and idle, counted by the slabs; full ones are in no list.
        fn counted(&self) -> (usize, usize) {
            let sum = |number: fn(&Slab) -> usize| -> usize {
                self.listed().map(|slab| number(slab) * size_of_class(slab.class)).sum()
            };
            let full =
                |class: usize| self.0.lists[class].count - self.listed().filter(|slab| slab.class == class).count();
            let slots = |class: usize| {
                let size = size_of_class(class);
                let words = ((SLAB - size_of::<Slab>()) / size).div_ceil(64);
                (SLAB - (size_of::<Slab>() + 16 * words).next_multiple_of(LINE)) / size * size
            };
            let full: usize = (1..CLASSES).map(|class| full(class) * slots(class)).sum();
            (full + sum(|slab| slab.used), sum(|slab| slab.idle))
        }

        /// Nothing is held, and a few slabs are kept.
        fn is_empty(&self) {
            assert_eq!((self.0.held, self.0.idle), (0, 0));
            assert!(self.0.lists.iter().all(|list| list.count == 0 && list.first.is_null()));
            assert!(self.0.spares <= RESERVE + WARM);
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            for &slab in &self.0.spare[..self.0.spares] {
                // SAFETY: spare slabs are nobody's.
                unsafe { system::unmap(slab.cast(), SLAB, SLAB) };
            }
        }
    }

    #[test]
    fn no_size_keeps_a_slab() {
        let mut heap = Own(Heap::new());
        for round in 0..3 {
            let all: Vec<_> = (1..=MOST).step_by(1000 + round).map(|size| heap.take(size)).collect();
            for p in all {
                heap.give_back(p);
            }
            heap.is_empty();
        }
    }

    #[test]
    fn the_reserve_serves_when_the_system_does_not() {
        let mut heap = Own(Heap::new());
        assert!(heap.0.refill());
        heap.0.system = |_, _| null_mut();
        // A slot of every class: some have slabs of their own, the others get larger slots.
        let all: Vec<_> = (1..CLASSES).rev().map(|class| heap.take(size_of_class(class))).collect();
        assert_eq!(heap.0.spares, 0);
        assert!(!heap.0.refill());
        // SAFETY: the heap is ours.
        let none = (0..=RESERVE * SLAB / MOST).find(|_| unsafe { heap.0.take(class_of(MOST)) }.is_null());
        assert!(none.is_some(), "in the end there is none");
        heap.0.system = system::map;
        assert!(heap.0.refill());
        for p in all {
            heap.give_back(p);
        }
    }

    #[cfg(not(miri))]
    #[test]
    fn the_system_gets_what_is_idle() {
        for (size, kept) in [(700, 400), (5000, 60), (70_000, 9)] {
            let mut heap = Own(Heap::new());
            let all: Vec<_> = (0..32 * SLAB / size).map(|_| heap.take(size)).collect();
            let (some, others): (Vec<_>, Vec<_>) = all.into_iter().enumerate().partition(|(i, _)| i % kept == 0);
            for (_, p) in others {
                heap.give_back(p);
            }
            let resident: usize = heap.listed().map(resident).sum();
            let held = some.len() * (size.next_multiple_of(PAGE) + 2 * PAGE) + heap.listed().count() * 2 * PAGE;
            assert!(resident <= held + IDLE + held / HELD_AN_IDLE, "{resident} for {held}");
            for (_, p) in some {
                heap.give_back(p);
            }
            heap.is_empty();
        }
    }

    /// Bytes of a slab that are in memory.
    #[cfg(not(miri))]
    fn resident(slab: &Slab) -> usize {
        let mut pages = [0u8; SLAB / PAGE];
        // SAFETY: the slab is mapped, and the system writes a byte a page.
        let done = unsafe { libc::mincore(std::ptr::from_ref(slab).cast_mut().cast(), SLAB, pages.as_mut_ptr()) };
        assert_eq!(done, 0);
        pages.iter().filter(|&&page| page & 1 == 1).count() * PAGE
    }

    #[test]
    fn threads_share_slabs() {
        let rounds = if cfg!(miri) { 2 } else { 50 };
        std::thread::scope(|scope| {
            for fill in 0..4 {
                scope.spawn(move || {
                    for round in 1..rounds {
                        let mut held: Vec<Held> = (0..100).map(|i| Held::new(1024 + 64 * (i % 7), fill)).collect();
                        held.rotate_left(round);
                    }
                });
            }
        });
    }
}
