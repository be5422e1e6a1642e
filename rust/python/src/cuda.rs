//! The CUDA driver, opened at run time: tensor maps and kernel launches with the least overhead.
//!
//! Nothing is linked against CUDA: on a machine without a driver the functions raise RuntimeError. Kernels are compiled
//! and loaded by Python (CuPy); this file receives their function handles. A launch passes a kernel's tensor maps, in
//! order, and then one `Params` structure by value.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// `CUtensorMap`: opaque, and the driver insists on its alignment.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct TensorMap([u64; 16]);

/// A tensor as the copy engine sees it: the innermost dimension first, strides in bytes of all dimensions but that one.
#[derive(FromPyObject)]
struct MapDescription(u32, u64, Vec<u64>, Vec<u64>, Vec<u32>);

const SWIZZLE_128B: c_int = 3;
const L2_PROMOTION_128B: c_int = 2;
/// Dimensions of a tensor map.
const RANKS: std::ops::RangeInclusive<usize> = 2..=5;
/// Where the driver lets a map begin.
const MAP_BASES: std::ops::Range<u64> = 0..1 << 57;
/// No kernel takes more maps.
const MOST_MAPS: usize = 8;
const RTLD_NOW: c_int = 2;

type EncodeTiled = unsafe extern "C" fn(
    *mut TensorMap,
    c_int,
    c_uint,
    u64,
    *const u64,
    *const u64,
    *const c_uint,
    *const c_uint,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;
type LaunchKernel = unsafe extern "C" fn(
    u64,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    u64,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_int;

#[link(name = "dl")]
unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

pub(crate) struct Driver {
    encode_tiled: EncodeTiled,
    launch_kernel: LaunchKernel,
    pub(crate) stream_query: unsafe extern "C" fn(u64) -> c_int,
    context_current: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    context_device: unsafe extern "C" fn(*mut c_int) -> c_int,
    context_set: unsafe extern "C" fn(*mut c_void) -> c_int,
    context_retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int,
    error_name: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
}

impl Driver {
    fn open() -> Result<Driver, String> {
        /// A symbol of the library, as the function type of the field it goes to.
        unsafe fn symbol<F>(library: *mut c_void, name: &CStr) -> Result<F, String> {
            const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
            // SAFETY: a library that is open, and a name that ends with 0.
            let address = unsafe { dlsym(library, name.as_ptr()) };
            if address.is_null() {
                return Err(format!(
                    "the CUDA driver lacks {}; a driver of CUDA 12 or newer is needed",
                    name.to_string_lossy()
                ));
            }
            // SAFETY: as large as a pointer, and the caller names the function's type.
            Ok(unsafe { std::mem::transmute_copy(&address) })
        }
        // SAFETY: the names are the driver's, with the signatures of cuda.h.
        unsafe {
            let library = dlopen(c"libcuda.so.1".as_ptr(), RTLD_NOW);
            if library.is_null() {
                return Err("libcuda.so.1 cannot be opened: this machine has no NVIDIA driver".into());
            }
            Ok(Driver {
                encode_tiled: symbol(library, c"cuTensorMapEncodeTiled")?,
                launch_kernel: symbol(library, c"cuLaunchKernel")?,
                stream_query: symbol(library, c"cuStreamQuery")?,
                context_current: symbol(library, c"cuCtxGetCurrent")?,
                context_device: symbol(library, c"cuCtxGetDevice")?,
                context_set: symbol(library, c"cuCtxSetCurrent")?,
                context_retain: symbol(library, c"cuDevicePrimaryCtxRetain")?,
                error_name: symbol(library, c"cuGetErrorName")?,
            })
        }
    }

    pub(crate) fn get() -> PyResult<&'static Driver> {
        static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
        DRIVER.get_or_init(Driver::open).as_ref().map_err(|message| PyRuntimeError::new_err(message.clone()))
    }

    pub(crate) fn check(&self, result: c_int, what: impl FnOnce() -> String) -> PyResult<()> {
        if result == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the driver returns a pointer to a constant string, or leaves the null.
        let name = unsafe {
            (self.error_name)(result, &mut name);
            if name.is_null() { "unknown error".into() } else { CStr::from_ptr(name).to_string_lossy() }
        };
        Err(PyRuntimeError::new_err(format!("{}: {name} ({result})", what())))
    }

    /// Makes sure that a context of the device is current until the guard is dropped.
    ///
    /// A thread that has not used CUDA yet (autograd's, say) has none: it is given the device's primary one, which torch
    /// and CuPy use too, and keeps it. One of another device, which torch can leave behind since it returns to a device
    /// only when that is used, is put back. One of the device that is not the primary one may be a green context of the
    /// user's and stays.
    pub(crate) fn enter(&'static self, device: c_int) -> PyResult<Entered> {
        let (mut before, mut context) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut current = -1;
        // SAFETY: plain driver calls with valid out pointers.
        unsafe {
            if (self.context_device)(&mut current) == 0 && current == device {
                return Ok(Entered { driver: self, before });
            }
            self.check((self.context_current)(&mut before), || "cuCtxGetCurrent".into())?;
            // Retained for good: that is rare, and torch keeps it as long.
            self.check((self.context_retain)(&mut context, device), || format!("cuDevicePrimaryCtxRetain({device})"))?;
            self.check((self.context_set)(context), || "cuCtxSetCurrent".into())?;
        }
        Ok(Entered { driver: self, before })
    }

    fn encode(&self, description: &MapDescription, pointer: u64) -> PyResult<TensorMap> {
        let MapDescription(element, _, dims, strides, extent) = description;
        let rank = dims.len();
        if !RANKS.contains(&rank) || strides.len() != rank - 1 || extent.len() != rank {
            return Err(PyValueError::new_err(format!(
                "a tensor map has 2 to 5 dimensions and one stride less; got {rank} dimensions, {} strides, a box of {}",
                strides.len(),
                extent.len()
            )));
        }
        // A base below zero has wrapped: the map of a store begins some rows before its tensor.
        if !MAP_BASES.contains(&pointer) {
            return Err(PyRuntimeError::new_err(format!(
                "a tensor lies where no tensor map reaches: its map of strides {strides:?} would begin at address {}, and \
                 the driver takes 0 to 2^57; memory placed by hand must lie at least 512 rows above address 0",
                pointer.cast_signed()
            )));
        }
        let mut map = TensorMap([0; 16]);
        let ones = [1 as c_uint; 5];
        // SAFETY: all arrays have `rank` (strides: rank - 1) elements, and the map is aligned by its type.
        let result = unsafe {
            (self.encode_tiled)(
                &mut map,
                *element as c_int,
                rank as c_uint,
                pointer,
                dims.as_ptr(),
                strides.as_ptr(),
                extent.as_ptr(),
                ones.as_ptr(),
                0,
                SWIZZLE_128B,
                L2_PROMOTION_128B,
                0,
            )
        };
        self.check(result, || {
            format!("tensor map of {pointer:#x}, dims {dims:?}, strides {strides:?}, box {extent:?}")
        })?;
        Ok(map)
    }
}

/// While it lives, a context of the device that was entered is current.
pub(crate) struct Entered {
    driver: &'static Driver,
    /// What to put back; null for nothing.
    before: *mut c_void,
}

impl Drop for Entered {
    fn drop(&mut self) {
        if !self.before.is_null() {
            // SAFETY: the context was current when it was left, on this thread: a pointer keeps the guard there.
            unsafe { (self.driver.context_set)(self.before) };
        }
    }
}

/// What to launch, less its arguments.
pub(crate) struct LaunchShape {
    pub(crate) function: u64,
    pub(crate) grid: u32,
    pub(crate) block: u32,
    pub(crate) shared: u32,
}

impl Driver {
    /// Launches a kernel that takes one structure and no maps.
    pub(crate) fn launch_plain(&self, shape: &LaunchShape, stream: u64, params: &[u8]) -> PyResult<()> {
        self.launch(shape, stream, &mut [], params)
    }

    fn launch(&self, shape: &LaunchShape, stream: u64, maps: &mut [TensorMap], params: &[u8]) -> PyResult<()> {
        let mut arguments = [std::ptr::null_mut::<c_void>(); MOST_MAPS + 1];
        for (argument, map) in arguments.iter_mut().zip(maps.iter_mut()) {
            *argument = (&raw mut *map).cast();
        }
        arguments[maps.len()] = params.as_ptr().cast_mut().cast();
        // SAFETY: the caller passes a loaded function of this device whose parameters are these maps and this structure;
        // the driver copies them before it returns.
        let result = unsafe {
            (self.launch_kernel)(
                shape.function,
                shape.grid,
                1,
                1,
                shape.block,
                1,
                1,
                shape.shared,
                stream,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.check(result, || {
            let LaunchShape { grid, block, shared, .. } = shape;
            format!("launch of {grid} blocks of {block} threads with {shared} bytes of shared memory")
        })
    }
}

fn check_map_count(count: usize) -> PyResult<()> {
    if count > MOST_MAPS {
        return Err(PyValueError::new_err(format!("got {count} tensor maps; at most {MOST_MAPS} are accepted")));
    }
    Ok(())
}

/// Encodes the maps and launches `function` on `stream` with the maps and `params` as its arguments.
#[pyfunction]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn cuda_launch(
    function: u64,
    device: i32,
    grid: u32,
    block: u32,
    shared: u32,
    stream: u64,
    maps: Vec<MapDescription>,
    params: &[u8],
) -> PyResult<()> {
    let driver = Driver::get()?;
    check_map_count(maps.len())?;
    let _context = driver.enter(device)?;
    let mut encoded = [TensorMap([0; 16]); MOST_MAPS];
    for (target, description) in encoded.iter_mut().zip(&maps) {
        *target = driver.encode(description, description.1)?;
    }
    driver.launch(&LaunchShape { function, grid, block, shared }, stream, &mut encoded[..maps.len()], params)
}

/// An address of a recorded launch: which of the replay's addresses, and how many bytes further.
struct Relocation {
    place: usize,
    offset: i64,
}

impl Relocation {
    fn resolve(&self, addresses: &[u64]) -> u64 {
        addresses[self.place].wrapping_add_signed(self.offset)
    }
}

struct RecordedLaunch {
    shape: LaunchShape,
    maps: Vec<(MapDescription, Relocation)>,
    params: Vec<u8>,
    /// Byte offsets of addresses in `params`.
    pointers: Vec<(usize, Relocation)>,
}

/// Element type, place, offset, dimensions, strides, box.
type RecordedMap = (u32, usize, i64, Vec<u64>, Vec<u64>, Vec<u32>);
/// Function, grid, block, shared memory, maps, parameters, and (byte offset, place, offset) of the addresses in them.
type Recorded = (u64, u32, u32, u32, Vec<RecordedMap>, Vec<u8>, Vec<(usize, usize, i64)>);

/// The launches of a verb, recorded for its sizes, to be replayed with the addresses of any tensors of these sizes.
#[pyclass(frozen)]
struct CudaProgram {
    device: i32,
    launches: Vec<RecordedLaunch>,
    places: usize,
}

#[pymethods]
impl CudaProgram {
    #[new]
    fn new(device: i32, launches: Vec<Recorded>) -> PyResult<CudaProgram> {
        let mut places = 0;
        let mut relocation = |place: usize, offset: i64| {
            places = places.max(place + 1);
            Relocation { place, offset }
        };
        let mut recorded = Vec::with_capacity(launches.len());
        for (function, grid, block, shared, maps, params, pointers) in launches {
            check_map_count(maps.len())?;
            if let Some((at, ..)) = pointers.iter().find(|(at, ..)| at + 8 > params.len()) {
                return Err(PyValueError::new_err(format!("an address at byte {at} of {} bytes", params.len())));
            }
            recorded.push(RecordedLaunch {
                shape: LaunchShape { function, grid, block, shared },
                maps: maps
                    .into_iter()
                    .map(|(element, place, offset, dims, strides, extent)| {
                        (MapDescription(element, 0, dims, strides, extent), relocation(place, offset))
                    })
                    .collect(),
                params,
                pointers: pointers.into_iter().map(|(at, place, offset)| (at, relocation(place, offset))).collect(),
            });
        }
        Ok(CudaProgram { device, launches: recorded, places })
    }

    /// Launches everything on `stream`, in order.
    fn replay(&self, stream: u64, addresses: Vec<u64>) -> PyResult<()> {
        if addresses.len() < self.places {
            return Err(PyValueError::new_err(format!(
                "got {} addresses; {} are needed",
                addresses.len(),
                self.places
            )));
        }
        let driver = Driver::get()?;
        let _context = driver.enter(self.device)?;
        let mut encoded = [TensorMap([0; 16]); MOST_MAPS];
        let mut params = Vec::new();
        for launch in &self.launches {
            for (target, (description, base)) in encoded.iter_mut().zip(&launch.maps) {
                *target = driver.encode(description, base.resolve(&addresses))?;
            }
            params.clear();
            params.extend_from_slice(&launch.params);
            for (at, address) in &launch.pointers {
                params[*at..*at + 8].copy_from_slice(&address.resolve(&addresses).to_le_bytes());
            }
            driver.launch(&launch.shape, stream, &mut encoded[..launch.maps.len()], &params)?;
        }
        Ok(())
    }
}

/// Adds this file's functions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<CudaProgram>()?;
    module.add_function(wrap_pyfunction!(cuda_launch, module)?)
}
