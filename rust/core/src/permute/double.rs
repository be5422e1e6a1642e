//! Weighted sums and their gradients in fp64: for tests of gradients, so plain loops.

use std::ops::Range;
use std::slice;

use super::{Combine, CombineBackward};

/// Row `index` of a matrix.
///
/// # Safety
/// It exists and is not written meanwhile.
unsafe fn row<'a>(matrix: *const u8, index: usize, len: usize) -> &'a [f64] {
    unsafe { slice::from_raw_parts(matrix.cast::<f64>().add(index * len), len) }
}

/// Row `index` of a matrix, to be written.
///
/// # Safety
/// It exists and nobody else uses it meanwhile.
unsafe fn row_mut<'a>(matrix: *mut u8, index: usize, len: usize) -> &'a mut [f64] {
    unsafe { slice::from_raw_parts_mut(matrix.cast::<f64>().add(index * len), len) }
}

/// The weight of a slot.
///
/// # Safety
/// `weights` is null or has one.
unsafe fn weight(weights: *const u8, slot: usize) -> f64 {
    if weights.is_null() { 1.0 } else { unsafe { *weights.cast::<f64>().add(slot) } }
}

/// [`Combine`] for some tokens.
///
/// # Safety
/// As for `Combine::run`.
pub(super) unsafe fn combine(job: &Combine, tokens: Range<usize>) {
    let len = job.layout.hidden;
    for token in tokens {
        // Safety: rows of different tokens are different memory.
        unsafe {
            let out = row_mut(job.out, token, len);
            out.fill(0.0);
            for slot in job.layout.slots(token) {
                let Some(from) = job.layout.used_row(slot) else { continue };
                let weight = weight(job.weights, slot);
                out.iter_mut().zip(row(job.y, from, len)).for_each(|(out, y)| *out += weight * y);
            }
        }
    }
}

/// [`CombineBackward`] for some tokens.
///
/// # Safety
/// As for `CombineBackward::run`.
pub(super) unsafe fn combine_backward(job: &CombineBackward, tokens: Range<usize>) {
    let len = job.layout.hidden;
    for token in tokens {
        for slot in job.layout.slots(token) {
            // Safety: rows of different slots are different memory.
            unsafe {
                let dout = row(job.dout, token, len);
                let used = job.layout.used_row(slot);
                if !job.dy.is_null() {
                    let weight = if used.is_some() { weight(job.weights, slot) } else { 0.0 };
                    let dy = row_mut(job.dy, job.layout.row(slot), len);
                    dy.iter_mut().zip(dout).for_each(|(dy, d)| *dy = if used.is_some() { weight * d } else { 0.0 });
                }
                if !job.dweights.is_null() {
                    let dot = |from| dout.iter().zip(row(job.y, from, len)).map(|(d, y)| d * y).sum();
                    *job.dweights.cast::<f64>().add(slot) = used.map_or(0.0, dot);
                }
            }
        }
    }
}
