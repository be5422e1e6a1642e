//! The plan of a Mixture-of-Experts layer: its slots, stably sorted by expert.
//!
//! A counting sort in two passes over the ids. The slots are cut into chunks, each with its own row of counters,
//! so that chunks can be counted by different threads, or side by side by one. The first pass numbers the slots
//! of every (chunk, expert) in slot order and leaves these numbers in `inverse`; a scan, expert by expert and
//! within it chunk by chunk, turns the counts into first rows; the second pass adds the two. The result does not
//! depend on how many chunks there are.

use std::fmt;
use std::ops::Range;

use crate::gemm::scratch::advise_huge_pages;
use crate::pool::parallel;

/// Fewer slots than this are not worth a thread of their own: waking one costs as much as counting them.
const MIN_SLOTS_PER_THREAD: usize = 1 << 15;

/// Chunks that one thread counts side by side. A counter's next increment waits for the last one to reach memory
/// and come back, so if most slots name one expert a single chunk is bound by that latency; four hide it.
const LANES: usize = 4;

/// Fewer slots than this are counted in one chunk: the scan over four would cost more than it saves.
const MIN_SLOTS_FOR_LANES: usize = 1 << 12;

/// An integer that names an expert.
pub trait Id: Copy + Send + Sync {
    /// The expert's index, or `experts` for every id that is not in `0..experts`.
    fn bucket(self, experts: u32) -> u32;
}

macro_rules! ids {
    ($($id:ty, $unsigned:ty);*) => {$(
        impl Id for $id {
            #[inline(always)]
            fn bucket(self, experts: u32) -> u32 {
                // A negative id becomes a huge one. With at most i32::MAX experts this holds at every width.
                (self as $unsigned as u64).min(u64::from(experts)) as u32
            }
        }
    )*};
}
ids!(u8, u8; u16, u16; i32, u32; i64, u64);

/// Why there is no plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlanError {
    /// More slots than an `i32` counts.
    TooManySlots(usize),
    /// No experts, or more than an `i32` counts.
    Experts(usize),
    /// An output has the wrong length.
    Length {
        /// Its name.
        output: &'static str,
        /// Its length.
        got: usize,
        /// The right one.
        expected: usize,
    },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooManySlots(got) => write!(f, "ids: got {got} slots, expected at most {}", i32::MAX),
            Self::Experts(got) => write!(f, "experts: got {got}, expected 1 to {}", i32::MAX - 1),
            Self::Length { output, got, expected } => write!(f, "{output}: got length {got}, expected {expected}"),
        }
    }
}

impl std::error::Error for PlanError {}

/// Sorts the slots by expert.
///
/// `order[row]` is the slot of a row, `inverse[slot]` its row, and the rows of expert `e` are
/// `offsets[e]..offsets[e + 1]`, in slot order. There are `offsets.len() - 1` experts; slots whose id is not in
/// `0..experts` follow after `offsets[experts]`, in slot order. At most `threads` threads work on it.
pub fn plan<I: Id>(
    ids: &[I],
    order: &mut [i32],
    inverse: &mut [i32],
    offsets: &mut [i32],
    threads: usize,
) -> Result<(), PlanError> {
    let slots = ids.len();
    if slots > i32::MAX as usize {
        return Err(PlanError::TooManySlots(slots));
    }
    let experts = offsets.len().wrapping_sub(1);
    if experts == 0 || experts >= i32::MAX as usize {
        return Err(PlanError::Experts(if offsets.is_empty() { 0 } else { experts }));
    }
    for (output, got) in [("order", order.len()), ("inverse", inverse.len())] {
        if got != slots {
            return Err(PlanError::Length { output, got, expected: slots });
        }
    }

    for output in [&mut *order, &mut *inverse] {
        advise_huge_pages(output.as_mut_ptr().cast(), size_of_val(output));
    }
    let split = Split::new(slots, experts, threads);
    let mut counters = vec![0u32; split.chunks() * (experts + 1)];
    let job = Job {
        ids,
        experts: experts as u32,
        order: order.as_mut_ptr(),
        inverse: inverse.as_mut_ptr(),
        counters: counters.as_mut_ptr(),
        split,
    };
    // Safety: each thread writes `inverse` and the counters of its own chunks.
    parallel(split.threads, &|t| unsafe { job.count(t) });
    scan(&mut counters, offsets);
    // Safety: the counters hold first rows, so each thread writes the elements of `order` its own slots map to.
    parallel(split.threads, &|t| unsafe { job.place(t) });
    Ok(())
}

