//! The plan of a Mixture-of-Experts layer: its slots, stably sorted by expert.
//!
//! A counting sort in two passes. The slots are cut into chunks, each with its own row of counters, so that chunks can
//! be counted by different threads, or side by side by one. The first pass counts; a scan, expert by expert and within
//! it chunk by chunk, turns the counts into first rows; the second pass hands out rows. The result does not depend on
//! how many chunks there are.
//!
//! What a slot costs is mostly stores, of which a core commits one a cycle, in order. So rows of two slots are stored
//! at once; and where `order` exceeds the caches, a line of it that is written next is fetched ahead: an expert's rows
//! are written one after the other, but hundreds of such streams are more than processors follow by themselves, and one
//! store that waits for memory holds up all that follow (2^24 slots of 256 experts: 4.4 ns a slot, with it 2.1).

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

use super::buckets::{Bucket, Id, narrow};
use crate::memory::pages::advise_huge_pages;
use crate::threads::pool::parallel;
use crate::vector::isa::Isa;
use crate::vector::simd::prefetch;

/// Fewer slots than this are not worth a thread of their own: waking one costs as much as counting them.
const MIN_SLOTS_PER_THREAD: usize = 1 << 15;

/// Chunks that one thread goes through side by side. A counter's next increment waits for the last one to reach memory
/// and come back, so if most slots name one expert a single chunk can be bound by that latency.
const CHUNKS_PER_THREAD: usize = 2;

/// Fewer slots than this are counted in one chunk: the scan over more would cost more than it saves.
const MIN_SLOTS_TO_SPLIT: usize = 1 << 12;

/// From so many slots on `order` does not fit the caches next to a core: its lines are fetched ahead, and one chunk is
/// enough for a thread, since more of them are more streams.
const MIN_SLOTS_FOR_PREFETCH: usize = 1 << 19;

/// Elements of `order` between a row and what is fetched ahead of it: two cache lines.
const AHEAD: usize = 32;

/// Slots that are narrowed before they are counted: their buckets are still in the first cache.
const SLOTS_AT_ONCE: usize = 512;

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
    // A request for an instruction set that cannot be had is for the kernels to refuse.
    let isa = Isa::current().unwrap_or(Isa::Scalar);
    let split = Split::new(slots, experts, threads);
    if experts <= usize::from(u16::MAX) {
        sort::<I, u16>(ids, order, inverse, offsets, isa, split);
    } else {
        sort::<I, u32>(ids, order, inverse, offsets, isa, split);
    }
    Ok(())
}

/// The work of [`plan`], with buckets that `B` can hold.
fn sort<I: Id, B: Bucket>(
    ids: &[I],
    order: &mut [i32],
    inverse: &mut [i32],
    offsets: &mut [i32],
    isa: Isa,
    split: Split,
) {
    let experts = offsets.len() - 1;
    let stride = split.stride(experts);
    let mut counters = vec![0u32; split.chunks() * stride];
    let work = CountingSort::<I, B> {
        ids,
        experts: experts as u32,
        order: order.as_mut_ptr(),
        inverse: inverse.as_mut_ptr(),
        counters: counters.as_mut_ptr(),
        stride,
        isa,
        split,
        buckets: PhantomData,
    };
    // SAFETY: each thread writes `inverse` and the counters of its own chunks.
    parallel(split.threads, &|t| unsafe { work.count(t) });
    scan(&mut counters, stride, offsets);
    // SAFETY: the counters hold first rows, so each thread writes the elements of `order` its own slots map to.
    parallel(split.threads, &|t| unsafe { work.place(t) });
}

/// How the slots are cut: `chunks_per_thread` chunks a thread, equally long but for one slot.
#[derive(Clone, Copy)]
struct Split {
    slots: usize,
    threads: usize,
    chunks_per_thread: usize,
}

