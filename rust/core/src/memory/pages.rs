//! Memory of large results, on huge pages and used again.
//!
//! Gradients of weights are gigabytes that a training step allocates, reads once and frees. Faulting such memory in
//! anew takes several times as long as writing it, even on huge pages, because the kernel clears every page first.
//! So blocks that are given back are kept, marked as free to the kernel (`MADV_FREE`): it takes their pages when it
//! runs short of memory, and otherwise the next result finds them where they were.
//!
//! Small blocks are not marked but simply kept, `MOST_UNMARKED` bytes at most: every core that has written a mapping
//! must forget the old state of its pages, which costs more (70 us for the 2 MiB of a plan) than is gained.

use std::sync::Mutex;

/// Bytes of a huge page on x86-64 and the common aarch64 configuration.
pub(crate) const HUGE_PAGE: usize = 2 << 20;

/// Blocks kept at most; their bytes are limited to a quarter of the machine's memory.
const MOST_MAPPINGS: usize = 32;

/// Bytes of blocks that are kept without the kernel being told.
const MOST_UNMARKED: usize = 32 << 20;

/// Blocks nobody uses, the one given back last at the end.
static FREE: Mutex<Vec<Mapping>> = Mutex::new(Vec::new());

/// Uninitialised memory aligned to huge pages. Dropping it keeps it for the next one of the same size.
pub struct Pages {
    // Empty only while being dropped.
    mapping: Option<Mapping>,
}

impl Pages {
    /// At least `bytes` bytes.
    ///
    /// # Errors
    /// The system refuses so much memory.
    pub fn new(bytes: usize) -> std::io::Result<Self> {
        let length = bytes
            .max(1)
            .checked_next_multiple_of(HUGE_PAGE)
            .ok_or_else(|| std::io::Error::from(std::io::ErrorKind::OutOfMemory))?;
        let kept = FREE.try_lock().ok().and_then(|mut free| {
            let found = free.iter().rposition(|mapping| mapping.length == length)?;
            Some(free.remove(found))
        });
        let mapping = match kept {
            Some(mapping) => mapping,
            None => Mapping::new(length)?,
        };
        Ok(Self { mapping: Some(mapping) })
    }

    /// The first byte.
    pub fn start(&self) -> *mut u8 {
        self.mapping.as_ref().map_or(std::ptr::null_mut(), |mapping| mapping.start)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // Whoever cannot have the list at once unmaps: nobody waits, not even the child of a fork.
        if let (Some(mut mapping), Ok(mut free)) = (self.mapping.take(), FREE.try_lock()) {
            let unmarked = free.iter().filter(|mapping| !mapping.marked).map(|mapping| mapping.length).sum::<usize>();
            mapping.marked = unmarked + mapping.length > MOST_UNMARKED;
            if mapping.marked {
                mapping.release_lazily();
            }
            free.push(mapping);
            let limit = memory_bytes() / 4;
            while free.len() > MOST_MAPPINGS || free.iter().map(|mapping| mapping.length).sum::<usize>() > limit {
                free.remove(0);
            }
        }
    }
}

/// A mapping of its own.
struct Mapping {
    start: *mut u8,
    length: usize,
    /// Whether the kernel may take its pages.
    marked: bool,
}

// SAFETY: plain memory.
unsafe impl Send for Mapping {}
// SAFETY: `Pages` hands out the address only.
unsafe impl Sync for Mapping {}

#[cfg(unix)]
impl Mapping {
    fn new(length: usize) -> std::io::Result<Self> {
        // Mappings start anywhere: one huge page more, whose ends are given back.
        let room = length + HUGE_PAGE;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping; only its ends, which nobody knows of, are given back.
        unsafe {
            let mapped = libc::mmap(std::ptr::null_mut(), room, access, flags, -1, 0);
            if mapped == libc::MAP_FAILED {
                return Err(std::io::Error::last_os_error());
            }
            let before = (mapped as usize).next_multiple_of(HUGE_PAGE) - mapped as usize;
            let start = mapped.cast::<u8>().add(before);
            if before > 0 {
                libc::munmap(mapped, before);
            }
            libc::munmap(start.add(length).cast(), HUGE_PAGE - before);
            #[cfg(target_os = "linux")]
            libc::madvise(start.cast(), length, libc::MADV_HUGEPAGE);
            Ok(Self { start, length, marked: false })
        }
    }

    fn release_lazily(&self) {
        // SAFETY: the mapping is this value's own, and nobody uses it.
        unsafe { libc::madvise(self.start.cast(), self.length, libc::MADV_FREE) };
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

#[cfg(not(unix))]
impl Mapping {
    fn layout(length: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(length, HUGE_PAGE).expect("size was rounded without overflow")
    }

    fn new(length: usize) -> std::io::Result<Self> {
        let start = unsafe { std::alloc::alloc(Self::layout(length)) };
        if start.is_null() {
            Err(std::io::ErrorKind::OutOfMemory.into())
        } else {
            Ok(Self { start, length, marked: false })
        }
    }

    fn release_lazily(&self) {}
}

#[cfg(not(unix))]
impl Drop for Mapping {
    fn drop(&mut self) {
        unsafe { std::alloc::dealloc(self.start, Self::layout(self.length)) };
    }
}

/// Asks for huge pages behind freshly allocated memory of 4 MiB or more, before it is written.
///
/// Writing such memory for the first time is bound by page faults: 512 of them become one.
pub fn advise_huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes >= 2 * HUGE_PAGE {
        let first = (start as usize).next_multiple_of(HUGE_PAGE);
        let last = (start as usize + bytes) / HUGE_PAGE * HUGE_PAGE;
        if first < last {
            // SAFETY: advice about whole pages within the memory: a kernel without huge pages refuses it and nothing
            // changes.
            unsafe { libc::madvise(first as *mut libc::c_void, last - first, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

/// The machine's memory; where it is not known, 8 GiB.
fn memory_bytes() -> usize {
    #[cfg(unix)]
    {
        // SAFETY: questions about the system.
        let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
        if let (Ok(pages), Ok(size)) = (usize::try_from(pages), usize::try_from(size)) {
            return pages.saturating_mul(size);
        }
    }
    8 << 30
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_writable_and_used_again() {
        // A size no other test uses.
        let bytes = 5 * HUGE_PAGE - 3;
        let first = Pages::new(bytes).unwrap();
        let start = first.start();
        assert!((start as usize).is_multiple_of(HUGE_PAGE));
        // SAFETY: so many bytes were asked for.
        unsafe { start.write_bytes(7, bytes) };
        let second = Pages::new(bytes).unwrap();
        assert_ne!(second.start(), start);
        drop(first);
        let third = Pages::new(bytes).unwrap();
        assert_eq!(third.start(), start);
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(Pages::new(usize::MAX).is_err());
        assert!(Pages::new(usize::MAX / 2).is_err());
    }
}
