//! Does one verb once, on one thread, for counting instructions: `verb_once VERB ISA DTYPE TOKENS`.
//!
//! H = 256, I = 128, 4 experts, 2 per token, SwiGLU. VERB is combine, forward or backward, ISA a name that
//! `MOEKERN_CPU_ISA` takes, DTYPE fp32 or bf16. All data are zero, which changes no count and costs no instructions to
//! make. An instruction set that this processor lacks ends with code 3.

use moekern_core::experts::{ExpertsBackward, ExpertsForward, ExpertsInputs, experts_backward, experts_forward};
use moekern_core::gemm::Activation;
use moekern_core::permute::{Combine, TokenMap};
use moekern_core::plan::plan;
use moekern_core::vector::{DType, Isa, IsaError};
use std::process::exit;
use std::ptr::{null, null_mut};

const HIDDEN: usize = 256;
const INTER: usize = 128;
const EXPERTS: usize = 4;
const TOP_K: usize = 2;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [verb, isa, dtype, tokens] = &words[..] else { panic!("four arguments: VERB ISA DTYPE TOKENS") };
    let isa = Isa::parse(isa).unwrap_or_else(|error| match error {
        IsaError::Unavailable(_) => exit(3),
        IsaError::Unknown(name) => panic!("unknown instruction set {name}"),
    });
    let dtype = if dtype == "bf16" { DType::Bf16 } else { DType::F32 };
    let case = Case::new(isa, dtype, tokens.parse().expect("TOKENS is a number"));
    match verb.as_str() {
        "combine" => case.combine(),
        "forward" => case.forward(),
        "backward" => case.backward(),
        _ => panic!("VERB is combine, forward or backward"),
    }
}

/// The plan and the inputs that several verbs read.
struct Case {
    isa: Isa,
    dtype: DType,
    tokens: usize,
    order: Vec<i32>,
    inverse: Vec<i32>,
    offsets: Vec<i32>,
    scores: Vec<f32>,
    x: Vec<u8>,
    rows: Vec<u8>,
    pre: Vec<u8>,
    w_gate_up: Vec<u8>,
    w_down: Vec<u8>,
}

impl Case {
    /// Slots go to all experts one after the other.
    fn new(isa: Isa, dtype: DType, tokens: usize) -> Self {
        let slots = tokens * TOP_K;
        let ids: Vec<i64> = (0..slots).map(|slot| (slot % EXPERTS) as i64).collect();
        let (mut order, mut inverse, mut offsets) = (vec![0; slots], vec![0; slots], vec![0; EXPERTS + 1]);
        plan(&ids, &mut order, &mut inverse, &mut offsets, 1).expect("valid sizes");
        let zeros = |elements: usize| vec![0; elements * dtype.size()];
        Self {
            isa,
            dtype,
            tokens,
            order,
            inverse,
            offsets,
            scores: vec![0.0; slots],
            x: zeros(tokens * HIDDEN),
            rows: zeros(slots * HIDDEN),
            pre: zeros(slots * 2 * INTER),
            w_gate_up: zeros(EXPERTS * 2 * INTER * HIDDEN),
            w_down: zeros(EXPERTS * HIDDEN * INTER),
        }
    }

    fn combine(self) {
        let map = TokenMap {
            isa: self.isa,
            threads: 1,
            dtype: self.dtype,
            tokens: self.tokens,
            top_k: TOP_K,
            hidden: HIDDEN,
            inverse: self.inverse.as_ptr(),
            used: self.inverse.len(),
        };
        let mut out = self.x;
        let weights = self.scores.as_ptr().cast();
        // SAFETY: the arrays have the documented sizes, and the plan is one.
        unsafe { Combine { map, y: self.rows.as_ptr(), weights, out: out.as_mut_ptr() }.run() };
    }

    fn inputs(&self) -> ExpertsInputs {
        ExpertsInputs {
            isa: self.isa,
            threads: 1,
            dtype: self.dtype,
            tokens: self.tokens,
            hidden: HIDDEN,
            inter: INTER,
            experts: EXPERTS,
            top_k: TOP_K,
            activation: Activation::Swiglu,
            transposed: false,
            interleaved: false,
            x: self.x.as_ptr(),
            scores: self.scores.as_ptr(),
            order: self.order.as_ptr(),
            inverse: self.inverse.as_ptr(),
            offsets: self.offsets.as_ptr(),
            w_gate_up: self.w_gate_up.as_ptr(),
            w_down: self.w_down.as_ptr(),
            b_gate_up: null(),
            b_down: null(),
        }
    }

    fn forward(mut self) {
        let mut out = vec![0; self.x.len()];
        let args = ExpertsForward { inputs: self.inputs(), pre: self.pre.as_mut_ptr(), out: out.as_mut_ptr() };
        // SAFETY: as above.
        unsafe { experts_forward(&args) };
    }

    fn backward(self) {
        let (mut dx, mut dscores) = (vec![0; self.x.len()], vec![0.0; self.scores.len()]);
        let (mut dw_gate_up, mut dw_down) = (vec![0; self.w_gate_up.len()], vec![0; self.w_down.len()]);
        let args = ExpertsBackward {
            inputs: self.inputs(),
            dout: self.x.as_ptr(),
            pre: self.pre.as_ptr(),
            dx: dx.as_mut_ptr(),
            dscores: dscores.as_mut_ptr(),
            dw_gate_up: dw_gate_up.as_mut_ptr(),
            dw_down: dw_down.as_mut_ptr(),
            db_gate_up: null_mut(),
            db_down: null_mut(),
        };
        // SAFETY: as above.
        unsafe { experts_backward(&args) };
    }
}
