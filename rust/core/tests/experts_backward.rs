//! The backward pass against the formulas in double precision.

mod common;
mod layer;

use common::{Random, Tensor, error, isas};
use layer::{Gradients, Layer, Operands, Routing, Shape, gradients, output, pre_activations};
use moekern_core::experts::{ExpertsBackward, experts_backward};
use moekern_core::vector::{DType, Isa};
use std::ptr::null_mut;

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

/// Relative error allowed: roundings of dH, A' and the result in half precision, summation in single.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::Bf16 => 6e-3,
        DType::F16 => 1e-3,
        _ => 3e-6,
    }
}

/// A layer with an upstream gradient, and what the reference makes of exactly these values.
struct Case {
    layer: Layer,
    dout: Tensor,
    pre: Tensor,
    want: Gradients,
}

/// All six results, poisoned before the call.
struct Results {
    dx: Tensor,
    dscores: Tensor,
    dw_gate_up: Tensor,
    dw_down: Tensor,
    db_gate_up: Tensor,
    db_down: Tensor,
}

impl Case {
    fn new(shape: Shape, dtype: DType, counts: &[usize], sentinels: usize, biased: bool, scored: bool) -> Self {
        let mut random = Random::new(shape.hidden as u64 * 31 + shape.inter as u64);
        let layer = Layer::new(&mut random, shape, dtype, counts, sentinels, biased, scored);
        let dout = Tensor::normal(dtype, shape.tokens * shape.hidden, 1.0, &mut random);
        let (operands, Routing { order, offsets, .. }) = (layer.operands(), &layer.routing);
        let pre = Tensor::from_values(dtype, pre_activations(&shape, &operands, order, offsets));
        let want = gradients(&shape, &operands, &pre.values(), &dout.values(), order, offsets);
        Self { layer, dout, pre, want }
    }

    fn run(&self, isa: Isa, threads: usize, wanted: [bool; 6]) -> Results {
        let w = &self.want;
        let poisoned = |len: usize| Tensor::nan(self.layer.dtype, len);
        let mut r = Results {
            dx: poisoned(w.dx.len()),
            dscores: Tensor::nan(DType::F32, w.dscores.len()),
            dw_gate_up: poisoned(w.dw_gate_up.len()),
            dw_down: poisoned(w.dw_down.len()),
            db_gate_up: poisoned(w.db_gate_up.len()),
            db_down: poisoned(w.db_down.len()),
        };
        let choose = |t: &mut Tensor, wanted: bool| if wanted { t.mut_ptr() } else { null_mut() };
        let args = ExpertsBackward {
            inputs: self.layer.inputs(isa, threads),
            dout: self.dout.ptr(),
            pre: self.pre.ptr(),
            dx: choose(&mut r.dx, wanted[0]),
            dscores: choose(&mut r.dscores, wanted[1]).cast(),
            dw_gate_up: choose(&mut r.dw_gate_up, wanted[2]),
            dw_down: choose(&mut r.dw_down, wanted[3]),
            db_gate_up: choose(&mut r.db_gate_up, wanted[4]),
            db_down: choose(&mut r.db_down, wanted[5]),
        };
        // SAFETY: the tensors have the shapes of the layer.
        unsafe { experts_backward(&args) };
        r
    }

    fn check(&self, isa: Isa, threads: usize) {
        let r = self.run(isa, threads, [true; 6]);
        for ((name, got), want) in r.named().into_iter().zip(self.want.list()) {
            let error = error(&got.values(), want);
            let Layer { shape, dtype, .. } = &self.layer;
            let limit = tolerance(*dtype);
            assert!(error < limit, "{isa:?} {dtype:?} {shape:?} {name}: {error:.2e}");
        }
    }
}

