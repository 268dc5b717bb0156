//! All slabs: lists of those with room, the spare ones, and when what is idle goes back to the system.

use std::ptr::null_mut;
use std::sync::atomic::Ordering;

use super::maps::Maps;
use super::slab::{Slab, clear, give_bit, lay_out, strip, take_bit};
use super::{CLASSES, PAGE, SHORT, SLAB, size_of_class, system};

/// Slabs of one class from which on they ask for huge pages: those are resident as a whole, but a long cache that is read from
/// end to end misses no translations.
const MANY: usize = 8;
/// Slabs that are kept for when the system has no memory.
pub(super) const RESERVE: usize = 8;
/// Slabs that stay in their lists while nothing is held in them, or buffers that come and go would map and unmap every time.
pub(super) const EMPTY: usize = 16;
/// Bytes that were given back and may stay resident; and of how many held bytes one more may.
pub(super) const IDLE: usize = 8 << 20;
pub(super) const HELD_AN_IDLE: usize = 32;

/// Slabs of one class.
#[derive(Clone, Copy)]
pub(super) struct List {
    /// The first of those with room.
    pub(super) first: *mut Slab,
    /// How many there are, full ones too.
    pub(super) count: usize,
}

/// All slabs.
pub(super) struct Heap {
    pub(super) lists: [List; CLASSES],
    /// The reserve, of which nothing is resident.
    pub(super) spare: [*mut Slab; RESERVE],
    pub(super) spares: usize,
    /// Slabs in which nothing is held, those that were so for longest first.
    pub(super) empty: [*mut Slab; EMPTY],
    pub(super) empties: usize,
    /// Bytes of slots in use, and of idle ones.
    pub(super) held: usize,
    pub(super) idle: usize,
    pub(super) maps: Maps,
    /// Whether the reserve was touched, or is not there yet.
    short: bool,
    /// Where new slabs come from; the tests know a system that has none.
    pub(super) system: unsafe fn(usize, usize) -> *mut u8,
}

impl Heap {
    pub(super) const fn new() -> Self {
        let lists = [List { first: null_mut(), count: 0 }; CLASSES];
        Self {
            lists,
            spare: [null_mut(); RESERVE],
            spares: 0,
            empty: [null_mut(); EMPTY],
            empties: 0,
            held: 0,
            idle: 0,
            maps: Maps::new(),
            short: true,
            system: system::map,
        }
    }

    /// A slot of a class; null when the system has no memory.
    pub(super) unsafe fn take(&mut self, mut class: usize) -> *mut u8 {
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
            if (*slab).used == 0 {
                self.is_empty_no_more(slab);
            }
            (*slab).used += 1;
            self.held += size_of_class(class);
            if (*slab).used == (*slab).slots {
                self.unlink(slab);
            }
            slab.cast::<u8>().add((*slab).first + slot * size_of_class(class))
        }
    }

    /// A mapping of `size` bytes, one that was given back or a new one.
    pub(super) unsafe fn take_mapping(&mut self, size: usize) -> *mut u8 {
        let kept = self.maps.take(size);
        // SAFETY: a new mapping is nobody's.
        if kept.is_null() { unsafe { self.map(size, PAGE) } } else { kept }
    }

    /// A new mapping: what is kept goes back if there is no other memory.
    unsafe fn map(&mut self, size: usize, align: usize) -> *mut u8 {
        // SAFETY: a new mapping is nobody's.
        unsafe {
            let new = (self.system)(size, align);
            if !new.is_null() || self.maps.is_empty() {
                return new;
            }
            self.maps.clear();
            (self.system)(size, align)
        }
    }

    /// Takes a slot back.
    pub(super) unsafe fn give_back(&mut self, p: *mut u8) {
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
                if self.empties == EMPTY {
                    self.remove(self.empty[0]);
                }
                self.empty[self.empties] = slab;
                self.empties += 1;
            }
            if self.idle > IDLE + self.held / HELD_AN_IDLE {
                self.strip();
            }
        }
    }

    /// Makes a slab for a class; false when there is no memory.
    unsafe fn add_slab(&mut self, class: usize) -> bool {
        // SAFETY: a spare slab is mapped, and nobody's.
        unsafe {
            let mut slab = self.map(SLAB, SLAB).cast::<Slab>();
            if slab.is_null() && self.empties > 0 {
                slab = self.empty[0];
                self.detach(slab);
                clear(slab);
            }
            if slab.is_null() {
                if self.spares == 0 {
                    return false;
                }
                self.spares -= 1;
                slab = self.spare[self.spares];
                self.short = true;
            }
            SHORT.fetch_or(self.short, Ordering::Relaxed);
            let huge = self.lists[class].count >= MANY;
            if huge {
                system::advise(slab.cast(), SLAB, system::HUGE);
            }
            lay_out(slab, class, huge);
            self.lists[class].count += 1;
            self.link(slab);
            true
        }
    }

    /// Takes a slab off the list of those in which nothing is held; a new one is not in it.
    fn is_empty_no_more(&mut self, slab: *mut Slab) {
        if let Some(i) = self.empty[..self.empties].iter().position(|&empty| empty == slab) {
            self.empty.copy_within(i + 1..self.empties, i);
            self.empties -= 1;
        }
    }

    /// Removes an empty slab.
    unsafe fn remove(&mut self, slab: *mut Slab) {
        // SAFETY: it is mapped, and nobody uses it.
        unsafe {
            self.detach(slab);
            if self.spares == RESERVE {
                return system::unmap(slab.cast(), SLAB, SLAB);
            }
            clear(slab);
        }
        self.spare[self.spares] = slab;
        self.spares += 1;
    }

    /// Takes an empty slab off its list.
    unsafe fn detach(&mut self, slab: *mut Slab) {
        self.is_empty_no_more(slab);
        // SAFETY: it is mapped, and nobody uses it.
        unsafe {
            let class = (*slab).class;
            self.unlink(slab);
            self.lists[class].count -= 1;
            self.idle -= (*slab).idle * size_of_class(class);
        }
    }

    /// Gives the memory behind half of the idle slots back to the system: that of the largest ones, as few calls as can be.
    unsafe fn strip(&mut self) {
        let enough = self.idle / 2;
        for class in (1..CLASSES).rev() {
            let mut slab = self.lists[class].first;
            while !slab.is_null() {
                // SAFETY: slabs in a list are mapped; free slots are nobody's.
                unsafe {
                    if (*slab).idle > 0 {
                        self.idle -= (*slab).idle * size_of_class(class);
                        strip(slab);
                    }
                    if self.idle <= enough {
                        return;
                    }
                    slab = (*slab).next;
                }
            }
        }
    }

    /// Makes the reserve whole, if there is memory; says whether it is.
    pub(super) fn refill(&mut self) -> bool {
        while self.spares < RESERVE {
            // SAFETY: a new mapping is nobody's.
            let slab = unsafe { self.map(SLAB, SLAB) };
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
