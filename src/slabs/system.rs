//! What the system gives and takes: zeroed memory of a size and alignment, null when there is none.

#[cfg(miri)]
pub(super) use miri::{HUGE, NOT_HUGE, UNWANTED, advise, map, remap, unmap};
#[cfg(not(miri))]
pub(super) use real::{HUGE, NOT_HUGE, UNWANTED, advise, map, remap, unmap};

#[cfg(not(miri))]
mod real {
    use std::ptr::null_mut;

    use crate::slabs::PAGE;

    pub(in crate::slabs) const HUGE: i32 = libc::MADV_HUGEPAGE;
    pub(in crate::slabs) const NOT_HUGE: i32 = libc::MADV_NOHUGEPAGE;
    pub(in crate::slabs) const UNWANTED: i32 = libc::MADV_DONTNEED;

    /// More than asked for is mapped where a page's alignment will not do, and what is beside it given back.
    pub(in crate::slabs) unsafe fn map(size: usize, align: usize) -> *mut u8 {
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

    pub(in crate::slabs) unsafe fn unmap(p: *mut u8, size: usize, _: usize) {
        // SAFETY: by the caller's contract nobody uses that memory any more.
        unsafe { libc::munmap(p.cast(), size) };
    }

    pub(in crate::slabs) unsafe fn remap(p: *mut u8, size: usize, new: usize) -> *mut u8 {
        // SAFETY: by the caller's contract the old address is not used any more.
        let p = unsafe { libc::mremap(p.cast(), size, new, libc::MREMAP_MAYMOVE) };
        if p == libc::MAP_FAILED { null_mut() } else { p.cast() }
    }

    /// Wishes: where the system cannot follow, nothing is lost.
    pub(in crate::slabs) unsafe fn advise(p: *mut u8, size: usize, advice: i32) {
        // SAFETY: by the caller's contract nobody needs what is in unwanted memory.
        unsafe { libc::madvise(p.cast(), size, advice) };
    }
}

/// Miri's system: it knows no mappings.
#[cfg(miri)]
mod miri {
    use std::alloc::{GlobalAlloc, Layout, System};

    use crate::slabs::PAGE;

    pub(in crate::slabs) const HUGE: i32 = 0;
    pub(in crate::slabs) const NOT_HUGE: i32 = 1;
    pub(in crate::slabs) const UNWANTED: i32 = 2;

    pub(in crate::slabs) unsafe fn map(size: usize, align: usize) -> *mut u8 {
        unsafe { System.alloc_zeroed(Layout::from_size_align_unchecked(size, align)) }
    }

    pub(in crate::slabs) unsafe fn unmap(p: *mut u8, size: usize, align: usize) {
        unsafe { System.dealloc(p, Layout::from_size_align_unchecked(size, align)) }
    }

    pub(in crate::slabs) unsafe fn remap(p: *mut u8, size: usize, new: usize) -> *mut u8 {
        unsafe { System.realloc(p, Layout::from_size_align_unchecked(size, PAGE), new) }
    }

    pub(in crate::slabs) unsafe fn advise(p: *mut u8, size: usize, advice: i32) {
        if advice == UNWANTED {
            unsafe { p.write_bytes(0, size) };
        }
    }
}
