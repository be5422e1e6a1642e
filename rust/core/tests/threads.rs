//! The thread pool: every index once, from any number of callers, through panics and forks.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use moekern_core::threads::{parallel, parallel_while};

fn calls_of_each_index(threads: usize, call: impl Fn(&(dyn Fn(usize) + Sync))) -> Vec<usize> {
    let calls: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
    call(&|i| {
        calls[i].fetch_add(1, Relaxed);
    });
    calls.into_iter().map(AtomicUsize::into_inner).collect()
}

#[test]
fn each_index_runs_once() {
    for threads in [0, 1, 2, 3, 4, 7, 16, 33] {
        for _ in 0..200 {
            assert_eq!(calls_of_each_index(threads, |f| parallel(threads, f)), vec![1; threads]);
        }
    }
}

#[test]
fn index_zero_runs_on_the_callers_thread() {
    let caller = thread::current().id();
    for _ in 0..100 {
        parallel(3, &|i| {
            if i == 0 {
                assert_eq!(thread::current().id(), caller);
            }
        });
    }
}

#[test]
fn a_sleeping_worker_is_woken() {
    let ids = std::sync::Mutex::new(std::collections::HashSet::new());
    for _ in 0..3 {
        thread::sleep(Duration::from_millis(5)); // much longer than workers spin
        parallel(2, &|_| {
            thread::sleep(Duration::from_millis(20));
            ids.lock().unwrap().insert(thread::current().id());
        });
    }
    assert!(ids.lock().unwrap().len() >= 2, "a worker took part");
}

#[test]
fn a_caller_that_finishes_first_waits() {
    for _ in 0..3 {
        let finished = AtomicUsize::new(0);
        parallel(2, &|i| {
            thread::sleep(Duration::from_millis(if i == 0 { 1 } else { 15 }));
            finished.fetch_add(1, Relaxed);
        });
        assert_eq!(finished.into_inner(), 2);
    }
}

#[test]
fn nested_calls_run_serially() {
    let counts = calls_of_each_index(12, |f| {
        parallel(4, &|i| {
            let outer = thread::current().id();
            parallel(3, &|j| {
                assert_eq!(thread::current().id(), outer);
                f(3 * i + j);
            });
        })
    });
    assert_eq!(counts, vec![1; 12]);
}

#[test]
fn many_callers_at_once() {
    thread::scope(|scope| {
        for caller in 0..8 {
            scope.spawn(move || {
                for round in 0..500 {
                    let threads = 1 + (caller + round) % 5;
                    assert_eq!(calls_of_each_index(threads, |f| parallel(threads, f)), vec![1; threads]);
                }
            });
        }
    });
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_survives() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {})); // expected panics need no backtraces
    for bad in 0..4 {
        let others = AtomicUsize::new(0);
        let result = catch_unwind(AssertUnwindSafe(|| {
            parallel(4, &|i| {
                if i == bad {
                    panic!("index {i}");
                }
                others.fetch_add(1, Relaxed);
            })
        }));
        let message = *result.expect_err("propagates").downcast::<String>().expect("the payload is kept");
        assert_eq!(message, format!("index {bad}"));
        assert_eq!(others.into_inner(), 3);
        assert_eq!(calls_of_each_index(4, |f| parallel(4, f)), vec![1; 4]);
    }
    std::panic::set_hook(hook);
}

#[cfg(unix)]
#[test]
fn a_forked_child_has_a_working_pool() {
    parallel(4, &|_| {});
    for _ in 0..20 {
        // SAFETY: the child only runs the pool and leaves by _exit.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: a timer of the child's own.
            unsafe { libc::alarm(20) }; // a child that hangs is killed
            let sum = AtomicUsize::new(0);
            for _ in 0..10 {
                parallel(4, &|i| {
                    sum.fetch_add(i, Relaxed);
                });
            }
            // SAFETY: ends the child without running what the parent registered.
            unsafe { libc::_exit(i32::from(sum.into_inner() != 60)) };
        }
        let mut status = 0;
        // SAFETY: the child that was forked above.
        assert_eq!(unsafe { libc::waitpid(pid, &mut status, 0) }, pid);
        assert_eq!(status, 0, "the child's answer");
        assert_eq!(calls_of_each_index(4, |f| parallel(4, f)), vec![1; 4]);
    }
}

#[test]
fn others_begin_while_the_caller_does_something_else() {
    for threads in [1, 2, 5] {
        for _ in 0..50 {
            let begun = AtomicUsize::new(0);
            let f = |_| {
                begun.fetch_add(1, Relaxed);
            };
            let result = parallel_while(threads, &f, || {
                while threads > 1 && begun.load(Relaxed) == 0 {
                    thread::yield_now();
                }
                "done"
            });
            assert_eq!((result, begun.into_inner()), ("done", threads));
        }
    }
}

#[test]
fn a_panic_meanwhile_reaches_the_caller_too() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for threads in [1, 4] {
        let result = catch_unwind(AssertUnwindSafe(|| parallel_while(threads, &|_| {}, || panic!("meanwhile"))));
        assert_eq!(*result.expect_err("propagates").downcast::<&str>().unwrap(), "meanwhile");
        assert_eq!(calls_of_each_index(4, |f| parallel(4, f)), vec![1; 4]);
    }
    std::panic::set_hook(hook);
}
