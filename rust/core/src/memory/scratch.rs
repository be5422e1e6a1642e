//! Working memory that threads keep between calls.

use super::pages::{HUGE_PAGE, advise_huge_pages};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;

/// An outgrown or oversized buffer is not kept for the next call beyond this many bytes.
const KEEP: usize = 256 << 20;

/// A growing piece of memory, aligned to cache lines, on huge pages when large.
///
/// Its contents do not survive growth and are unspecified, but initialised.
pub struct Buffer {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory.
unsafe impl Send for Buffer {}

impl Buffer {
    /// An empty buffer.
    pub const fn new() -> Self {
        Self { start: std::ptr::null_mut(), bytes: 0 }
    }

    fn layout(bytes: usize) -> Layout {
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 64 };
        Layout::from_size_align(bytes, align).expect("scratch size overflows the address space")
    }

    /// At least `bytes` bytes, with a cache line to spare behind them.
    pub fn bytes(&mut self, bytes: usize) -> *mut u8 {
        let wanted = bytes.checked_add(64).expect("scratch size overflows");
        if self.bytes < wanted {
            self.release();
            let rounded = wanted.next_multiple_of(if wanted >= HUGE_PAGE { HUGE_PAGE } else { 4096 });
            let layout = Self::layout(rounded);
            // SAFETY: the size is not zero: `wanted` is at least 64.
            let start = unsafe { alloc(layout) };
            if start.is_null() {
                handle_alloc_error(layout);
            }
            self.start = start;
            self.bytes = rounded;
            // Before anything is written: pages keep the size they have.
            advise_huge_pages(start, rounded);
            // SAFETY: so many bytes were allocated.
            unsafe { start.write_bytes(0, rounded) };
        }
        self.start
    }

    /// At least `count` fp32 values or words.
    pub fn words(&mut self, count: usize) -> *mut f32 {
        self.bytes(count.checked_mul(4).expect("scratch size overflows")).cast()
    }

    fn release(&mut self) {
        if !self.start.is_null() {
            // SAFETY: allocated by `bytes` with this layout.
            unsafe { dealloc(self.start, Self::layout(self.bytes)) };
            self.start = std::ptr::null_mut();
            self.bytes = 0;
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.release();
    }
}

/// The buffers of one thread. Which kernel uses which is the kernel's affair.
pub struct Scratch {
    /// Packed activations.
    pub panels: Buffer,
    /// Packed or widened weights.
    pub weights: Buffer,
    /// Results before they are rounded and stored.
    pub results: Buffer,
    /// Anything else.
    pub extra: Buffer,
    /// Addresses of the rows being packed.
    pub rows: Vec<*const u8>,
}

impl Scratch {
    const fn new() -> Self {
        Self {
            panels: Buffer::new(),
            weights: Buffer::new(),
            results: Buffer::new(),
            extra: Buffer::new(),
            rows: Vec::new(),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
    static WORKSPACE: RefCell<[Buffer; 2]> = const { RefCell::new([Buffer::new(), Buffer::new()]) };
}

/// Runs `f` with this thread's buffers. Not reentrant.
pub fn with_scratch<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    SCRATCH.with(|scratch| f(&mut scratch.borrow_mut()))
}

/// Runs `f` with two buffers of the calling thread for results that all threads of a call share.
/// Memory beyond 256 MiB a buffer is given back at the end. Not reentrant.
pub fn with_workspace<R>(f: impl FnOnce(&mut [Buffer; 2]) -> R) -> R {
    WORKSPACE.with(|workspace| {
        let mut buffers = workspace.borrow_mut();
        let result = f(&mut buffers);
        for buffer in buffers.iter_mut().filter(|buffer| buffer.bytes > KEEP) {
            buffer.release();
        }
        result
    })
}
