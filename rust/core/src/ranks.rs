//! A plan in few bytes, for a device that has the ids and completes it.
//!
//! The slots are cut into chunks. A slot's *rank* is its number among the slots of its chunk that name its expert, and
//! every chunk has a first row for every expert; the slot's row is the sum of the two. So what has to cross a bus is two
//! bytes a slot and a small table, and the host goes through the ids once: there are no rows to write, and none to look
//! up. Where the ids arrive piece by piece, chunks are ranked as they come.

use std::ops::Range;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;

use crate::buckets::Id;
use crate::plan::PlanError;
use crate::pool::parallel;

/// Slots of the smallest chunk, and the step of larger ones.
pub const CHUNK_STEP: usize = 1 << 12;

/// A rank is 16 bits wide, and so is a chunk's count of an expert's slots.
const MOST_CHUNK: usize = 15 * CHUNK_STEP;

/// A chunk has so many times as many slots as there are experts, else the table would outgrow the ranks.
const SLOTS_PER_BUCKET: usize = 8;

/// Counts between those of two chunks, so that threads do not write the same cache line: 64 bytes of them.
const LINE: usize = 32;

/// Chunks that one thread goes through side by side, so that their counters' latencies overlap.
const LANES: usize = 2;

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
        let size = ((experts + 1) * SLOTS_PER_BUCKET).next_multiple_of(CHUNK_STEP).min(MOST_CHUNK);
        Ok(Self { slots, experts, size })
    }

    /// Slots of every chunk but the last, a multiple of [`CHUNK_STEP`].
    pub fn size(&self) -> usize {
        self.size
    }

    /// How many there are; one if there are no slots.
    pub fn count(&self) -> usize {
        self.slots.div_ceil(self.size).max(1)
    }

    /// Entries of the table of first rows: for every chunk one for every expert, and one for the slots that name none.
    pub fn table_len(&self) -> usize {
        self.count() * (self.experts + 1)
    }

    fn slots_of(&self, chunk: usize) -> Range<usize> {
        (chunk * self.size).min(self.slots)..((chunk + 1) * self.size).min(self.slots)
    }

    fn units(&self) -> usize {
        self.count().div_ceil(LANES)
    }
}

/// Wakes threads that sleep, so that a call of [`rank`] which follows within 200 us finds them awake.
pub fn wake(chunks: &Chunks, threads: usize) {
    parallel(threads.min(chunks.units()), &|_| {});
}

/// Fills `ranks`, one a slot, and `first_rows`, `[chunks, experts + 1]`; its first line are the plan's offsets.
///
/// `arrived` is called with a range of slots before their ids are read, by any thread, and with all slots by the calling
/// one: it returns when the ids are there, or false if they will never be, and so does this function. At most `threads`
/// threads work on it.
///
/// # Safety
/// `ids` and `ranks` have as many elements as there are slots, `first_rows` has [`Chunks::table_len`]; nobody else uses
/// the latter two meanwhile, and nobody writes ids that have arrived.
pub unsafe fn rank<I: Id>(
    ids: *const I,
    chunks: &Chunks,
    ranks: *mut u16,
    first_rows: *mut i32,
    threads: usize,
    arrived: &(dyn Fn(Range<usize>) -> bool + Sync),
) -> bool {
    let stride = chunks.experts + 1 + LINE;
    let mut counts = vec![0u16; chunks.count() * stride];
    let job = Job { ids, chunks, ranks, counts: counts.as_mut_ptr(), stride };
    let (next, lost) = (AtomicUsize::new(0), AtomicUsize::new(0));
    // Threads draw units one by one: one that wakes late leaves its share to the others.
    parallel(threads.min(chunks.units()).max(1), &|index| {
        // Of the thread's own, on cache lines that no other thread writes.
        let mut memory = vec![0u32; LANES * (chunks.experts + 1) + LINE];
        let counters = &mut memory[LINE / 2..][..LANES * (chunks.experts + 1)];
        loop {
            let unit = next.fetch_add(1, Relaxed);
            if unit >= chunks.units() {
                break;
            }
            // Safety: nobody else draws this unit.
            if !arrived(chunks.slots_of(unit * LANES).start..chunks.slots_of(unit * LANES + LANES - 1).end) {
                lost.store(1, Relaxed);
                break;
            }
            unsafe { job.rank_unit(unit, counters) };
        }
        // The caller does not sleep while another thread waits: it alone may be able to tell that ids are lost.
        if index == 0 && !arrived(0..chunks.slots) {
            lost.store(1, Relaxed);
        }
    });
    if lost.load(Relaxed) != 0 {
        return false;
    }
    // Safety: the caller's; the threads are done.
    scan(&counts, stride, unsafe { std::slice::from_raw_parts_mut(first_rows.cast(), chunks.table_len()) }, chunks);
    true
}

struct Job<'a, I> {
    ids: *const I,
    chunks: &'a Chunks,
    ranks: *mut u16,
    counts: *mut u16,
    stride: usize,
}

