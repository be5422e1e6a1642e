//! The planner, its tile table and its statistics.

use std::slice;

use moekern_core::plan::{Id, PlanError, TileOrder, plan as sort_slots, stats, tiles as cut};
use moekern_core::vector::IdType;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Planning fewer slots takes less time than letting other Python threads run meanwhile is worth, about 20 us.
const SLOTS_WORTH_RELEASING: usize = 1 << 13;

pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(plan, module)?)?;
    module.add_function(wrap_pyfunction!(tiles, module)?)?;
    module.add_function(wrap_pyfunction!(plan_stats, module)?)
}

/// The elements at an address; any address, 0 too, if there are none.
///
/// # Safety
/// The elements exist and nobody writes them while the slice lives.
unsafe fn elements<'a, T>(name: &str, address: usize, len: usize) -> PyResult<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    check::<T>(name, address, len)?;
    // SAFETY: the caller's, and checked: aligned, and no longer than memory can be.
    Ok(unsafe { slice::from_raw_parts(address as *const T, len) })
}

/// As [`elements`], to be written.
///
/// # Safety
/// The elements exist and nobody else uses them while the slice lives.
unsafe fn elements_mut<'a, T>(name: &str, address: usize, len: usize) -> PyResult<&'a mut [T]> {
    if len == 0 {
        return Ok(&mut []);
    }
    check::<T>(name, address, len)?;
    // SAFETY: the caller's, and checked: aligned, and no longer than memory can be.
    Ok(unsafe { slice::from_raw_parts_mut(address as *mut T, len) })
}

fn check<T>(name: &str, address: usize, len: usize) -> PyResult<()> {
    let align = align_of::<T>();
    if address == 0 {
        return Err(PyValueError::new_err(format!("{name}: null pointer")));
    }
    if !address.is_multiple_of(align) {
        return Err(PyValueError::new_err(format!("{name}: got address {address:#x}, expected a multiple of {align}")));
    }
    if len > isize::MAX as usize / size_of::<T>() {
        return Err(PyValueError::new_err(format!("{name}: got length {len}, which exceeds the address range")));
    }
    Ok(())
}

/// The `experts + 1` offsets of a plan.
///
/// # Safety
/// As for [`elements`].
unsafe fn plan_offsets<'a>(address: usize, experts: usize) -> PyResult<&'a [i32]> {
    if experts == 0 {
        return Err(PyValueError::new_err("experts: got 0, expected at least 1"));
    }
    // SAFETY: the caller's.
    unsafe { elements("offsets", address, experts.saturating_add(1)) }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (ids, id_type, slots, experts, order, inverse, offsets, threads))]
#[allow(clippy::too_many_arguments, reason = "Python's arguments")]
fn plan(
    py: Python<'_>,
    ids: usize,
    id_type: u8,
    slots: usize,
    experts: usize,
    order: usize,
    inverse: usize,
    offsets: usize,
    threads: usize,
) -> PyResult<()> {
    // SAFETY: Python vouches for the tensors behind the addresses.
    let (order, inverse, offsets) = unsafe {
        (
            elements_mut("order", order, slots)?,
            elements_mut("inverse", inverse, slots)?,
            elements_mut("offsets", offsets, experts.saturating_add(1))?,
        )
    };
    let mut sort = Sort { py, order, inverse, offsets, threads };
    // SAFETY: Python vouches for the tensors behind the addresses.
    let planned = unsafe {
        match IdType::from_code(id_type) {
            Some(IdType::U8) => sort.run::<u8>(elements("ids", ids, slots)?),
            Some(IdType::U16) => sort.run::<u16>(elements("ids", ids, slots)?),
            Some(IdType::I32) => sort.run::<i32>(elements("ids", ids, slots)?),
            Some(IdType::I64) => sort.run::<i64>(elements("ids", ids, slots)?),
            None => return Err(PyValueError::new_err(format!("id_type: got code {id_type}, expected 0 to 3"))),
        }
    };
    planned.map_err(|error| PyValueError::new_err(error.to_string()))
}

struct Sort<'a> {
    py: Python<'a>,
    order: &'a mut [i32],
    inverse: &'a mut [i32],
    offsets: &'a mut [i32],
    threads: usize,
}

impl Sort<'_> {
    fn run<I: Id>(&mut self, ids: &[I]) -> Result<(), PlanError> {
        let Self { py, order, inverse, offsets, threads } = self;
        if ids.len() < SLOTS_WORTH_RELEASING {
            return sort_slots(ids, order, inverse, offsets, *threads);
        }
        py.detach(|| sort_slots(ids, order, inverse, offsets, *threads))
    }
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (offsets, experts, height, longest_first, out, capacity))]
fn tiles(
    offsets: usize,
    experts: usize,
    height: usize,
    longest_first: bool,
    out: usize,
    capacity: usize,
) -> PyResult<usize> {
    if height == 0 {
        return Err(PyValueError::new_err("height: got 0, expected at least 1"));
    }
    let order = if longest_first { TileOrder::LongestFirst } else { TileOrder::ByExpert };
    // SAFETY: Python vouches for the tensors behind the addresses.
    let table = cut(unsafe { plan_offsets(offsets, experts)? }, height, order);
    if table.len() > capacity {
        return Err(PyValueError::new_err(format!("capacity: got {capacity}, expected {} tiles", table.len())));
    }
    // SAFETY: Python vouches for the tensors behind the addresses.
    let out: &mut [[i32; 3]] = unsafe { elements_mut("out", out, table.len())? };
    for (row, tile) in out.iter_mut().zip(&table) {
        *row = [tile.expert, tile.first_row, tile.rows];
    }
    Ok(table.len())
}

/// See `python/moekern/_core.pyi`.
#[pyfunction]
#[pyo3(signature = (offsets, experts))]
fn plan_stats(offsets: usize, experts: usize) -> PyResult<(u32, f64, f64, u32)> {
    // SAFETY: Python vouches for the tensors behind the addresses.
    let stats = stats(unsafe { plan_offsets(offsets, experts)? });
    Ok((stats.max_load, stats.mean_load, stats.entropy, stats.empty_experts))
}
