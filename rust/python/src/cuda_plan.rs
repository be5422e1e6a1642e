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

use moekern_core::buckets::Id;
use moekern_core::ranks::{Chunks, rank, wake};
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
    module.add_class::<CudaPlan>()
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

/// A plan under way.
#[pyclass(frozen)]
struct CudaPlan {
    layout: Layout,
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
}

fn shape(function: u64, blocks: usize) -> LaunchShape {
    LaunchShape { function, grid: blocks as u32, block: THREADS as u32, shared: 0 }
}

#[pymethods]
impl CudaPlan {
    /// Sends the ids on their way, and wakes threads for them: what Python does next overlaps with both.
    #[new]
    #[allow(clippy::too_many_arguments)]
    fn new(
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
    ) -> PyResult<CudaPlan> {
        let layout = Layout::new(slots, experts)?;
        if slots == 0 || marks == 0 || !marks.is_multiple_of(4) || memory == 0 || !memory.is_multiple_of(16) {
            return Err(PyValueError::new_err("slots, marks, memory: got 0 or an address that is not aligned"));
        }
        let driver = Driver::get()?;
        let _context = driver.enter(device)?;
        py.detach(|| {
            // Safety: a plain driver call.
            let is_idle = unsafe { (driver.stream_query)(stream) } == 0;
            let params = Params::pointers(&[ids, memory, marks]).ints(&[
                slots,
                experts,
                id_type,
                layout.width,
                epoch as usize,
                0,
            ]);
            driver.launch_plain(&shape(narrow, layout.marks(slots)), stream, &params.0)?;
            if is_idle {
                // Where the stream is at other work, threads had better sleep until that is done.
                wake(&layout.chunks, threads);
            }
            Ok(CudaPlan { layout, spread, device, stream, marks, epoch, memory, ids, id_type, slots, experts, threads })
        })
    }

    /// Waits for the ids, ranks them and leaves the rest to the stream.
    fn finish(&self, py: Python<'_>, order: usize, inverse: usize, offsets: usize) -> PyResult<()> {
        let driver = Driver::get()?;
        let _context = driver.enter(self.device)?;
        py.detach(|| {
            let blocks = self.layout.marks(self.slots);
            let arrivals = Arrivals {
                driver,
                stream: self.stream,
                // Safety: Python vouches for the memory; the device and this function treat its words as atomics.
                marks: unsafe { std::slice::from_raw_parts(self.marks as *const AtomicU32, blocks) },
                epoch: self.epoch,
                caller: thread::current().id(),
                failed: AtomicI32::new(0),
            };
            // Safety: Python vouches for the memory, which no kernel uses between the marks and the next launch.
            let done = arrivals.wait(0..1)
                && unsafe {
                    match self.layout.width {
                        1 => self.rank::<u8>(&arrivals),
                        2 => self.rank::<u16>(&arrivals),
                        _ => self.rank::<i32>(&arrivals),
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
            let Layout { chunks, ranks, first_rows, .. } = &self.layout;
            let params =
                Params::pointers(&[self.ids, self.memory + ranks, self.memory + first_rows, order, inverse, offsets])
                    .ints(&[self.slots, self.experts, self.id_type, chunks.size()]);
            driver.launch_plain(&shape(self.spread, self.slots.div_ceil(BLOCK_SLOTS)), self.stream, &params.0)
        })
    }
}

impl CudaPlan {
    /// Ranks ids of the narrow type as they arrive; false if they do not.
    ///
    /// # Safety
    /// The memory is there, and nothing but this plan uses it.
    unsafe fn rank<I: Id>(&self, arrivals: &Arrivals<'_>) -> bool {
        let Layout { chunks, width, ranks, first_rows, .. } = &self.layout;
        let arrived = |slots: Range<usize>| {
            arrivals.wait(slots.start * width / BLOCK_BYTES..(slots.end * width).div_ceil(BLOCK_BYTES))
        };
        let (ranks, first_rows) = ((self.memory + ranks) as *mut u16, (self.memory + first_rows) as *mut i32);
        // Safety: the caller's.
        unsafe { rank(self.memory as *const I, chunks, ranks, first_rows, self.threads, &arrived) }
    }
}