impl Results {
    fn named(&self) -> [(&'static str, &Tensor); 6] {
        [
            ("dx", &self.dx),
            ("dscores", &self.dscores),
            ("dw_gate_up", &self.dw_gate_up),
            ("dw_down", &self.dw_down),
            ("db_gate_up", &self.db_gate_up),
            ("db_down", &self.db_down),
        ]
    }
}

const RAGGED: [usize; 12] = [0, 1, 2, 3, 5, 8, 9, 17, 130, 0, 33, 12];

fn shape(hidden: usize, inter: usize, slots: usize, experts: usize, activation: u8) -> Shape {
    let top_k = if slots.is_multiple_of(3) { 3 } else { 1 };
    Shape { tokens: slots / top_k, hidden, inter, experts, top_k, activation, transposed: false, interleaved: false }
}

#[test]
fn the_reference_is_the_derivative_of_its_output() {
    for activation in 0..10 {
        let shape = shape(5, 4, 12, 3, activation);
        let case = Case::new(shape, DType::F64, &[4, 0, 6], 2, true, true);
        let mut operands = case.layer.operands();
        let Routing { order, offsets, .. } = &case.layer.routing;
        let dout = case.dout.values();
        let pre = pre_activations(&shape, &operands, order, offsets);
        let want = gradients(&shape, &operands, &pre, &dout, order, offsets);
        let loss = |op: &Operands| -> f64 {
            let pre = pre_activations(&shape, op, order, offsets);
            output(&shape, op, &pre, order, offsets).iter().zip(&dout).map(|(a, b)| a * b).sum()
        };
        for which in 0..6 {
            for (i, want) in want.list()[which].iter().enumerate() {
                let mut shifted = |by: f64| {
                    operands.list_mut()[which][i] += by;
                    let value = loss(&operands);
                    operands.list_mut()[which][i] -= by;
                    value
                };
                let slope = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
                assert!((slope - want).abs() < 1e-6 * (1.0 + want.abs()), "{activation} {which}[{i}]: {slope} {want}");
            }
        }
    }
}

#[test]
fn ragged_rows_and_sizes() {
    let slots = RAGGED.iter().sum::<usize>() + 2;
    for isa in isas() {
        for dtype in DTYPES {
            // Multiples of vectors, of eight, of nothing; more than one block of columns.
            for (hidden, inter) in [(64, 96), (72, 40), (37, 19), (5, 3), (272, 264)] {
                Case::new(shape(hidden, inter, slots, RAGGED.len(), 0), dtype, &RAGGED, 2, true, true).check(isa, 2);
            }
        }
    }
}

#[test]
fn every_activation_and_layout() {
    let counts = [7, 0, 20];
    for isa in isas() {
        for dtype in DTYPES {
            for activation in 0..10 {
                for (transposed, interleaved) in [(false, false), (true, false), (false, true), (true, true)] {
                    let shape = Shape { transposed, interleaved, ..shape(48, 40, 27, 3, activation) };
                    Case::new(shape, dtype, &counts, 0, activation % 2 == 0, activation % 3 != 0).check(isa, 1);
                }
            }
        }
    }
}

#[test]
fn many_rows_are_summed_in_pieces() {
    for isa in isas() {
        for dtype in DTYPES {
            Case::new(shape(24, 40, 2403, 2, 0), dtype, &[2300, 103], 0, false, true).check(isa, 2);
        }
    }
}

#[test]
fn results_do_not_depend_on_threads_or_repetition() {
    let slots = RAGGED.iter().sum::<usize>() + 2;
    for isa in isas() {
        for dtype in DTYPES {
            let case = Case::new(shape(72, 264, slots, RAGGED.len(), 4), dtype, &RAGGED, 2, true, true);
            let first = case.run(isa, 1, [true; 6]);
            for threads in [1, 2, 7] {
                let again = case.run(isa, threads, [true; 6]);
                for ((name, a), (_, b)) in first.named().into_iter().zip(again.named()) {
                    assert!(a.bytes == b.bytes, "{isa:?} {dtype:?} {threads} threads: {name} differs");
                }
            }
        }
    }
}

#[test]
fn gradients_not_wanted_change_nothing() {
    for (transposed, dtype) in [(false, DType::F32), (true, DType::Bf16)] {
        let shape = Shape { transposed, ..shape(64, 40, 30, 4, 1) };
        let case = Case::new(shape, dtype, &[9, 0, 20, 1], 0, true, true);
        for isa in isas() {
            let all = case.run(isa, 2, [true; 6]);
            for mask in 0..64 {
                let wanted = std::array::from_fn(|i| mask >> i & 1 == 1);
                let some = case.run(isa, 2, wanted);
                for (i, ((name, a), (_, b))) in all.named().into_iter().zip(some.named()).enumerate() {
                    if wanted[i] {
                        assert!(a.bytes == b.bytes, "{isa:?} {wanted:?}: {name} differs");
                    } else {
                        assert!(b.values().iter().all(|v| v.is_nan()), "{isa:?} {wanted:?}: {name} was written");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_of_nan_stays_in_its_expert() {
    let counts = [5, 3, 33, 8];
    for isa in isas() {
        for dtype in DTYPES {
            for transposed in [false, true] {
                let shape = Shape { transposed, ..shape(48, 40, 49, 4, 0) };
                let mut case = Case::new(shape, dtype, &counts, 0, true, true);
                // The last row of expert 1, next to the first of expert 2.
                let token = case.layer.routing.order[7] as usize;
                for tensor in [&mut case.layer.x, &mut case.dout] {
                    let mut values = tensor.values();
                    values[token * 48..(token + 1) * 48].fill(f64::NAN);
                    *tensor = Tensor::from_values(dtype, values);
                }
                let r = case.run(isa, 2, [true; 6]);
                for ((name, got), want) in r.named().into_iter().zip(case.want.list()).skip(2) {
                    let each = want.len() / 4;
                    let got = got.values();
                    for e in [0, 2, 3] {
                        let error = error(&got[e * each..(e + 1) * each], &want[e * each..(e + 1) * each]);
                        assert!(error < tolerance(dtype), "{isa:?} {dtype:?} {name} of expert {e}: {error:.2e}");
                    }
                }
                for (t, row) in r.dx.values().chunks(48).enumerate() {
                    assert_eq!(row.iter().any(|v| v.is_nan()), t == token, "{isa:?} {dtype:?} token {t}");
                }
            }
        }
    }
}

#[test]
fn nothing_to_do_still_writes_zeros() {
    for isa in isas() {
        for dtype in DTYPES {
            for (counts, sentinels) in [([0, 0], 0), ([0, 0], 6)] {
                let case = Case::new(shape(40, 24, sentinels, 2, 0), dtype, &counts, sentinels, true, true);
                let r = case.run(isa, 2, [true; 6]);
                assert!(r.named().iter().all(|(_, t)| t.values().iter().all(|&v| v == 0.0)));
            }
        }
    }
}
