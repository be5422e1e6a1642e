//! A plan in few bytes, for a device that has the ids and completes it.
//!
//! The slots are cut into chunks. For every boundary of chunks a table has the row of every expert's first slot after it. A
//! slot's *rank* is its distance from the nearest boundary among the slots of its expert: 0, 1, … in the first half of a
//! chunk, …, -2, -1 in the second, which is counted from the chunk's end. The slot's row is the sum of the two. So what has
//! to cross a bus is two bytes a slot and a small table, and the host goes through the ids once: there are no rows to
//! write, and none to look up. Where the ids arrive piece by piece, chunks are ranked as they come.
//!
//! The ranks, which the device alone reads, go to memory past the caches. Kept in the cache of the thread that wrote it, a
//! line would have to be fetched from there by the next plan's thread, which is mostly another one, before it may write.

use std::ops::Range;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use super::buckets::Id;
use super::sort::PlanError;
use crate::threads::pool::parallel_while;
use crate::vector::simd::fence;

/// The slots of a chunk are a multiple of it, and so those of a half of half of it.
pub const CHUNK_STEP: usize = 1 << 12;

/// Slots of a chunk at least: 5 to 10 us of a thread's work, beside which its line of the table costs little.
const LEAST_CHUNK: usize = 2 * CHUNK_STEP;

/// The ranks of both halves have 16 bits, with their signs.
const MOST_CHUNK: usize = 15 * CHUNK_STEP;

/// A chunk has so many times as many slots as there are experts, else the table would outgrow the ranks.
const SLOTS_PER_BUCKET: usize = 8;

/// Bytes of a cache line, its 16-bit ranks or counts, and what keeps two threads' memory apart: lines come in pairs.
const LINE: usize = 64;
const OF_LINE: usize = LINE / 2;
const APART: usize = 2 * LINE;

/// How the slots are cut.
#[derive(Clone, Copy, Debug)]
pub struct Chunks {
    slots: usize,
    experts: usize,
    size: usize,
}

impl Chunks {
    /// Chunks for so many slots and experts.
    pub fn new(slots: usize, experts: usize) -> Result<Self, PlanError> {
        if slots > i32::MAX as usize {
            return Err(PlanError::TooManySlots(slots));
        }
        if experts == 0 || experts >= i32::MAX as usize {
            return Err(PlanError::Experts(experts));
        }
        let size = ((experts + 1) * SLOTS_PER_BUCKET).next_multiple_of(CHUNK_STEP);
        Ok(Self { slots, experts, size: size.clamp(LEAST_CHUNK, MOST_CHUNK) })
    }

    /// Slots of every chunk but the last, a multiple of [`CHUNK_STEP`].
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many there are; one if there are no slots.
    pub fn count(&self) -> usize {
        self.slots.div_ceil(self.size).max(1)
    }

    /// Entries of the table: for every boundary, the first slot and the end too, one for every expert, and one for the
    /// slots that name none.
    pub fn table_len(&self) -> usize {
        (self.count() + 1) * (self.experts + 1)
    }

    fn slots_of(&self, chunk: usize) -> Range<usize> {
        (chunk * self.size).min(self.slots)..((chunk + 1) * self.size).min(self.slots)
    }
}

/// Fills `ranks`, one a slot, and `table`, `[chunks + 1, experts + 1]`; its first line are the plan's offsets.
///
/// `arrived` is called with a range of slots before their ids are read, by any thread, and with all slots by the calling
/// one: it returns when the ids are there, or false if they will never be, and so does this function. At most `threads`
/// threads work on it; while the others begin, the calling one runs `meanwhile`, and if that returns false, so does this.
///
/// # Safety
/// `ids` and `ranks` have as many elements as there are slots, `table` has [`Chunks::table_len`]; nobody else uses the
/// latter two meanwhile, and nobody writes ids that have arrived. No id is greater than the number of experts.
pub unsafe fn rank<I: Id>(
    ids: *const I,
    chunks: &Chunks,
    ranks: *mut i16,
    table: *mut i32,
    threads: usize,
    arrived: &(dyn Fn(Range<usize>) -> bool + Sync),
    meanwhile: impl FnOnce() -> bool,
) -> bool {
    // Lines that two threads do not share.
    let stride = (chunks.experts + 1).next_multiple_of(OF_LINE);
    let mut counts = Box::<[u16]>::new_uninit_slice(chunks.count() * stride + OF_LINE);
    let skip = counts.as_ptr().align_offset(LINE);
    let ranker = Ranker { ids, chunks, ranks, counts: counts[skip..].as_mut_ptr().cast(), stride };
    let (next, lost) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // Threads draw chunks one by one: one that wakes late leaves its share to the others.
    let work = |index| {
        let mut counters = Counters::new::<I>(chunks.experts);
        loop {
            let chunk = next.fetch_add(1, Relaxed);
            if chunk >= chunks.count() {
                break;
            }
            if !arrived(chunks.slots_of(chunk)) {
                lost.store(1, Relaxed);
                break;
            }
            // SAFETY: nobody else draws this chunk.
            unsafe { ranker.rank_chunk(chunk, &mut counters) };
        }
        // The caller does not sleep while another thread waits: it alone may be able to tell that ids are lost.
        if index == 0 && !arrived(0..chunks.slots) {
            lost.store(1, Relaxed);
        }
    };
    if !parallel_while(threads.min(chunks.count()).max(1), &work, meanwhile) || lost.load(Relaxed) != 0 {
        return false;
    }
    // SAFETY: the threads are done, and have written every chunk's counts; of the table, the caller's.
    unsafe {
        let counts = std::slice::from_raw_parts(ranker.counts, chunks.count() * stride);
        scan(counts, stride, std::slice::from_raw_parts_mut(table.cast(), chunks.table_len()), chunks.experts + 1);
    }
    true
}