impl Split {
    fn new(slots: usize, experts: usize, threads: usize) -> Self {
        // Counters never outnumber the slots, else clearing and scanning them would be most of the work.
        let most_chunks = (slots / (experts + 1)).max(1);
        let side_by_side =
            (MIN_SLOTS_TO_SPLIT..MIN_SLOTS_FOR_PREFETCH).contains(&slots) && most_chunks >= CHUNKS_PER_THREAD;
        let chunks_per_thread = if side_by_side { CHUNKS_PER_THREAD } else { 1 };
        let threads = threads.min(slots / MIN_SLOTS_PER_THREAD).min(most_chunks / chunks_per_thread).max(1);
        Self { slots, threads, chunks_per_thread }
    }

    fn chunks(self) -> usize {
        self.threads * self.chunks_per_thread
    }

    /// From a chunk's counters to the next one's: threads must not write the same cache line.
    fn stride(self, experts: usize) -> usize {
        let counters = experts + 1;
        if self.threads == 1 { counters } else { counters.next_multiple_of(16) + 16 }
    }

    fn chunk(self, index: usize) -> Range<usize> {
        let start = |i: usize| (i as u64 * self.slots as u64 / self.chunks() as u64) as usize;
        start(index)..start(index + 1)
    }
}

struct CountingSort<'a, I, B> {
    ids: &'a [I],
    experts: u32,
    order: *mut i32,
    inverse: *mut i32,
    counters: *mut u32,
    stride: usize,
    isa: Isa,
    split: Split,
    buckets: PhantomData<B>,
}

// SAFETY: threads touch disjoint elements behind the pointers, see `plan`.
unsafe impl<I: Sync, B> Sync for CountingSort<'_, I, B> {}

/// A piece of the slots, its counters and its buckets.
#[derive(Clone, Copy)]
struct Chunk<B> {
    start: usize,
    len: usize,
    counters: *mut u32,
    /// They lie at the end of the chunk's part of `inverse`, whose elements are at least as wide: going upwards, a row
    /// is written over the buckets of slots before it, or over its own.
    buckets: *mut B,
}

