//! Work cut into tickets that threads draw until none is left, several jobs one after the other without a
//! pause between them.

use super::pool::parallel;
use crate::memory::scratch::{Scratch, with_scratch};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Independent pieces of work, numbered.
///
/// Which thread does a piece must not change its result.
pub trait Job: Sync {
    /// How many pieces there are.
    fn tickets(&self) -> usize;

    /// Does piece `ticket`.
    fn run(&self, ticket: usize, thread: &mut ThreadState);
}

/// What a thread brings to a ticket.
pub struct ThreadState<'a> {
    /// Its buffers.
    pub scratch: &'a mut Scratch,
    /// What the job left packed in them, [`ThreadState::NOTHING`] when the thread comes from another job.
    pub packed: usize,
    next: &'a AtomicUsize,
    /// Where the pieces of the job lie among those of all jobs.
    range: Range<usize>,
}

impl ThreadState<'_> {
    /// No operand is packed.
    pub const NOTHING: usize = usize::MAX;

    /// The piece of the same job that this thread would draw now, if there is one: best asked towards the end of a
    /// piece, when the other threads have drawn theirs.
    pub fn upcoming(&self) -> Option<usize> {
        let next = self.next.load(Ordering::Relaxed);
        self.range.contains(&next).then(|| next - self.range.start)
    }
}

/// Runs all tickets of all jobs on up to `threads` threads. Tickets are drawn in order, jobs in order.
pub fn run_jobs(threads: usize, jobs: &[&dyn Job]) {
    let total = jobs.iter().map(|job| job.tickets()).sum::<usize>();
    let next = AtomicUsize::new(0);
    let work = |_| {
        with_scratch(|scratch| {
            let mut job = 0;
            let range = 0..jobs[0].tickets();
            let mut thread = ThreadState { scratch, packed: ThreadState::NOTHING, next: &next, range };
            loop {
                let ticket = next.fetch_add(1, Ordering::Relaxed);
                if ticket >= total {
                    return;
                }
                while ticket >= thread.range.end {
                    job += 1;
                    thread.range = thread.range.end..thread.range.end + jobs[job].tickets();
                    thread.packed = ThreadState::NOTHING;
                }
                jobs[job].run(ticket - thread.range.start, &mut thread);
            }
        });
    };
    let threads = threads.min(total);
    if threads > 0 {
        parallel(threads, &work);
    }
}

/// Cuts `count` into the fewest parts of at most `most`, as even as possible: `(start, length)` of each.
pub fn even_parts(count: usize, most: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    let parts = count.div_ceil(most);
    (0..parts).map(move |i| {
        let (start, end) = (count * i / parts, count * (i + 1) / parts);
        (start, end - start)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_parts_cover_everything_once() {
        for count in 0..100 {
            for most in 1..14 {
                let mut end = 0;
                for (start, length) in even_parts(count, most) {
                    assert_eq!(start, end);
                    assert!((1..=most).contains(&length));
                    end += length;
                }
                assert_eq!(end, count);
            }
        }
    }

    struct Count(Vec<AtomicUsize>);

    impl Job for Count {
        fn tickets(&self) -> usize {
            self.0.len()
        }
        fn run(&self, ticket: usize, thread: &mut ThreadState) {
            assert!(thread.upcoming().is_none_or(|t| t > ticket && t < self.0.len()));
            self.0[ticket].fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn every_ticket_runs_once() {
        for threads in [1, 2, 5] {
            let jobs = [0, 3, 0, 100, 1].map(|n| Count((0..n).map(|_| AtomicUsize::new(0)).collect()));
            run_jobs(threads, &jobs.each_ref().map(|job| job as &dyn Job));
            assert!(jobs.iter().flat_map(|job| &job.0).all(|n| n.load(Ordering::Relaxed) == 1));
        }
    }
}