/// A thread's counters of the halves of a chunk, on lines of its own.
struct Counters {
    memory: Vec<u32>,
    of_half: usize,
}

impl Counters {
    fn new<I>(experts: usize) -> Self {
        // Of 8 bits, every id has a counter, so that none has to be looked at.
        let of_half = if size_of::<I>() == 1 { 1 << 8 } else { experts + 1 };
        Self { memory: vec![0; 2 * of_half + 2 * APART / 4], of_half }
    }

    fn halves(&mut self) -> (&mut [u32], &mut [u32]) {
        self.memory[APART / 4..][..2 * self.of_half].split_at_mut(self.of_half)
    }
}

struct Ranker<'a, I> {
    ids: *const I,
    chunks: &'a Chunks,
    ranks: *mut i16,
    counts: *mut u16,
    stride: usize,
}

// SAFETY: threads touch disjoint elements behind the pointers, see `rank`.
unsafe impl<I: Sync> Sync for Ranker<'_, I> {}

impl<I: Id> Ranker<'_, I> {
    /// Ranks the slots of a chunk, and leaves its counts.
    ///
    /// Both halves are gone through side by side, one forwards, one backwards: the next slot of one may have to wait for
    /// the counter of the slot before, and then the other does not.
    ///
    /// # Safety
    /// No other thread runs it for the same chunk, whose ids have arrived.
    unsafe fn rank_chunk(&self, chunk: usize, counters: &mut Counters) {
        let most = (counters.of_half - 1) as u32;
        let (up, down) = counters.halves();
        up.fill(0);
        down.fill(0);
        let slots = self.chunks.slots_of(chunk);
        let middle = (slots.start + self.chunks.size / 2).min(slots.end);
        let common = (slots.end - middle).min(middle - slots.start) / OF_LINE * OF_LINE;
        // SAFETY: a bucket is one of a half's counters; slots are in bounds.
        unsafe {
            let next = |counters: &mut [u32], slot: usize| {
                let counter = counters.get_unchecked_mut((*self.ids.add(slot)).bucket(most) as usize);
                let rank = *counter;
                *counter = rank + 1;
                u64::from(rank)
            };
            for i in (0..common).step_by(OF_LINE) {
                // What a slot costs is mostly stores: four ranks share one.
                let (mut first, mut last) = ([0u64; OF_LINE / 4], [0u64; OF_LINE / 4]);
                let (from, to) = (slots.start + i, slots.end - i);
                for word in 0..OF_LINE / 4 {
                    let (mut forwards, mut backwards) = (0, 0);
                    for j in 0..4 {
                        forwards |= next(up, from + 4 * word + j) << (16 * j);
                        backwards |= next(down, to - 1 - 4 * word - j) << (48 - 16 * j);
                    }
                    first[word] = forwards.to_le();
                    last[OF_LINE / 4 - 1 - word] = (!backwards).to_le(); // -1 - rank, four times
                }
                store_past_caches(self.ranks.add(from).cast(), &first);
                store_past_caches(self.ranks.add(to - OF_LINE).cast(), &last);
            }
            for slot in slots.start + common..middle {
                *self.ranks.add(slot) = next(up, slot) as i16;
            }
            for slot in (middle..slots.end - common).rev() {
                *self.ranks.add(slot) = !next(down, slot) as i16;
            }
            fence();
            let counts = std::slice::from_raw_parts_mut(self.counts.add(chunk * self.stride), self.chunks.experts + 1);
            for ((count, up), down) in counts.iter_mut().zip(up).zip(down) {
                *count = (*up + *down) as u16;
            }
        }
    }
}

/// Stores a line without fetching what it replaces; [`fence`] must follow before other threads are told of it.
///
/// # Safety
/// There is room for the line.
#[inline(always)]
unsafe fn store_past_caches(to: *mut u64, line: &[u64; OF_LINE / 4]) {
    #[cfg(target_arch = "x86_64")]
    if to.cast::<u8>().align_offset(LINE) == 0 {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        // SAFETY: aligned, and SSE2 is part of the architecture.
        unsafe {
            for i in 0..LINE / 16 {
                _mm_stream_si128(to.cast::<__m128i>().add(i), _mm_loadu_si128(line.as_ptr().cast::<__m128i>().add(i)));
            }
        }
        return;
    }
    // SAFETY: the caller's: there is room for the line.
    unsafe { to.cast::<[u64; OF_LINE / 4]>().write_unaligned(*line) }
}

