//! Keeps a worker off the core of the thread that wakes it.
//!
//! Linux may wake a thread on the very core of whoever wakes it, though another is idle (on a virtual machine with two
//! cores: after a pause of 1 ms, 499 times of 500). Then one of the two waits until the scheduler parts them,
//! milliseconds later, which is longer than most calls take. So before it is woken a worker is forbidden the caller's
//! core, and allowed every other one that the caller is allowed.

use std::sync::atomic::AtomicI32;

/// What is known about where a thread may run.
pub(crate) struct Place {
    /// The thread's number in the system; 0 while it has not said so.
    thread: AtomicI32,
    /// The core it keeps off, or -1.
    forbidden: AtomicI32,
}

impl Place {
    pub(crate) const fn new() -> Self {
        Self { thread: AtomicI32::new(0), forbidden: AtomicI32::new(-1) }
    }
}

#[cfg(target_os = "linux")]
impl Place {
    /// Says that the calling thread is the one meant.
    pub(crate) fn occupy(&self) {
        // SAFETY: a question about the calling thread.
        self.thread.store(unsafe { libc::gettid() }, std::sync::atomic::Ordering::Release);
    }

    /// Forbids the thread the core that the caller runs on. Costs a few nanoseconds if that is how it was, about two
    /// microseconds else. Whatever fails leaves everything as it is: this is about speed alone.
    pub(crate) fn keep_off_callers_core(&self) {
        use std::sync::atomic::Ordering::{Acquire, Relaxed};
        // SAFETY: a question about the calling thread.
        let core = unsafe { libc::sched_getcpu() };
        let thread = self.thread.load(Acquire);
        if core < 0 || thread == 0 || self.forbidden.load(Relaxed) == core {
            return;
        }
        let size = size_of::<libc::cpu_set_t>();
        // SAFETY: a set is plain bits, and within its size whatever the system says.
        unsafe {
            let mut cores: libc::cpu_set_t = std::mem::zeroed();
            if core as usize >= 8 * size || libc::sched_getaffinity(0, size, &mut cores) != 0 {
                return;
            }
            libc::CPU_CLR(core as usize, &mut cores);
            if libc::CPU_COUNT(&cores) > 0 && libc::sched_setaffinity(thread, size, &cores) == 0 {
                self.forbidden.store(core, Relaxed);
            }
        }
    }
}

#[cfg(not(target_os = "linux"))]
impl Place {
    pub(crate) fn occupy(&self) {
        let Self { thread: _, forbidden: _ } = self;
    }

    pub(crate) fn keep_off_callers_core(&self) {}
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;
    use std::sync::mpsc::channel;

    fn cores_of(thread: i32) -> libc::cpu_set_t {
        // SAFETY: a set is plain bits, and within its size whatever the system says.
        unsafe {
            let mut cores: libc::cpu_set_t = std::mem::zeroed();
            assert_eq!(libc::sched_getaffinity(thread, size_of::<libc::cpu_set_t>(), &mut cores), 0);
            cores
        }
    }

    #[test]
    fn a_worker_may_run_anywhere_but_beside_its_caller() {
        static PLACE: Place = Place::new();
        let (says, hears) = channel();
        let (stop, stopped) = channel::<()>();
        let worker = std::thread::spawn(move || {
            PLACE.occupy();
            says.send(()).unwrap();
            _ = stopped.recv();
        });
        PLACE.keep_off_callers_core(); // whether or not it is known yet
        hears.recv().unwrap();
        PLACE.keep_off_callers_core();
        let (allowed, left) = (cores_of(0), cores_of(PLACE.thread.load(Relaxed)));
        let core = PLACE.forbidden.load(Relaxed);
        // SAFETY: the core is one that the system named.
        unsafe {
            if libc::CPU_COUNT(&allowed) > 1 {
                assert!(!libc::CPU_ISSET(core as usize, &left));
                assert_eq!(libc::CPU_COUNT(&left), libc::CPU_COUNT(&allowed) - 1);
            } else {
                assert_eq!((core, libc::CPU_COUNT(&left)), (-1, 1));
            }
        }
        drop(stop);
        worker.join().unwrap();
    }
}
