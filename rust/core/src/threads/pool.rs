//! A private pool of threads behind one function, [`parallel`], and [`parallel_while`].
//!
//! Each worker owns a mailbox, one atomic word. A caller posts a pointer to its call, which lives on the
//! caller's stack, into the mailboxes of idle workers; whoever takes part, the caller included, draws indices
//! from the call's counter until none is left. A worker that is slow to wake therefore delays nobody: the caller
//! does the work itself and takes the call out of the mailbox again. The same rule makes concurrent callers
//! safe: each gets the workers that are idle and needs none of them.
//!
//! | mailbox     | set by | meaning                                          |
//! |-------------|--------|--------------------------------------------------|
//! | `IDLE`      | worker, or a caller that revokes | spinning, or about to wake |
//! | `PARKED`    | worker | asleep: whoever posts must unpark it             |
//! | a call       | caller | posted and not taken yet: still revocable        |
//! | `BUSY`      | worker | running a call, which must outlive the run        |
//!
//! After a fork only the forking thread exists in the child, so a handler run there forgets the parent's
//! workers and the child starts its own.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize};
use std::sync::{Mutex, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use super::affinity::Place;

/// How long an idle worker, or a caller waiting for one, spins before it sleeps: longer than the Python code between
/// two operators of a layer, and several times what waking takes, 20 to 60 us on a virtual machine. With 50 us a worker
/// could fall asleep again just before its caller, woken late itself, came back, call after call. Whoever else wants the
/// core gets it at once.
const SPIN: Duration = Duration::from_micros(200);

/// More workers than this are never started, whatever is asked for.
const MAX_WORKERS: usize = 1023;

const IDLE: usize = 0;
const PARKED: usize = 1;
const BUSY: usize = 2;

/// Set in [`Call::running`] when the caller sleeps and wants to be woken by the last worker.
const SLEEPING: usize = 1 << (usize::BITS - 1);

struct Worker {
    mailbox: AtomicUsize,
    thread: OnceLock<Thread>,
    place: Place,
    next: *const Worker,
}

// Workers are leaked, and linked only once they are complete: all of them live until the process ends.
static WORKERS: AtomicPtr<Worker> = AtomicPtr::new(ptr::null_mut());
static COUNT: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

struct Call<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    threads: usize,
    next: AtomicUsize,
    /// Workers that hold a pointer to this call, and [`SLEEPING`].
    running: AtomicUsize,
    caller: Thread,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Calls `f(0)`, …, `f(threads - 1)` once each, `f(0)` on the caller's thread, and returns when all are done.
///
/// Calls of `f` may run one after the other on one thread, so `f` must never wait for another index. Any
/// number of threads may call at once; a call from inside `f` runs serially. A panic of `f` continues on the
/// caller's thread, after the other indices have run.
pub fn parallel(threads: usize, f: &(dyn Fn(usize) + Sync)) {
    parallel_while(threads, f, || {});
}

/// As [`parallel`], but the caller does something else first, while the others begin; what that returns is returned. A
/// panic of it continues too, and indices that nobody has begun do not run then.
pub fn parallel_while<R>(threads: usize, f: &(dyn Fn(usize) + Sync), meanwhile: impl FnOnce() -> R) -> R {
    if threads <= 1 || INSIDE.get() || !fork::guarded() {
        let result = meanwhile();
        (0..threads).for_each(f); // a panic ends this at once
        return result;
    }
    start_workers(threads - 1);
    let call = Call {
        f,
        threads,
        next: AtomicUsize::new(1),
        running: AtomicUsize::new(0),
        caller: thread::current(),
        panic: Mutex::new(None),
    };
    call.post();
    let result = catch_unwind(AssertUnwindSafe(meanwhile));
    if result.is_ok() {
        call.work(Some(0));
    }
    call.revoke();
    call.wait();
    let result = result.unwrap_or_else(|panic| resume_unwind(panic));
    if let Some(panic) = call.panic.into_inner().unwrap_or_else(|e| e.into_inner()) {
        resume_unwind(panic);
    }
    result
}

impl Call<'_> {
    fn address(&self) -> usize {
        ptr::from_ref(self) as usize
    }

    /// Offers the call to as many idle workers as it has indices for, to those that are awake first.
    fn post(&self) {
        let mut wanted = self.threads - 1;
        for state in [IDLE, PARKED] {
            for worker in workers() {
                if wanted == 0 {
                    return;
                }
                if worker.mailbox.load(Relaxed) != state {
                    continue;
                }
                self.running.fetch_add(1, Relaxed);
                if worker.mailbox.compare_exchange(state, self.address(), AcqRel, Relaxed).is_err() {
                    self.running.fetch_sub(1, Relaxed);
                    continue;
                }
                worker.place.keep_off_callers_core();
                if state == PARKED {
                    worker.thread.get().expect("set before the worker is linked").unpark();
                }
                wanted -= 1;
            }
        }
    }

    /// Runs `first` and then every index nobody has drawn yet.
    fn work(&self, first: Option<usize>) {
        INSIDE.set(true);
        let mut index = first.unwrap_or_else(|| self.next.fetch_add(1, Relaxed));
        while index < self.threads {
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (self.f)(index))) {
                self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(panic);
            }
            index = self.next.fetch_add(1, Relaxed);
        }
        INSIDE.set(false);
    }

    /// Takes the call back from workers that have not started on it.
    fn revoke(&self) {
        for worker in workers() {
            if worker.mailbox.compare_exchange(self.address(), IDLE, AcqRel, Relaxed).is_ok() {
                self.running.fetch_sub(1, Relaxed);
            }
        }
    }

    /// Returns when no worker holds a pointer to the call.
    fn wait(&self) {
        if !spin_until(|| self.running.load(Acquire) == 0) {
            self.running.fetch_or(SLEEPING, AcqRel);
            while self.running.load(Acquire) != SLEEPING {
                thread::park();
            }
        }
    }

    /// A worker's last touch of the call.
    fn leave(&self) {
        let caller = self.caller.clone(); // the call may be gone as soon as it is counted down
        if self.running.fetch_sub(1, AcqRel) == SLEEPING + 1 {
            caller.unpark();
        }
    }
}

