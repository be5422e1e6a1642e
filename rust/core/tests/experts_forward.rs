//! The forward pass against the formulas in double precision.

mod common;
mod layer;

use common::{Random, Tensor, error, isas};
use layer::{Layer, Shape, output, pre_activations};
use moekern_core::experts::{ExpertsForward, experts_forward};
use moekern_core::vector::{DType, Isa};
use std::ptr::null_mut;

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// Relative error allowed: roundings of A, of each row and of the result in half precision, summation in single.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 6e-3,
        DType::F16 => 8e-4,
        _ => 3e-6,
    }
}

/// A layer, and what the reference makes of exactly its values.
struct Case {
    layer: Layer,
    out: Vec<f64>,
    pre: Vec<f64>,
}

impl Case {
    fn new(shape: Shape, dtype: DType, counts: &[usize], sentinels: usize, biased: bool, scored: bool) -> Self {
        let mut random = Random::new(shape.hidden as u64 * 31 + shape.inter as u64);
        let layer = Layer::new(&mut random, shape, dtype, counts, sentinels, biased, scored);
        let (operands, routing) = (layer.operands(), &layer.routing);
        let pre = pre_activations(&shape, &operands, &routing.order, &routing.offsets);
        let out = output(&shape, &operands, &pre, &routing.order, &routing.offsets);
        Self { layer, out, pre }
    }

    /// `out` and `pre`, poisoned with NaN before the call.
    fn run(&self, isa: Isa, threads: usize, save: bool) -> (Tensor, Tensor) {
        let (l, s) = (&self.layer, &self.layer.shape);
        let mut out = Tensor::nan(l.dtype, s.tokens * s.hidden);
        let mut pre = Tensor::nan(l.dtype, self.pre.len());
        let args = ExpertsForward {
            inputs: self.layer.inputs(isa, threads),
            pre: if save { pre.mut_ptr() } else { null_mut() },
            out: out.mut_ptr(),
        };
        // SAFETY: the tensors have the shapes of the layer.
        unsafe { experts_forward(&args) };
        (out, pre)
    }

    fn check(&self) {
        let Layer { shape, dtype, routing, .. } = &self.layer;
        let name = format!("{dtype:?} {shape:?}");
        let used = *routing.offsets.last().unwrap() as usize * shape.width();
        for isa in isas() {
            let (out, pre) = self.run(isa, 1, true);
            let e = error(&out.values(), &self.out);
            assert!(e <= tolerance(*dtype), "{isa:?} {name}: error {e:.2e}");
            let e = error(&pre.values()[..used], &self.pre[..used]);
            assert!(e <= tolerance(*dtype), "{isa:?} {name}: error of pre {e:.2e}");
            for threads in [2, 3] {
                let (again, _) = self.run(isa, threads, threads == 2);
                assert!(again.bytes == out.bytes, "{isa:?} {name}: {threads} threads or not saving changes the result");
            }
        }
    }
}

fn shape(activation: u8, transposed: bool, interleaved: bool) -> Shape {
    Shape { tokens: 36, hidden: 72, inter: 40, experts: 6, top_k: 3, activation, transposed, interleaved }
}

#[test]
fn every_activation_and_layout() {
    for dtype in DTYPES {
        for activation in 0..10 {
            for (transposed, interleaved) in [(false, false), (false, true), (true, false), (true, true)] {
                if interleaved && activation >= 5 {
                    continue;
                }
                let shape = shape(activation, transposed, interleaved);
                Case::new(shape, dtype, &[0, 1, 7, 33, 60, 2], 5, true, true).check();
            }
        }
    }
}

#[test]
fn no_biases_no_scores() {
    for dtype in DTYPES {
        Case::new(shape(0, false, false), dtype, &[20, 0, 18, 30, 36, 4], 0, false, false).check();
    }
}

#[test]
fn odd_sizes() {
    for dtype in DTYPES {
        for transposed in [false, true] {
            for (hidden, inter) in [(1, 1), (3, 5), (33, 17), (100, 97)] {
                let shape = Shape { hidden, inter, ..shape(0, transposed, false) };
                Case::new(shape, dtype, &[0, 1, 7, 33, 60, 2], 5, true, true).check();
            }
        }
    }
}

#[test]
fn sentinels_only_give_zeros() {
    for dtype in DTYPES {
        let case = Case::new(shape(0, false, false), dtype, &[0; 6], 108, true, true);
        for isa in isas() {
            assert!(case.run(isa, 2, false).0.values().iter().all(|&v| v == 0.0), "{isa:?}");
        }
    }
}

#[test]
fn many_calls_at_once() {
    let case = Case::new(shape(0, false, false), DType::Bf16, &[20, 0, 18, 30, 36, 4], 0, true, true);
    let expected = case.run(Isa::best(), 1, false).0.bytes;
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    assert!(case.run(Isa::best(), 2, false).0.bytes == expected);
                }
            });
        }
    });
}
