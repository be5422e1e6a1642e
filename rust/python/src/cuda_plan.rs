//! The plan of ids on a GPU, made on the host: a kernel brings the ids over, threads rank them as they come, a kernel
//! takes ranks and first rows and completes the plan (`cuda/host_plan.cu`, [`moekern_core::ranks`]).
//!
//! Both kernels work on pinned memory in place. The host does not wait for the stream but for the ids themselves: every
//! block of the first kernel leaves a mark behind those that it has written.

use std::ffi::c_int;
use std::ops::Range;
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::atomic::{AtomicI32, AtomicU32};
use std::thread;

use moekern_core::ranks::{Chunks, rank};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use crate::cuda::{Driver, LaunchShape};

/// Threads of a block of either kernel.
const THREADS: usize = 256;
/// Bytes of ids that a block of the first kernel writes, and slots that one of the second completes.
const BLOCK_BYTES: usize = 16 * THREADS;
const BLOCK_SLOTS: usize = 8 * THREADS;
/// What `cuStreamQuery` says of a stream that has work left.
const NOT_READY: c_int = 600;
/// Looks at a mark between two looks at the stream: some 100 us.
const POLLS: u32 = 1 << 12;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cuda_plan_memory, module)?)?;
    module.add_function(wrap_pyfunction!(cuda_plan, module)?)
}

/// Where in pinned memory the host's side of a plan lies.
struct Layout {
    chunks: Chunks,
    /// Bytes of an id: the narrowest that can name every expert, and none.
    width: usize,
    ranks: usize,
    first_rows: usize,
    bytes: usize,
}

impl Layout {
    fn new(slots: usize, experts: usize) -> PyResult<Layout> {
        let chunks = Chunks::new(slots, experts).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let width = if experts < 1 << 8 {
            1
        } else if experts < 1 << 16 {
            2
        } else {
            4
        };
        let ranks = (slots * width).next_multiple_of(64);
        let first_rows = ranks + (2 * slots).next_multiple_of(64);
        Ok(Layout { chunks, width, ranks, first_rows, bytes: first_rows + 4 * chunks.table_len() })
    }

    fn marks(&self, slots: usize) -> usize {
        (slots * self.width).div_ceil(BLOCK_BYTES)
    }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
fn cuda_plan_memory(slots: usize, experts: usize) -> PyResult<(usize, usize)> {
    let layout = Layout::new(slots, experts)?;
    Ok((layout.marks(slots), layout.bytes))
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

/// Waits for marks.
struct Arrivals<'a> {
    driver: &'static Driver,
    stream: u64,
    marks: &'a [AtomicU32],
    epoch: u32,
    /// Asks the stream, whose context it has.
    caller: thread::ThreadId,
    /// What the stream said, once it is known that the marks will not come.
    failed: AtomicI32,
}

impl Arrivals<'_> {
    /// The stream is done and the marks are not there.
    const LOST: i32 = -1;

    fn wait(&self, marks: Range<usize>) -> bool {
        self.marks[marks].iter().all(|mark| self.wait_for(mark))
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
                // Safety: a plain driver call.
                let state = unsafe { (self.driver.stream_query)(self.stream) };
                if state != NOT_READY && mark.load(Acquire) != self.epoch {
                    self.failed.store(if state == 0 { Self::LOST } else { state }, Relaxed);
                    return false;
                }
            }
        }
        true
    }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
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
    order: usize,
    inverse: usize,
    offsets: usize,
    threads: usize,
) -> PyResult<()> {
    let layout = Layout::new(slots, experts)?;
    if slots == 0 || marks == 0 || !marks.is_multiple_of(4) || memory == 0 || !memory.is_multiple_of(16) {
        return Err(PyValueError::new_err("slots, marks, memory: got 0 or an address that is not aligned"));
    }
    let driver = Driver::get()?;
    driver.ensure_context(device)?;
    let (ranks, first_rows) = (memory + layout.ranks, memory + layout.first_rows);
    let blocks = layout.marks(slots);
    py.detach(|| {
        let params =
            Params::pointers(&[ids, memory, marks]).ints(&[slots, experts, id_type, layout.width, epoch as usize, 0]);
        let shape =
            |function: u64, grid: usize| LaunchShape { function, grid: grid as u32, block: THREADS as u32, shared: 0 };
        // Safety: a plain driver call.
        let is_idle = unsafe { (driver.stream_query)(stream) } == 0;
        driver.launch_plain(&shape(narrow, blocks), stream, &params.0)?;
        let arrivals = Arrivals {
            driver,
            stream,
            // Safety: Python vouches for the memory; the device and this function treat its words as atomics.
            marks: unsafe { std::slice::from_raw_parts(marks as *const AtomicU32, blocks) },
            epoch,
            caller: thread::current().id(),
            failed: AtomicI32::new(0),
        };
        // Where the stream is at other work, let threads sleep until that is done.
        let mut done = is_idle || arrivals.wait(0..1);
        let arrived = |slots: Range<usize>| {
            let start = slots.start * layout.width / BLOCK_BYTES;
            arrivals.wait(start..(slots.end * layout.width).div_ceil(BLOCK_BYTES))
        };
        // Safety: Python vouches for the memory, which no kernel uses between the marks and the next launch.
        done = done
            && unsafe {
                let (ranks, first_rows) = (ranks as *mut u16, first_rows as *mut i32);
                match layout.width {
                    1 => rank(memory as *const u8, &layout.chunks, ranks, first_rows, threads, &arrived),
                    2 => rank(memory as *const u16, &layout.chunks, ranks, first_rows, threads, &arrived),
                    _ => rank(memory as *const i32, &layout.chunks, ranks, first_rows, threads, &arrived),
                }
            };
        if !done {
            return Err(match arrivals.failed.load(Relaxed) {
                Arrivals::LOST => {
                    PyRuntimeError::new_err("the ids have not come over to the host, yet the device is done")
                }
                state => driver.check(state, || "while the ids were on their way to the host".into()).unwrap_err(),
            });
        }
        let params = Params::pointers(&[ids, ranks, first_rows, order, inverse, offsets]).ints(&[
            slots,
            experts,
            id_type,
            layout.chunks.size(),
        ]);
        driver.launch_plain(&shape(spread, slots.div_ceil(BLOCK_SLOTS)), stream, &params.0)
    })
}