/// Turns the counts of every chunk, `stride` from one to the next, into the table.
fn scan(counts: &[u16], stride: usize, table: &mut [u32], buckets: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has it.
        return unsafe { scan_avx2(counts, stride, table, buckets) };
    }
    scan_with_any(counts, stride, table, buckets);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn scan_avx2(counts: &[u16], stride: usize, table: &mut [u32], buckets: usize) {
    scan_with_any(counts, stride, table, buckets);
}

/// Line by line, so that the compiler makes vectors of it.
#[inline(always)]
fn scan_with_any(counts: &[u16], stride: usize, table: &mut [u32], buckets: usize) {
    let mut rows = vec![0u32; buckets];
    for counts in counts.chunks_exact(stride) {
        for (row, &count) in rows.iter_mut().zip(&counts[..buckets]) {
            *row += u32::from(count);
        }
    }
    let mut next = 0;
    for row in &mut rows {
        next += std::mem::replace(row, next);
    }
    let (first, others) = table.split_at_mut(buckets);
    first.copy_from_slice(&rows);
    for (line, counts) in others.chunks_exact_mut(buckets).zip(counts.chunks_exact(stride)) {
        for ((entry, row), &count) in line.iter_mut().zip(&mut rows).zip(&counts[..buckets]) {
            *row += u32::from(count);
            *entry = *row;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::sort::plan;
    use std::sync::atomic::AtomicBool;

    fn check<I: Id>(ids: &[I], experts: usize, threads: usize) {
        let (mut order, mut inverse) = (vec![-1; ids.len()], vec![-1; ids.len()]);
        let mut offsets = vec![-1; experts + 1];
        plan(ids, &mut order, &mut inverse, &mut offsets, 1).unwrap();
        let chunks = Chunks::new(ids.len(), experts).unwrap();
        let (mut memory, mut table) = (vec![7; ids.len() + OF_LINE], vec![-1; chunks.table_len()]);
        // Where lines begin, and where they do not.
        let skip = memory.as_ptr().align_offset(LINE) + threads % 2;
        let ranks = &mut memory[skip.min(OF_LINE)..][..ids.len()];
        let seen: Vec<AtomicBool> = ids.iter().map(|_| AtomicBool::new(false)).collect();
        let arrived = |slots: Range<usize>| {
            seen[slots].iter().for_each(|slot| slot.store(true, Relaxed));
            true
        };
        // SAFETY: the lengths are right.
        assert!(unsafe {
            rank(ids.as_ptr(), &chunks, ranks.as_mut_ptr(), table.as_mut_ptr(), threads, &arrived, || true)
        });
        assert!(seen.iter().all(|slot| slot.load(Relaxed)));
        assert_eq!(offsets, table[..experts + 1]);
        for (slot, &rank) in ranks.iter().enumerate() {
            let bucket = ids[slot].bucket(experts as u32) as usize;
            let boundary = (slot + chunks.size() / 2) / chunks.size();
            assert_eq!(inverse[slot], table[boundary * (experts + 1) + bucket] + i32::from(rank));
        }
    }

    #[test]
    fn first_row_and_rank_are_the_row() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        for slots in [0, 1, 2, 3, 1000, 4096, 4097, 12_288, 65_537, 200_001] {
            for experts in [1, 7, 128, 255] {
                let ids: Vec<u8> = (0..slots).map(|_| (random() % (experts + 1)) as u8).collect();
                for threads in [1, 2, 5] {
                    check(&ids, experts, threads);
                }
                let wide: Vec<u16> = ids.iter().map(|&id| id.into()).collect();
                check(&wide, experts, 3);
            }
        }
        check(&vec![3u16; 200_000], 1024, 4);
        check(&vec![300i32; 140_000], 70_000, 4); // a chunk's last rank is the largest there is
    }

    #[test]
    fn ids_that_never_arrive() {
        let chunks = Chunks::new(50_000, 8).unwrap();
        let (ids, mut ranks, mut table) = (vec![0u8; 50_000], vec![0; 50_000], vec![0; chunks.table_len()]);
        let arrived = |slots: Range<usize>| slots.start < 20_000;
        for threads in [1, 3] {
            // SAFETY: the lengths are right.
            assert!(!unsafe {
                rank(ids.as_ptr(), &chunks, ranks.as_mut_ptr(), table.as_mut_ptr(), threads, &arrived, || true)
            });
        }
    }

    #[test]
    fn refuses_what_a_plan_refuses() {
        assert_eq!(Chunks::new(1, 0).unwrap_err(), PlanError::Experts(0));
        assert_eq!(Chunks::new(1 << 31, 4).unwrap_err(), PlanError::TooManySlots(1 << 31));
    }
}
