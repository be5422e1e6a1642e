//! The plan of ids on a GPU, made on the host: a kernel brings the ids over, threads rank them as they come, a kernel
//! takes ranks and first rows and completes the plan (`cuda/host_plan.cu`, [`moekern_core::plan::rank`]).
//!
//! Both kernels work on pinned memory in place. The host does not wait for the stream but for the ids themselves: every
//! block of the first kernel leaves a mark behind those that it has written. While they are on their way Python allocates
//! the outputs.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicI32, AtomicU32};
use std::thread;

use moekern_core::plan::{Chunks, Id, rank};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::cuda::{Driver, LaunchShape};

/// Threads of a block of either kernel.
const THREADS: usize = 256;
/// Bytes of ids that a block of the first kernel writes, and slots that one of the second completes.
const BLOCK_BYTES: usize = 16 * THREADS;
const BLOCK_SLOTS: usize = 8 * THREADS;
/// Words from one mark to the next: a cache line, which threads poll while the device writes others.
const MARK_WORDS: usize = 16;
/// What `cuStreamQuery` says of a stream that has work left.
const NOT_READY: c_int = 600;
/// Looks at a mark between two looks at the stream: some 100 us.
const POLLS: u32 = 1 << 12;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cuda_plan_memory, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_plan, module)?)
}

/// Where in pinned memory the host's side of a plan lies.
struct PinnedLayout {
    chunks: Chunks,
    /// Bytes of an id: the narrowest that can name every expert, and none.
    width: usize,
    ranks: usize,
    table: usize,
    bytes: usize,
}

impl PinnedLayout {
    fn new(slots: usize, experts: usize) -> PyResult<PinnedLayout> {
        let chunks = Chunks::new(slots, experts).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let width = if experts < 1 << 8 {
            1
        } else if experts < 1 << 16 {
            2
        } else {
            4
        };
        let ranks = (slots * width).next_multiple_of(64);
        let table = ranks + (2 * slots).next_multiple_of(64);
        Ok(PinnedLayout { chunks, width, ranks, table, bytes: table + 4 * chunks.table_len() })
    }

    /// Blocks of the first kernel that bring the first slots.
    fn blocks(&self, slots: usize) -> usize {
        (slots * self.width).div_ceil(BLOCK_BYTES)
    }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
fn cuda_plan_memory(slots: usize, experts: usize) -> PyResult<(usize, usize)> {
    let layout = PinnedLayout::new(slots, experts)?;
    Ok((layout.blocks(slots) * MARK_WORDS, layout.bytes))
}

/// A kernel's parameter structure, built up field by field.
struct Params(Vec<u8>);

impl Params {
    fn pointers(addresses: &[usize]) -> Params {
        Params(addresses.iter().flat_map(|address| (*address as u64).to_le_bytes()).collect())
    }

    fn ints(mut self, values: &[usize]) -> Params {
        self.0.extend(values.iter().flat_map(|value| (*value as u32).to_le_bytes()));
        self
    }
}

/// Waits for the ids that the first kernel's blocks bring.
struct Arrivals<'a> {
    driver: &'static Driver,
    stream: u64,
    marks: &'a [AtomicU32],
    epoch: u32,
    /// Asks the stream, whose context it has.
    caller: thread::ThreadId,
    /// What the stream said, once it is known that the marks will not come, or one of the constants below.
    failed: AtomicI32,
}

impl Arrivals<'_> {
    /// The stream is done and the marks are not there.
    const LOST: i32 = -1;
    /// Nobody wants the plan any more.
    const GIVEN_UP: i32 = -2;

    fn wait(&self, blocks: Range<usize>) -> bool {
        blocks.into_iter().all(|block| self.wait_for(&self.marks[block * MARK_WORDS]))
    }

    fn wait_for(&self, mark: &AtomicU32) -> bool {
        let mut polls = 0u32;
        while mark.load(Acquire) != self.epoch {
            std::hint::spin_loop();
            polls += 1;
            if polls.is_multiple_of(64) {
                if self.failed.load(Relaxed) != 0 {
                    return false;
                }
                thread::yield_now();
            }
            if polls.is_multiple_of(POLLS) && thread::current().id() == self.caller {
                // SAFETY: a plain driver call.
                let state = unsafe { (self.driver.stream_query)(self.stream) };
                if state != NOT_READY && mark.load(Acquire) != self.epoch {
                    self.failed.store(if state == 0 { Self::LOST } else { state }, Relaxed);
                    return false;
                }
            }
        }
        true
    }

    fn error(&self) -> PyErr {
        match self.failed.load(Relaxed) {
            Self::LOST => PyRuntimeError::new_err("the ids have not come over to the host, yet the device is done"),
            state => self.driver.check(state, || "while the ids were on their way to the host".into()).unwrap_err(),
        }
    }
}

