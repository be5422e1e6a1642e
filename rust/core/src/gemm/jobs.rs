//! Work cut into tickets that threads draw until none is left, several jobs one after the other without a
//! pause between them.

use super::scratch::{Scratch, with_scratch};
use crate::pool::parallel;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Independent pieces of work, numbered.
///
/// Which thread does a piece must not change its result.
pub trait Job: Sync {
    /// How many pieces there are.
    fn tickets(&self) -> usize;

    /// Does piece `ticket`.
    fn run(&self, ticket: usize, worker: &mut Worker);
}

/// What a thread brings to a ticket.
pub struct Worker<'a> {
    /// Its buffers.
    pub scratch: &'a mut Scratch,
    /// What the job left packed in them, [`Worker::NOTHING`] when the thread comes from another job.
    pub packed: usize,
    /// The piece of the same job that this thread is likely to draw next, if there is one.
    pub upcoming: Option<usize>,
}

impl Worker<'_> {
    /// No operand is packed.
    pub const NOTHING: usize = usize::MAX;
}

/// Runs all tickets of all jobs on up to `threads` threads. Tickets are drawn in order, jobs in order.
pub fn run_jobs(threads: usize, jobs: &[&dyn Job]) {
    let total = jobs.iter().map(|job| job.tickets()).sum::<usize>();
    let next = AtomicUsize::new(0);
    let work = |_| {
        with_scratch(|scratch| {
            let (mut job, mut start) = (0, 0);
            let mut worker = Worker { scratch, packed: Worker::NOTHING, upcoming: None };
            loop {
                let ticket = next.fetch_add(1, Ordering::Relaxed);
                if ticket >= total {
                    return;
                }
                while ticket - start >= jobs[job].tickets() {
                    start += jobs[job].tickets();
                    job += 1;
                    worker.packed = Worker::NOTHING;
                }
                let upcoming = next.load(Ordering::Relaxed) - start;
                worker.upcoming = (upcoming < jobs[job].tickets()).then_some(upcoming);
                jobs[job].run(ticket - start, &mut worker);
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
        fn run(&self, ticket: usize, worker: &mut Worker) {
            assert!(worker.upcoming.is_none_or(|t| t > ticket && t < self.0.len()));
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