// Safety: threads touch disjoint elements behind the pointers, see `rank`.
unsafe impl<I: Sync> Sync for Job<'_, I> {}

impl<I: Id> Job<'_, I> {
    /// Ranks the slots of `LANES` chunks, with the thread's own counters, and leaves their counts.
    ///
    /// # Safety
    /// No other thread runs it for the same unit, whose ids have arrived.
    unsafe fn rank_unit(&self, unit: usize, own: &mut [u32]) {
        let (experts, buckets) = (self.chunks.experts as u32, self.chunks.experts + 1);
        let first = unit * LANES;
        let lanes = LANES.min(self.chunks.count() - first);
        let slots: [Range<usize>; LANES] = std::array::from_fn(|i| self.chunks.slots_of(first + i));
        own.fill(0);
        let counters: [*mut u32; LANES] = std::array::from_fn(|i| own[i * buckets..].as_mut_ptr());
        // Safety: a bucket is at most `experts`, the last of a chunk's counters; slots are in bounds.
        unsafe {
            let next = |lane: usize, slot: usize| {
                let counter = counters[lane].add((*self.ids.add(slot)).bucket(experts) as usize);
                let rank = *counter;
                *counter = rank + 1;
                rank
            };
            // What a slot costs is mostly stores: four ranks share one.
            let common = slots.iter().map(Range::len).min().unwrap_or(0) / 4 * 4;
            for i in (0..common).step_by(4) {
                let mut packed = [0u64; LANES];
                for j in 0..4 {
                    for (lane, range) in slots.iter().enumerate() {
                        packed[lane] |= u64::from(next(lane, range.start + i + j)) << (16 * j);
                    }
                }
                for (lane, range) in slots.iter().enumerate() {
                    self.ranks.add(range.start + i).cast::<u64>().write_unaligned(packed[lane].to_le());
                }
            }
            for (lane, range) in slots.iter().enumerate() {
                for slot in range.start + common..range.end {
                    *self.ranks.add(slot) = next(lane, slot) as u16;
                }
            }
            for (lane, own) in own.chunks_exact(buckets).enumerate().take(lanes) {
                for (bucket, &count) in own.iter().enumerate() {
                    *self.counts.add((first + lane) * self.stride + bucket) = count as u16;
                }
            }
        }
    }
}

/// Turns the counts of every chunk into first rows, line by line so that it vectorises.
fn scan(counts: &[u16], stride: usize, table: &mut [u32], chunks: &Chunks) {
    let buckets = chunks.experts + 1;
    let mut rows = vec![0u32; buckets];
    for line in counts.chunks_exact(stride) {
        for (row, &count) in rows.iter_mut().zip(line) {
            *row += u32::from(count);
        }
    }
    let mut next = 0;
    for row in &mut rows {
        next += std::mem::replace(row, next);
    }
    for (line, counts) in table.chunks_exact_mut(buckets).zip(counts.chunks_exact(stride)) {
        for ((first, row), &count) in line.iter_mut().zip(&mut rows).zip(counts) {
            *first = *row;
            *row += u32::from(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan;
    use std::sync::atomic::AtomicBool;

    fn check<I: Id>(ids: &[I], experts: usize, threads: usize) {
        let (mut order, mut inverse) = (vec![-1; ids.len()], vec![-1; ids.len()]);
        let mut offsets = vec![-1; experts + 1];
        plan(ids, &mut order, &mut inverse, &mut offsets, 1).unwrap();
        let chunks = Chunks::new(ids.len(), experts).unwrap();
        let (mut ranks, mut table) = (vec![7; ids.len()], vec![-1; chunks.table_len()]);
        let seen: Vec<AtomicBool> = ids.iter().map(|_| AtomicBool::new(false)).collect();
        wake(&chunks, threads);
        let arrived = |slots: Range<usize>| {
            seen[slots].iter().for_each(|slot| slot.store(true, Relaxed));
            true
        };
        // Safety: the lengths are right.
        assert!(unsafe { rank(ids.as_ptr(), &chunks, ranks.as_mut_ptr(), table.as_mut_ptr(), threads, &arrived) });
        assert!(seen.iter().all(|slot| slot.load(Relaxed)));
        assert_eq!(offsets, table[..experts + 1]);
        for (slot, &rank) in ranks.iter().enumerate() {
            let bucket = ids[slot].bucket(experts as u32) as usize;
            assert_eq!(inverse[slot], table[slot / chunks.size() * (experts + 1) + bucket] + i32::from(rank));
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
                let wide: Vec<i64> = ids.iter().map(|&id| i64::from(id) - 1).collect();
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
            // Safety: the lengths are right.
            assert!(!unsafe { rank(ids.as_ptr(), &chunks, ranks.as_mut_ptr(), table.as_mut_ptr(), threads, &arrived) });
        }
    }

    #[test]
    fn refuses_what_a_plan_refuses() {
        assert_eq!(Chunks::new(1, 0).unwrap_err(), PlanError::Experts(0));
        assert_eq!(Chunks::new(1 << 31, 4).unwrap_err(), PlanError::TooManySlots(1 << 31));
    }
}
