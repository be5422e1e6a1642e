//! Prints the cost of a `parallel` call whose work is empty, and of one whose halves take 20 us each.

use std::time::{Duration, Instant};

use moekern_core::threads::parallel;

fn main() {
    for threads in [1, 2, 4] {
        for work in [Duration::ZERO, Duration::from_micros(20)] {
            let awake = median(threads, work, Duration::ZERO);
            let asleep = median(threads, work, Duration::from_micros(300));
            println!("{threads} threads, {work:?} an index: {awake:?} with workers awake, {asleep:?} asleep");
        }
    }
}

fn median(threads: usize, work: Duration, pause: Duration) -> Duration {
    let mut times: Vec<Duration> = (0..2001)
        .map(|_| {
            std::thread::sleep(pause);
            let start = Instant::now();
            parallel(threads, &|_| {
                let start = Instant::now();
                while start.elapsed() < work {
                    std::hint::spin_loop();
                }
            });
            start.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2]
}
