//! The allocator, alone and from threads; Miri runs these too.

use std::alloc::{GlobalAlloc, Layout};
use std::ptr::null_mut;

use proptest::prelude::*;

use super::heap::{EMPTY, HELD_AN_IDLE, Heap, IDLE, RESERVE};
use super::maps::{BYTES_KEPT, Maps};
use super::slab::Slab;
use super::*;

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
            assert!(kept.iter().all(|&x| x == self.2), "what was held is shifted");
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
        let full = |class: usize| self.0.lists[class].count - self.listed().filter(|slab| slab.class == class).count();
        let slots = |class: usize| {
            let size = size_of_class(class);
            let words = ((SLAB - size_of::<Slab>()) / size).div_ceil(64);
            (SLAB - (size_of::<Slab>() + 16 * words).next_multiple_of(LINE)) / size * size
        };
        let full: usize = (1..CLASSES).map(|class| full(class) * slots(class)).sum();
        (full + sum(|slab| slab.used), sum(|slab| slab.idle))
    }

    /// Nothing is held, and of the slabs a few are kept.
    fn is_empty(&self) {
        let (held, idle) = self.counted();
        assert_eq!((held, idle), (0, self.0.idle));
        assert_eq!(self.0.held, 0);
        assert!(idle <= IDLE);
        let listed = self.listed().count();
        assert!(listed <= EMPTY && listed == self.0.empties);
        assert_eq!(listed, self.0.lists.iter().map(|list| list.count).sum::<usize>());
        assert!(self.0.spares <= RESERVE);
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let heap = &self.0;
        for &slab in heap.spare[..heap.spares].iter().chain(&heap.empty[..heap.empties]) {
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
fn mappings_come_again() {
    let mut maps = Maps::new();
    // SAFETY: new mappings are ours.
    let new = |size| unsafe { system::map(size, PAGE) };
    let sizes = (1..=12).map(|i| i * 128 * PAGE);
    for size in sizes.clone() {
        // SAFETY: nobody uses it.
        unsafe { maps.give_back(new(size), size) };
    }
    assert!(maps.take(128 * PAGE).is_null(), "the oldest went");
    assert!(maps.take(12 * 128 * PAGE + PAGE).is_null());
    let mut kept = 0;
    for size in sizes {
        let p = maps.take(size);
        if !p.is_null() {
            kept += size;
            // SAFETY: it is ours, and has that size.
            unsafe {
                p.write_bytes(1, size);
                maps.give_back(p, size);
            }
        }
    }
    assert!((BYTES_KEPT / 2..=BYTES_KEPT).contains(&kept), "{kept}");
    // SAFETY: nobody uses it.
    unsafe { maps.give_back(new(2 * BYTES_KEPT), 2 * BYTES_KEPT) };
    assert!(maps.take(2 * BYTES_KEPT).is_null(), "the largest are not kept");
    maps.clear();
    assert!(maps.is_empty());
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