fn shape(function: u64, blocks: usize) -> LaunchShape {
    LaunchShape { function, grid: blocks as u32, block: THREADS as u32, shared: 0 }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn cuda_plan(
    py: Python<'_>,
    narrow: u64,
    spread: u64,
    device: i32,
    stream: u64,
    marks: usize,
    epoch: u32,
    memory: usize,
    ids: usize,
    id_type: usize,
    slots: usize,
    experts: usize,
    threads: usize,
    allocate: Py<PyAny>,
) -> PyResult<()> {
    let layout = PinnedLayout::new(slots, experts)?;
    if slots == 0 || marks == 0 || !marks.is_multiple_of(4) || memory == 0 || !memory.is_multiple_of(16) {
        return Err(PyValueError::new_err("slots, marks, memory: got 0 or an address that is not aligned"));
    }
    let driver = Driver::get()?;
    let _context = driver.enter(device)?;
    py.detach(|| {
        let blocks = layout.blocks(slots);
        let arrivals = Arrivals {
            driver,
            stream,
            // SAFETY: Python vouches for the memory; the device and this function treat its words as atomics.
            marks: unsafe { std::slice::from_raw_parts(marks as *const AtomicU32, blocks * MARK_WORDS) },
            epoch,
            caller: thread::current().id(),
            failed: AtomicI32::new(0),
        };
        // SAFETY: a plain driver call.
        let is_idle = unsafe { (driver.stream_query)(stream) } == 0;
        let params =
            Params::pointers(&[ids, memory, marks]).ints(&[slots, experts, id_type, layout.width, epoch as usize, 0]);
        driver.launch_plain(&shape(narrow, blocks), stream, &params.0)?;

        let mut outputs = None;
        let mut make_outputs = || {
            let made: PyResult<(usize, usize, usize)> = Python::attach(|py| allocate.call0(py)?.extract(py));
            if made.is_err() {
                arrivals.failed.store(Arrivals::GIVEN_UP, Relaxed);
            }
            outputs.insert(made).is_ok()
        };
        let ranking = Ranking { layout: &layout, memory, threads, arrivals: &arrivals };
        // SAFETY: Python vouches for the memory, which no kernel uses between the marks and the next launch.
        let done = unsafe {
            if is_idle {
                ranking.run(make_outputs)
            } else {
                // Where the stream is at other work, threads had better sleep until that is done.
                make_outputs() && arrivals.wait(0..1) && ranking.run(|| true)
            }
        };
        let (order, inverse, offsets) = outputs.expect("made meanwhile")?;
        if !done {
            return Err(arrivals.error());
        }
        let PinnedLayout { chunks, ranks, table, .. } = &layout;
        let params = Params::pointers(&[ids, memory + ranks, memory + table, order, inverse, offsets]).ints(&[
            slots,
            experts,
            id_type,
            chunks.size(),
        ]);
        driver.launch_plain(&shape(spread, slots.div_ceil(BLOCK_SLOTS)), stream, &params.0)
    })
}

/// What [`rank`] is called with.
struct Ranking<'a> {
    layout: &'a PinnedLayout,
    memory: usize,
    threads: usize,
    arrivals: &'a Arrivals<'a>,
}

impl Ranking<'_> {
    /// Ranks the ids as they arrive; false if they do not, or if `meanwhile` returns false.
    ///
    /// # Safety
    /// The memory is there, and nothing but this plan uses it once its ids arrive.
    unsafe fn run(&self, meanwhile: impl FnOnce() -> bool) -> bool {
        // SAFETY: the caller's.
        unsafe {
            match self.layout.width {
                1 => self.run_with::<u8>(meanwhile),
                2 => self.run_with::<u16>(meanwhile),
                _ => self.run_with::<i32>(meanwhile),
            }
        }
    }

    unsafe fn run_with<I: Id>(&self, meanwhile: impl FnOnce() -> bool) -> bool {
        let PinnedLayout { chunks, width, ranks, table, .. } = self.layout;
        let arrived = |slots: Range<usize>| {
            self.arrivals.wait(slots.start * width / BLOCK_BYTES..(slots.end * width).div_ceil(BLOCK_BYTES))
        };
        let (ranks, table) = ((self.memory + ranks) as *mut i16, (self.memory + table) as *mut i32);
        // SAFETY: the caller's; the kernel gives no id that is greater than the number of experts.
        unsafe { rank(self.memory as *const I, chunks, ranks, table, self.threads, &arrived, meanwhile) }
    }
}
