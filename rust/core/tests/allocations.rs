//! A verb that ran before with these sizes allocates next to nothing: its working memory is kept by the thread.
//!
//! One test in a program of its own, because the counter sees every thread.

mod common;
mod layer;

use common::{Random, Tensor, isas};
use layer::{Layer, Shape};
use moekern_core::experts::{ExpertsBackward, ExpertsForward, experts_backward, experts_forward};
use moekern_core::plan::plan;
use moekern_core::vector::{DType, Isa};
use std::alloc::{GlobalAlloc, Layout, System};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The system's allocator with a count of allocations and of their bytes.
struct Counted;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator, counted.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Relaxed);
        BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(start, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Allocations and bytes of the second run.
fn second_time(mut run: impl FnMut()) -> (usize, usize) {
    run();
    let before = (ALLOCATIONS.load(Relaxed), BYTES.load(Relaxed));
    run();
    (ALLOCATIONS.load(Relaxed) - before.0, BYTES.load(Relaxed) - before.1)
}

fn forward(layer: &Layer, isa: Isa, out: &mut Tensor, pre: &mut Tensor) {
    let args = ExpertsForward { inputs: layer.inputs(isa, 1), pre: pre.mut_ptr(), out: out.mut_ptr() };
    // SAFETY: the tensors have the shapes of the layer.
    unsafe { experts_forward(&args) };
}

fn backward(layer: &Layer, isa: Isa, pre: &Tensor, gradients: &mut [Tensor; 3], dscores: &mut [f32]) {
    let [dx, dw_gate_up, dw_down] = gradients;
    let args = ExpertsBackward {
        inputs: layer.inputs(isa, 1),
        dout: layer.x.ptr(),
        pre: pre.ptr(),
        dx: dx.mut_ptr(),
        dscores: dscores.as_mut_ptr(),
        dw_gate_up: dw_gate_up.mut_ptr(),
        dw_down: dw_down.mut_ptr(),
        db_gate_up: null_mut(),
        db_down: null_mut(),
    };
    // SAFETY: the tensors have the shapes of the layer.
    unsafe { experts_backward(&args) };
}

/// Measured for eight experts: 42 and 3600 bytes forward, 12 and 1808 backward (lists of jobs and blocks), 1 and 36
/// planning (counters); nothing depends on the number of tokens. On several threads the second run may be the first
/// of one of them, so this counts on one.
#[test]
fn working_memory_is_kept() {
    let shape = Shape {
        tokens: 64,
        hidden: 96,
        inter: 64,
        experts: 8,
        top_k: 2,
        activation: 0,
        transposed: false,
        interleaved: false,
    };
    let (slots, counts) = (128, [0, 3, 9, 40, 60, 4, 10, 2]);
    for (isa, dtype) in isas().flat_map(|isa| [(isa, DType::F32), (isa, DType::Bf16)]) {
        let layer = Layer::new(&mut Random::new(7), shape, dtype, &counts, 0, true, true);
        let mut out = layer.x.clone();
        let mut pre = Tensor::nan(dtype, slots * shape.width());
        let used = second_time(|| forward(&layer, isa, &mut out, &mut pre));
        assert!(used.0 <= 46 && used.1 <= 4000, "{isa:?} {dtype:?} forward: {} allocations, {} bytes", used.0, used.1);

        let mut gradients = [out.clone(), layer.w_gate_up.clone(), layer.w_down.clone()];
        let mut dscores = vec![0.0; slots];
        let used = second_time(|| backward(&layer, isa, &pre, &mut gradients, &mut dscores));
        assert!(used.0 <= 14 && used.1 <= 2500, "{isa:?} {dtype:?} backward: {} allocations, {} bytes", used.0, used.1);
    }

    let ids: Vec<i64> = (0..slots as i64).map(|slot| slot % 8).collect();
    let (mut order, mut inverse, mut offsets) = (vec![0; slots], vec![0; slots], vec![0; 9]);
    let used = second_time(|| plan(&ids, &mut order, &mut inverse, &mut offsets, 1).unwrap());
    assert!(used.0 <= 1 && used.1 <= 64, "plan: {} allocations, {} bytes", used.0, used.1);
}
