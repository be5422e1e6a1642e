//! The half of a plan that the other half follows from, for a device that makes the other half itself.
//!
//! `order[inverse[slot]] = slot`, so a plan that has to cross a bus goes as `inverse` and `offsets`. Without `order`
//! there are no scattered writes: the slots of every chunk are counted, a scan turns the counts into first rows, and a
//! second pass hands out rows. Chunks, and their counters side by side, are those of [`crate::plan`].

use std::ops::Range;

use crate::plan::{Id, PlanError};
use crate::pool::parallel;

/// Fewer slots than this are not worth a thread that is awake; see [`wake`].
const MIN_SLOTS_PER_THREAD: usize = 1 << 14;

/// Chunks that one thread goes through side by side, so that their counters' latencies overlap.
const LANES: usize = 2;

/// Wakes threads of the pool that sleep, so that a call of [`half_plan`] that follows within 200 us finds them awake.
pub fn wake(slots: usize, threads: usize) {
    parallel(threads_for(slots, threads), &|_| {});
}

fn threads_for(slots: usize, threads: usize) -> usize {
    threads.min(slots / MIN_SLOTS_PER_THREAD).max(1)
}

/// The `inverse` and `offsets` of [`crate::plan::plan`], bit for bit.
pub fn half_plan<I: Id>(ids: &[I], inverse: &mut [i32], offsets: &mut [i32], threads: usize) -> Result<(), PlanError> {
    let slots = ids.len();
    if slots > i32::MAX as usize {
        return Err(PlanError::TooManySlots(slots));
    }
    let experts = offsets.len().wrapping_sub(1);
    if experts == 0 || experts >= i32::MAX as usize {
        return Err(PlanError::Experts(if offsets.is_empty() { 0 } else { experts }));
    }
    if inverse.len() != slots {
        return Err(PlanError::Length { output: "inverse", got: inverse.len(), expected: slots });
    }
    let buckets = experts + 1;
    // Counters never outnumber the slots by much, else clearing and scanning them would be most of the work.
    let threads = threads_for(slots, threads).min((slots / (LANES * buckets)).max(1));
    let mut counters = vec![0u32; threads * LANES * buckets];
    let job =
        Job { ids, experts: experts as u32, inverse: inverse.as_mut_ptr(), counters: counters.as_mut_ptr(), threads };
    // Safety: each thread has the counters and the slots of its own chunks.
    parallel(threads, &|t| unsafe { job.side_by_side(t, |counter, _| *counter += 1) });
    let mut row = 0u32;
    for (bucket, offset) in offsets.iter_mut().enumerate() {
        *offset = row as i32;
        for counter in counters[bucket..].iter_mut().step_by(buckets) {
            row += std::mem::replace(counter, row);
        }
    }
    parallel(threads, &|t| unsafe {
        job.side_by_side(t, |counter, slot| {
            // Safety: `slot` is one of the thread's own.
            *job.inverse.add(slot) = *counter as i32;
            *counter += 1;
        });
    });
    Ok(())
}

struct Job<'a, I> {
    ids: &'a [I],
    experts: u32,
    inverse: *mut i32,
    counters: *mut u32,
    threads: usize,
}

// Safety: threads touch disjoint elements behind the pointers, see `half_plan`.
unsafe impl<I: Sync> Sync for Job<'_, I> {}

impl<I: Id> Job<'_, I> {
    fn chunk(&self, index: usize) -> Range<usize> {
        let start = |i: usize| (i as u64 * self.ids.len() as u64 / (self.threads * LANES) as u64) as usize;
        start(index)..start(index + 1)
    }

    /// Calls `step` with the counter of every slot of a thread's chunks, in slot order within a chunk.
    ///
    /// # Safety
    /// No other thread runs it for the same `thread`.
    #[inline(always)]
    unsafe fn side_by_side(&self, thread: usize, step: impl Fn(&mut u32, usize)) {
        let chunks: [Range<usize>; LANES] = std::array::from_fn(|i| self.chunk(thread * LANES + i));
        let buckets = self.experts as usize + 1;
        let counters: [*mut u32; LANES] =
            std::array::from_fn(|i| self.counters.wrapping_add((thread * LANES + i) * buckets));
        // Safety: `slot` is below the number of slots, a bucket at most `experts`, the last counter of a chunk.
        let visit = |lane: usize, slot: usize| unsafe {
            let bucket = self.ids.get_unchecked(slot).bucket(self.experts) as usize;
            step(&mut *counters[lane].add(bucket), slot);
        };
        let common = chunks.iter().map(Range::len).min().unwrap_or(0);
        for i in 0..common {
            for (lane, chunk) in chunks.iter().enumerate() {
                visit(lane, chunk.start + i);
            }
        }
        for (lane, chunk) in chunks.iter().enumerate() {
            for slot in chunk.start + common..chunk.end {
                visit(lane, slot);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::plan;

    fn check<I: Id>(ids: &[I], experts: usize, threads: usize) {
        let (mut order, mut inverse) = (vec![-1; ids.len()], vec![-1; ids.len()]);
        let mut offsets = vec![-1; experts + 1];
        plan(ids, &mut order, &mut inverse, &mut offsets, 1).unwrap();
        let (mut half, mut half_offsets) = (vec![-1; ids.len()], vec![-1; experts + 1]);
        wake(ids.len(), threads);
        half_plan(ids, &mut half, &mut half_offsets, threads).unwrap();
        assert_eq!(inverse, half);
        assert_eq!(offsets, half_offsets);
    }

    #[test]
    fn agrees_with_the_whole_plan() {
        let mut state = 1u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize
        };
        for slots in [0, 1, 2, 3, 1000, 16384, 65537, 200_001] {
            for experts in [1, 7, 128, 255] {
                let ids: Vec<u8> = (0..slots).map(|_| (random() % (experts + 1)) as u8).collect();
                for threads in [1, 2, 5] {
                    check(&ids, experts, threads);
                }
                let wide: Vec<i64> = ids.iter().map(|&id| i64::from(id) - 1).collect();
                check(&wide, experts, 3);
            }
        }
        check(&vec![3u16; 100_000], 1024, 4);
        check(&vec![300u16; 40_000], 70_000, 4);
    }

    #[test]
    fn refuses_what_the_whole_plan_refuses() {
        assert_eq!(half_plan::<u8>(&[], &mut [], &mut [], 1), Err(PlanError::Experts(0)));
        assert_eq!(half_plan::<u8>(&[], &mut [], &mut [0], 1), Err(PlanError::Experts(0)));
        let length = PlanError::Length { output: "inverse", got: 1, expected: 2 };
        assert_eq!(half_plan::<u8>(&[0, 0], &mut [0], &mut [0, 0], 1), Err(length));
    }
}
