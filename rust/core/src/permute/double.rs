//! Weighted sums and their gradients in fp64: for tests of gradients, so plain loops.

use std::ops::Range;
use std::slice;

use super::arguments::{Combine, CombineBackward};

/// An fp64 value wherever it lies: matrices are given by address, whose alignment nobody promises.
type Value = [u8; 8];

/// Row `index` of a matrix.
///
/// # Safety
/// It exists and is not written meanwhile.
unsafe fn row<'a>(matrix: *const u8, index: usize, len: usize) -> &'a [Value] {
    // SAFETY: the caller's; a value is bytes, which need no alignment.
    if len == 0 { &[] } else { unsafe { slice::from_raw_parts(matrix.cast::<Value>().add(index * len), len) } }
}

/// Row `index` of a matrix, to be written.
///
/// # Safety
/// It exists and nobody else uses it meanwhile.
unsafe fn row_mut<'a>(matrix: *mut u8, index: usize, len: usize) -> &'a mut [Value] {
    // SAFETY: the caller's; a value is bytes, which need no alignment.
    if len == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(matrix.cast::<Value>().add(index * len), len) } }
}

fn get(value: &Value) -> f64 {
    f64::from_ne_bytes(*value)
}

fn set(to: &mut Value, value: f64) {
    *to = value.to_ne_bytes();
}

/// The weight of a slot.
///
/// # Safety
/// `weights` is null or has one.
unsafe fn weight(weights: *const u8, slot: usize) -> f64 {
    // SAFETY: the caller's: there is a weight of the slot.
    if weights.is_null() { 1.0 } else { unsafe { get(&*weights.cast::<Value>().add(slot)) } }
}

/// [`Combine`] for some tokens.
///
/// # Safety
/// As for `Combine::run`.
pub(super) unsafe fn combine(args: &Combine, tokens: Range<usize>) {
    let len = args.map.hidden;
    for token in tokens {
        // SAFETY: rows of different tokens are different memory.
        unsafe {
            let out = row_mut(args.out, token, len);
            out.fill(0f64.to_ne_bytes());
            for slot in args.map.slots(token) {
                let Some(from) = args.map.used_row(slot) else { continue };
                let weight = weight(args.weights, slot);
                for (out, y) in out.iter_mut().zip(row(args.y, from, len)) {
                    set(out, get(out) + weight * get(y));
                }
            }
        }
    }
}

/// [`CombineBackward`] for some tokens.
///
/// # Safety
/// As for `CombineBackward::run`.
pub(super) unsafe fn combine_backward(args: &CombineBackward, tokens: Range<usize>) {
    let len = args.map.hidden;
    for token in tokens {
        for slot in args.map.slots(token) {
            // SAFETY: rows of different slots are different memory.
            unsafe {
                let dout = row(args.dout, token, len);
                let used = args.map.used_row(slot);
                if !args.dy.is_null() {
                    let weight = if used.is_some() { weight(args.weights, slot) } else { 0.0 };
                    let dy = row_mut(args.dy, args.map.row(slot), len);
                    for (dy, d) in dy.iter_mut().zip(dout) {
                        set(dy, if used.is_some() { weight * get(d) } else { 0.0 });
                    }
                }
                if !args.dweights.is_null() {
                    let dot = |from| dout.iter().zip(row(args.y, from, len)).map(|(d, y)| get(d) * get(y)).sum();
                    set(&mut *args.dweights.cast::<Value>().add(slot), used.map_or(0.0, dot));
                }
            }
        }
    }
}
