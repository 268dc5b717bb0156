//! One slab: slots of a class, and which of them are free.

use std::ptr::null_mut;

use super::{LINE, PAGE, SLAB, size_of_class, system};

/// What a slab begins with. Two bits a slot follow: those of the idle ones, which were given back and may be resident, then
/// those of the bare ones, behind which there is no memory; slots in use have neither.
pub(super) struct Slab {
    /// Neighbours in the list of slabs with room, of the same class.
    pub(super) next: *mut Slab,
    pub(super) previous: *mut Slab,
    pub(super) class: usize,
    pub(super) slots: usize,
    /// Where the slots begin.
    pub(super) first: usize,
    pub(super) used: usize,
    pub(super) idle: usize,
    /// Words of bits before which no slot is idle, and none bare.
    pub(super) idle_from: usize,
    pub(super) bare_from: usize,
    pub(super) huge: bool,
}

/// Writes a slab's beginning, all slots bare.
pub(super) unsafe fn lay_out(slab: *mut Slab, class: usize, huge: bool) {
    // SAFETY: the slab is mapped and nobody's; its bits end before its first slot.
    unsafe {
        let (begin, size) = (size_of::<Slab>(), size_of_class(class));
        let words = ((SLAB - begin) / size).div_ceil(64);
        let first = (begin + 2 * words * size_of::<u64>()).next_multiple_of(LINE);
        let slots = (SLAB - first) / size;
        let (next, previous) = (null_mut(), null_mut());
        let (used, idle, idle_from, bare_from) = (0, 0, 0, 0);
        slab.write(Slab { next, previous, class, slots, first, used, idle, idle_from, bare_from, huge });
        for word in 0..words {
            let free = u64::MAX >> (64 - slots.saturating_sub(64 * word).clamp(1, 64));
            let free = if 64 * word < slots { free } else { 0 };
            bits(slab, true).add(word).write(0);
            bits(slab, false).add(word).write(free);
        }
    }
}

/// Gives the memory behind a slab that nobody uses back to the system.
pub(super) unsafe fn clear(slab: *mut Slab) {
    // SAFETY: it is mapped; by the caller's contract nobody needs what is in it.
    unsafe {
        if (*slab).huge {
            system::advise(slab.cast(), SLAB, system::NOT_HUGE);
        }
        system::advise(slab.cast(), SLAB, system::UNWANTED);
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
pub(super) unsafe fn take_bit(slab: *mut Slab, idle: bool) -> usize {
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
pub(super) unsafe fn give_bit(slab: *mut Slab, slot: usize) {
    // SAFETY: it is one of the slab's.
    unsafe {
        *bits(slab, true).add(slot / 64) |= 1 << (slot % 64);
        (*slab).idle_from = (*slab).idle_from.min(slot / 64);
    }
}

/// Makes a slab's idle slots bare: the system takes back the whole pages in runs of free slots.
pub(super) unsafe fn strip(slab: *mut Slab) {
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