/// How the slots are cut: `lanes` chunks a thread, equally long but for one slot.
#[derive(Clone, Copy)]
struct Split {
    slots: usize,
    threads: usize,
    lanes: usize,
}

impl Split {
    fn new(slots: usize, experts: usize, threads: usize) -> Self {
        // Counters never outnumber the slots, else clearing and scanning them would be most of the work.
        let most_chunks = (slots / (experts + 1)).max(1);
        let lanes = if slots < MIN_SLOTS_FOR_LANES || most_chunks < LANES { 1 } else { LANES };
        let threads = threads.min(slots / MIN_SLOTS_PER_THREAD).min(most_chunks / lanes).max(1);
        Self { slots, threads, lanes }
    }

    fn chunks(self) -> usize {
        self.threads * self.lanes
    }

    fn chunk(self, index: usize) -> Range<usize> {
        let start = |i: usize| (i as u64 * self.slots as u64 / self.chunks() as u64) as usize;
        start(index)..start(index + 1)
    }
}

struct Job<'a, I> {
    ids: &'a [I],
    experts: u32,
    order: *mut i32,
    inverse: *mut i32,
    counters: *mut u32,
    split: Split,
}

// Safety: threads touch disjoint elements behind the pointers, see `plan`.
unsafe impl<I: Sync> Sync for Job<'_, I> {}

impl<I: Id> Job<'_, I> {
    /// # Safety
    /// `slot < ids.len()`.
    #[inline(always)]
    unsafe fn bucket(&self, slot: usize) -> usize {
        unsafe { self.ids.get_unchecked(slot) }.bucket(self.experts) as usize
    }

    fn counters_of(&self, chunk: usize) -> *mut u32 {
        self.counters.wrapping_add(chunk * (self.experts as usize + 1))
    }

    /// First pass over a thread's chunks.
    ///
    /// # Safety
    /// No other thread runs it for the same `thread`.
    unsafe fn count(&self, thread: usize) {
        let first = thread * self.split.lanes;
        unsafe {
            match self.split.lanes {
                LANES => self.count_lanes::<LANES>(first),
                _ => self.count_lanes::<1>(first),
            }
        }
    }

    #[inline(always)]
    unsafe fn count_lanes<const N: usize>(&self, first_chunk: usize) {
        let chunks: [Range<usize>; N] = std::array::from_fn(|i| self.split.chunk(first_chunk + i));
        let counters: [*mut u32; N] = std::array::from_fn(|i| self.counters_of(first_chunk + i));
        // Safety: `slot` is below the number of slots and a bucket at most `experts`, the last counter of a chunk.
        let step = |slot: usize, counters: *mut u32| unsafe {
            let counter = counters.add(self.bucket(slot));
            *self.inverse.add(slot) = *counter as i32;
            *counter += 1;
        };
        let common = chunks.iter().map(Range::len).min().unwrap_or(0);
        for i in 0..common {
            for lane in 0..N {
                step(chunks[lane].start + i, counters[lane]);
            }
        }
        for lane in 0..N {
            for slot in chunks[lane].start + common..chunks[lane].end {
                step(slot, counters[lane]);
            }
        }
    }

    /// Second pass over a thread's chunks.
    ///
    /// # Safety
    /// `count` has run for every thread and `scan` after it; no other thread runs this for the same `thread`.
    unsafe fn place(&self, thread: usize) {
        for chunk in thread * self.split.lanes..(thread + 1) * self.split.lanes {
            let first_rows = self.counters_of(chunk);
            for slot in self.split.chunk(chunk) {
                // Safety: bounds as in the first pass; first row and number add up to a row below `slots`.
                unsafe {
                    let inverse = self.inverse.add(slot);
                    let row = *first_rows.add(self.bucket(slot)) as i32 + *inverse;
                    *inverse = row;
                    *self.order.add(row as usize) = slot as i32;
                }
            }
        }
    }
}

/// Turns counts into first rows: an exclusive sum over the experts, and within each over the chunks.
fn scan(counters: &mut [u32], offsets: &mut [i32]) {
    let buckets = offsets.len();
    let mut row = 0u32;
    for (bucket, offset) in offsets.iter_mut().enumerate() {
        *offset = row as i32;
        for counter in counters[bucket..].iter_mut().step_by(buckets) {
            row += std::mem::replace(counter, row);
        }
    }
}
