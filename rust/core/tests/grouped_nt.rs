//! The forward grouped GEMM against fp64, on every instruction set this CPU has.

mod common;

use common::{Random, Tensor, activate, error, gate_up, isas, offsets, tolerance};
use moekern_core::gemm::{Activation, Epilogue, Gather, Grouped, grouped_nt};
use moekern_core::vector::{DType, Isa};

struct Case {
    dtype: DType,
    counts: Vec<usize>,
    k: usize,
    n: usize,
    top_k: usize,
    bias: bool,
    activation: Option<Activation>,
    interleaved: bool,
    save: bool,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            counts: vec![0, 1, 2, 3, 4, 5, 8, 9],
            k: 64,
            n: 48,
            top_k: 1,
            bias: false,
            activation: None,
            interleaved: false,
            save: false,
        }
    }
}

struct Inputs {
    offsets: Vec<i32>,
    order: Vec<i32>,
    x: Tensor,
    w: Tensor,
    bias: Tensor,
}

impl Case {
    fn inputs(&self) -> Inputs {
        let mut random = Random::new(7);
        let rows: usize = self.counts.iter().sum();
        let tokens = rows.div_ceil(self.top_k).max(1);
        let experts = self.counts.len();
        let scale = 1.0 / (self.k as f64).sqrt();
        Inputs {
            offsets: offsets(&self.counts),
            order: (0..rows).map(|_| random.below(tokens * self.top_k) as i32).collect(),
            x: Tensor::normal(self.dtype, tokens * self.k, 1.0, &mut random),
            w: Tensor::normal(self.dtype, experts * self.n * self.k, scale, &mut random),
            bias: Tensor::normal(self.dtype, experts * self.n, 0.5, &mut random),
        }
    }

    fn columns(&self) -> usize {
        self.activation.map_or(1, Activation::columns)
    }

    /// `out` and `pre`, poisoned with NaN before the call.
    fn run(&self, inputs: &Inputs, isa: Isa, threads: usize) -> (Tensor, Tensor) {
        let rows: usize = self.counts.iter().sum();
        let mut out = Tensor::nan(self.dtype, rows * self.n / self.columns());
        let mut pre = Tensor::nan(self.dtype, rows * self.n);
        let job = Grouped {
            isa,
            threads,
            dtype: self.dtype,
            experts: self.counts.len(),
            offsets: inputs.offsets.as_ptr(),
            k: self.k,
            n: self.n,
            a: inputs.x.ptr(),
            gather: Gather { order: inputs.order.as_ptr(), top_k: self.top_k },
            b: inputs.w.ptr(),
            bias: if self.bias { inputs.bias.ptr() } else { std::ptr::null() },
            out: out.mut_ptr(),
        };
        let epilogue = Epilogue {
            activation: self.activation,
            interleaved: self.interleaved,
            pre: if self.save { pre.mut_ptr() } else { std::ptr::null_mut() },
        };
        // SAFETY: the tensors have the shapes stated.
        unsafe { grouped_nt(&job, &epilogue) };
        (out, pre)
    }

    fn reference(&self, inputs: &Inputs) -> (Vec<f64>, Vec<f64>) {
        let (x, w, bias) = (inputs.x.values(), inputs.w.values(), inputs.bias.values());
        let (mut out, mut pre) = (Vec::new(), Vec::new());
        for (expert, &count) in self.counts.iter().enumerate() {
            for row in inputs.offsets[expert] as usize..inputs.offsets[expert] as usize + count {
                let token = inputs.order[row] as usize / self.top_k;
                let h: Vec<f64> = (0..self.n)
                    .map(|f| {
                        let w = &w[(expert * self.n + f) * self.k..][..self.k];
                        let dot: f64 = x[token * self.k..][..self.k].iter().zip(w).map(|(a, b)| a * b).sum();
                        dot + if self.bias { bias[expert * self.n + f] } else { 0.0 }
                    })
                    .collect();
                match self.activation {
                    None => out.extend(&h),
                    Some(act) if act.gated() => out.extend((0..self.n / 2).map(|i| {
                        let (g, u) = gate_up(i, self.n / 2, self.interleaved);
                        activate(act, h[g], h[u])
                    })),
                    Some(act) => out.extend(h.iter().map(|&g| activate(act, g, 0.0))),
                }
                pre.extend(h);
            }
        }
        (out, pre)
    }