impl<I: Id, B: Bucket> CountingSort<'_, I, B> {
    /// The chunks of a thread.
    fn chunks<const N: usize>(&self, thread: usize) -> [Chunk<B>; N] {
        std::array::from_fn(|lane| {
            let index = thread * N + lane;
            let Range { start, end } = self.split.chunk(index);
            Chunk {
                start,
                len: end - start,
                counters: self.counters.wrapping_add(index * self.stride),
                buckets: self.inverse.wrapping_add(end).cast::<B>().wrapping_sub(end - start),
            }
        })
    }

    /// First pass over a thread's chunks.
    ///
    /// # Safety
    /// No other thread runs it for the same `thread`.
    unsafe fn count(&self, thread: usize) {
        // SAFETY: the caller's: this thread alone has these chunks.
        unsafe {
            match self.split.chunks_per_thread {
                CHUNKS_PER_THREAD => self.count_chunks::<CHUNKS_PER_THREAD>(thread),
                _ => self.count_chunks::<1>(thread),
            }
        }
    }

    #[inline(always)]
    unsafe fn count_chunks<const N: usize>(&self, thread: usize) {
        let chunks = self.chunks::<N>(thread);
        let longest = chunks.iter().map(|chunk| chunk.len).max().unwrap_or(0);
        for first in (0..longest).step_by(SLOTS_AT_ONCE) {
            for chunk in &chunks {
                let block = first.min(chunk.len)..(first + SLOTS_AT_ONCE).min(chunk.len);
                let ids = &self.ids[chunk.start + block.start..chunk.start + block.end];
                // SAFETY: the chunk's part of `inverse` holds a bucket a slot.
                unsafe { narrow(self.isa, ids, self.experts, chunk.buckets.add(block.start)) };
            }
            // SAFETY: a bucket is at most `experts`, the last counter of a chunk.
            side_by_side(&chunks, first..(first + SLOTS_AT_ONCE).min(longest), |chunk, i| unsafe {
                for slot in i {
                    *chunk.counters.add(chunk.buckets.add(slot).read_unaligned().index()) += 1;
                }
            });
        }
    }

    /// Second pass over a thread's chunks.
    ///
    /// # Safety
    /// `count` has run for every thread and `scan` after it; no other thread runs this for the same `thread`.
    unsafe fn place(&self, thread: usize) {
        // SAFETY: the caller's: all chunks are counted, and this thread alone has these.
        unsafe {
            match (self.split.chunks_per_thread, self.split.slots >= MIN_SLOTS_FOR_PREFETCH) {
                (CHUNKS_PER_THREAD, _) => self.place_chunks::<CHUNKS_PER_THREAD, false>(thread),
                (_, false) => self.place_chunks::<1, false>(thread),
                (_, true) => self.place_chunks::<1, true>(thread),
            }
        }
    }

    #[inline(always)]
    unsafe fn place_chunks<const N: usize, const PREFETCH: bool>(&self, thread: usize) {
        let chunks = self.chunks::<N>(thread);
        let longest = chunks.iter().map(|chunk| chunk.len).max().unwrap_or(0);
        // SAFETY: counters are those of the chunk's buckets.
        let next_row = |chunk: &Chunk<B>, bucket: B| unsafe {
            let counter = chunk.counters.add(bucket.index());
            let row = *counter;
            *counter = row + 1;
            row
        };
        // SAFETY: no more rows are handed out than were counted, so all are below the number of slots.
        let put = |row: u32, slot: usize| unsafe {
            if PREFETCH {
                prefetch(self.order.wrapping_add(row as usize + AHEAD));
            }
            *self.order.add(row as usize) = slot as i32;
        };
        side_by_side(&chunks, 0..longest, |chunk, i| {
            let slot = chunk.start + i.start;
            // SAFETY: `i` are elements of the chunk, whose buckets are read before rows take their place.
            unsafe {
                let (inverse, bucket) = (self.inverse.add(slot), chunk.buckets.add(i.start));
                let first = bucket.read_unaligned();
                if i.len() == 2 {
                    let second = bucket.add(1).read_unaligned();
                    let rows = [next_row(chunk, first), next_row(chunk, second)];
                    let both = u64::from(rows[0]) | u64::from(rows[1]) << 32;
                    inverse.cast::<u64>().write_unaligned(both.to_le());
                    put(rows[0], slot);
                    put(rows[1], slot + 1);
                } else {
                    let row = next_row(chunk, first);
                    *inverse = row as i32;
                    put(row, slot);
                }
            }
        });
    }
}

/// Calls `visit` for the slots `range` of each chunk, upwards, two at a time where there are two: a pair of the first
/// chunk, one of the second, and so on. The range begins at an even number.
#[inline(always)]
fn side_by_side<B: Copy, const N: usize>(
    chunks: &[Chunk<B>; N],
    range: Range<usize>,
    visit: impl Fn(&Chunk<B>, Range<usize>),
) {
    let common = chunks.iter().map(|chunk| chunk.len).min().unwrap_or(0).min(range.end);
    let mut next = range.start;
    while next + 2 <= common {
        for chunk in chunks {
            visit(chunk, next..next + 2);
        }
        next += 2;
    }
    // At most two slots more: chunks are equally long but for one.
    for chunk in chunks {
        for slot in next..range.end.min(chunk.len) {
            visit(chunk, slot..slot + 1);
        }
    }
}

/// Turns counts into first rows: an exclusive sum over the experts, and within each over the chunks.
fn scan(counters: &mut [u32], stride: usize, offsets: &mut [i32]) {
    let mut row = 0u32;
    for (bucket, offset) in offsets.iter_mut().enumerate() {
        *offset = row as i32;
        for counter in counters[bucket..].iter_mut().step_by(stride) {
            row += std::mem::replace(counter, row);
        }
    }
}
