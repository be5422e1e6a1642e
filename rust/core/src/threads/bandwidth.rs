//! The memory's own speed, which bounds every kernel whose weights or results do not fit the caches.

use super::pool::parallel;
use crate::vector::isa::Isa;
use crate::vector::isa::with_simd;
use crate::vector::simd::{Kernel, Simd, fence};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Bytes that a thread takes at a time.
const PIECE: usize = 1 << 20;

/// Bytes a second at which `threads` threads read, or overwrite past the caches, whole mebibytes from `start`.
///
/// What is written is not zero: some machines store zeros faster than anything else.
///
/// # Safety
/// `bytes` bytes from `start`, which is aligned to 64, can be read, and written if `write`. This CPU has `isa`.
pub unsafe fn memory_rate(isa: Isa, start: *mut u8, bytes: usize, threads: usize, write: bool) -> f64 {
    let (next, address) = (AtomicUsize::new(0), start as usize);
    let began = Instant::now();
    parallel(threads.max(1), &|_| {
        loop {
            let piece = next.fetch_add(1, Ordering::Relaxed);
            if piece >= bytes / PIECE {
                return;
            }
            let start = (address + piece * PIECE) as *mut f32;
            // SAFETY: a whole piece of the caller's memory, drawn once.
            with_simd!(isa, S => unsafe { S::enter(Sweep { start, write }) });
        }
    });
    (bytes / PIECE * PIECE) as f64 / began.elapsed().as_secs_f64()
}

/// One piece.
struct Sweep {
    start: *mut f32,
    write: bool,
}

impl Kernel for Sweep {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the sweep's piece is `PIECE` bytes, a whole number of steps of eight vectors, and aligned to
        // vectors.
        unsafe {
            let mut sums = [S::splat(1.25); 8];
            let mut at = self.start;
            let end = self.start.add(PIECE / 4);
            while at < end {
                for (i, sum) in sums.iter_mut().enumerate() {
                    if self.write {
                        S::stream(at.add(i * S::LANES), *sum);
                    } else {
                        *sum = S::add(*sum, S::load(at.add(i * S::LANES)));
                    }
                }
                at = at.add(8 * S::LANES);
            }
            std::hint::black_box(&sums);
            fence();
        }
    }
}
