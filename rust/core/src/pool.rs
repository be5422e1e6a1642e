//! Runs a function on several threads.

/// Calls `f(0)`, …, `f(threads - 1)` once each, `f(0)` on the caller's thread, and returns when all are done.
pub fn parallel(threads: usize, f: &(dyn Fn(usize) + Sync)) {
    std::thread::scope(|scope| {
        for i in 1..threads {
            scope.spawn(move || f(i));
        }
        f(0);
    });
}