fn workers() -> impl Iterator<Item = &'static Worker> {
    let mut next = WORKERS.load(Acquire).cast_const();
    std::iter::from_fn(move || {
        // SAFETY: linked workers are never freed nor written to, but for their atomics.
        let worker = unsafe { next.as_ref() }?;
        next = worker.next;
        Some(worker)
    })
}

fn start_workers(wanted: usize) {
    let wanted = wanted.min(MAX_WORKERS);
    loop {
        let count = COUNT.load(Relaxed);
        if count >= wanted {
            return;
        }
        if COUNT.compare_exchange(count, count + 1, Relaxed, Relaxed).is_ok() && !start_worker() {
            COUNT.fetch_sub(1, Relaxed);
            return; // no more threads to be had: those there are, and the caller, do the work
        }
    }
}

fn start_worker() -> bool {
    let worker = Box::into_raw(Box::new(Worker {
        mailbox: AtomicUsize::new(IDLE),
        thread: OnceLock::new(),
        place: Place::new(),
        next: ptr::null(),
    }));
    let address = worker as usize;
    // SAFETY: the worker is leaked. Its thread uses the atomics alone, never `next`, which is still written below.
    let main = move || unsafe {
        (*(address as *const Worker)).place.occupy();
        work_forever(&(*(address as *const Worker)).mailbox)
    };
    let Ok(handle) = thread::Builder::new().name("moekern".into()).spawn(main) else {
        // SAFETY: no thread was started, so nobody else knows the worker.
        drop(unsafe { Box::from_raw(worker) });
        return false;
    };
    // SAFETY: not linked yet, so only this thread reaches these fields.
    unsafe {
        _ = (*worker).thread.set(handle.thread().clone());
        let mut head = WORKERS.load(Acquire);
        loop {
            (*worker).next = head;
            match WORKERS.compare_exchange_weak(head, worker, AcqRel, Acquire) {
                Ok(_) => return true,
                Err(now) => head = now,
            }
        }
    }
}

fn work_forever(mailbox: &AtomicUsize) {
    loop {
        let posted = await_call(mailbox);
        if mailbox.compare_exchange(posted, BUSY, AcqRel, Relaxed).is_err() {
            continue; // revoked
        }
        // SAFETY: BUSY keeps the caller in `parallel`, and so the call alive, until `leave`.
        let call = unsafe { &*(posted as *const Call<'_>) };
        call.work(None);
        // Idle before leaving: the caller's next call, which may follow at once, finds this worker.
        mailbox.store(IDLE, Release);
        call.leave();
    }
}

fn await_call(mailbox: &AtomicUsize) -> usize {
    loop {
        let posted = || mailbox.load(Acquire) > BUSY;
        if !spin_until(posted) && mailbox.compare_exchange(IDLE, PARKED, AcqRel, Relaxed).is_ok() {
            while mailbox.load(Acquire) == PARKED {
                thread::park();
            }
        }
        let call = mailbox.load(Acquire);
        if call > BUSY {
            return call;
        }
    }
}

/// Spins until `done`, for [`SPIN`] at most; returns whether it was done.
fn spin_until(done: impl Fn() -> bool) -> bool {
    const POLLS: usize = 64; // between two looks at the clock
    let poll = || {
        (0..POLLS).any(|_| {
            std::hint::spin_loop();
            done()
        })
    };
    if done() || poll() {
        return true;
    }
    let start = Instant::now();
    while start.elapsed() < SPIN {
        thread::yield_now(); // the thread that is waited for may need this very core
        if poll() {
            return true;
        }
    }
    false
}

mod fork {
    use super::*;

    const UNGUARDED: u8 = 0;
    const REGISTERING: u8 = 1;
    const GUARDED: u8 = 2;

    static STATE: AtomicU8 = AtomicU8::new(UNGUARDED);

    /// Whether workers may be started: true once the handler below is in place. A thread that finds another one
    /// registering it does not wait, since a child forked at that moment would wait for ever.
    #[inline]
    pub(super) fn guarded() -> bool {
        STATE.load(Acquire) == GUARDED || register()
    }

    #[cold]
    fn register() -> bool {
        if STATE.compare_exchange(UNGUARDED, REGISTERING, AcqRel, Relaxed).is_err() {
            return false;
        }
        #[cfg(unix)]
        // SAFETY: the handler only stores to atomics, which is allowed after a fork.
        let registered = unsafe { libc::pthread_atfork(None, None, Some(forget_workers)) } == 0;
        #[cfg(not(unix))]
        let registered = true;
        STATE.store(if registered { GUARDED } else { REGISTERING }, Release);
        registered
    }

    #[cfg(unix)]
    extern "C" fn forget_workers() {
        WORKERS.store(ptr::null_mut(), Release);
        COUNT.store(0, Release);
    }
}