    /// Every instruction set and 1, 2 and 3 threads: right, and the same bits for any number of threads.
    fn check(&self, name: &str) {
        let inputs = self.inputs();
        let (out, pre) = self.reference(&inputs);
        for isa in isas() {
            let (got, got_pre) = self.run(&inputs, isa, 1);
            let e = error(&got.values(), &out);
            assert!(e <= tolerance(self.dtype), "{name}: {isa:?} {:?}: error {e:.2e}", self.dtype);
            if self.save {
                let e = error(&got_pre.values(), &pre);
                assert!(e <= tolerance(self.dtype), "{name}: {isa:?} {:?}: error of pre {e:.2e}", self.dtype);
            }
            for threads in [2, 3] {
                let (again, again_pre) = self.run(&inputs, isa, threads);
                assert!(again.bytes == got.bytes, "{name}: {isa:?}: {threads} threads change the result");
                assert!(again_pre.bytes == got_pre.bytes, "{name}: {isa:?}: {threads} threads change pre");
            }
        }
    }
}

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

#[test]
fn any_number_of_rows() {
    for dtype in DTYPES {
        let counts = vec![0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 25, 33, 48, 49, 64, 100, 130, 0];
        Case { dtype, counts, k: 128, n: 104, top_k: 2, ..Case::default() }.check("ragged");
    }
}

#[test]
fn more_rows_than_a_unit_holds() {
    for dtype in DTYPES {
        Case { dtype, counts: vec![1100, 0, 513], k: 40, n: 24, ..Case::default() }.check("long");
    }
}

#[test]
fn any_inner_size() {
    for dtype in DTYPES {
        for k in [1, 2, 3, 7, 8, 15, 24, 31, 33, 40, 56, 63, 65, 72, 96, 200, 1030, 1096] {
            Case { dtype, k, n: 32, counts: vec![1, 4, 6, 12, 20, 140], ..Case::default() }.check(&format!("k = {k}"));
        }
    }
}

#[test]
fn sums_over_nothing_leave_the_bias() {
    for dtype in DTYPES {
        Case { dtype, counts: vec![1, 40, 140], ..Case::default() }.check("a product before, in the same memory");
        Case { dtype, k: 0, n: 500, counts: vec![1, 4, 6, 12, 20, 140], bias: true, ..Case::default() }.check("k = 0");
    }
}

#[test]
fn any_number_of_features() {
    for dtype in DTYPES {
        for n in [1, 2, 3, 5, 7, 8, 13, 24, 95, 96, 97, 136, 481, 500] {
            Case { dtype, n, counts: vec![1, 4, 6, 12, 20, 140], bias: true, ..Case::default() }
                .check(&format!("n = {n}"));
        }
    }
}

#[test]
fn every_activation() {
    for dtype in DTYPES {
        for activation in Activation::ALL {
            for (interleaved, save, bias) in [(false, true, true), (true, true, false), (true, false, true)] {
                for half in [8, 52, 104, 13] {
                    let n = half * activation.columns();
                    let interleaved = interleaved && activation.gated();
                    let counts = vec![1, 3, 7, 11, 21, 130];
                    let activation = Some(activation);
                    Case { dtype, n, counts, activation, interleaved, save, bias, top_k: 3, ..Case::default() }
                        .check(&format!("{activation:?} {half} interleaved {interleaved}"));
                }
            }
        }
    }
}

#[test]
fn nothing_to_do() {
    Case { counts: vec![], ..Case::default() }.check("no experts");
    Case { counts: vec![0, 0], ..Case::default() }.check("no rows");
}

#[test]
fn nan_and_infinity_stay_in_their_row() {
    for dtype in DTYPES {
        let case = Case { dtype, counts: vec![3, 7, 40], k: 72, n: 24, ..Case::default() };
        let mut inputs = case.inputs();
        inputs.order = (0..50).collect();
        let size = dtype.size();
        let poison = Tensor::from_values(dtype, [f64::NAN, f64::INFINITY]);
        for (row, which) in [(1, 0), (5, 1), (30, 0)] {
            let at = (row * case.k + case.k - 1) * size;
            inputs.x.bytes[at..at + size].copy_from_slice(&poison.bytes[which * size..][..size]);
        }
        for isa in isas() {
            let (out, _) = case.run(&inputs, isa, 2);
            for (row, values) in out.values().chunks(case.n).enumerate() {
                let bad = [1, 5, 30].contains(&row);
                assert!(values.iter().all(|v| v.is_finite() != bad), "{isa:?} {dtype:?} row {row}: {values:?}");
            }
        }
    }
}
