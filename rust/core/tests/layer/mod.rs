//! The layer and its gradients in double precision, written from the formulas, one scalar at a time.
#![allow(dead_code, reason = "each test program uses a part")]
#![allow(clippy::needless_range_loop, reason = "several arrays are indexed alike, as in the formulas")]

use super::common::{Random, Tensor};
use moekern_core::experts::ExpertsInputs;
use moekern_core::gemm::Activation;
use moekern_core::vector::{DType, Isa};
use std::ptr::null;

/// Rows sorted by expert, as the planner gives them.
pub struct Routing {
    pub order: Vec<i32>,
    pub inverse: Vec<i32>,
    pub offsets: Vec<i32>,
}

/// Slots shuffled so that expert e gets `counts[e]` of them and `sentinels` belong to none.
pub fn routing(random: &mut Random, counts: &[usize], sentinels: usize) -> Routing {
    let experts = counts.len();
    let ids = (0..experts).flat_map(|e| std::iter::repeat_n(e, counts[e]));
    let mut owner: Vec<usize> = ids.chain(std::iter::repeat_n(experts, sentinels)).collect();
    for i in (1..owner.len()).rev() {
        owner.swap(i, random.below(i + 1));
    }
    let mut order: Vec<i32> = (0..owner.len() as i32).collect();
    order.sort_by_key(|&slot| owner[slot as usize]);
    let mut inverse = vec![0; order.len()];
    for (row, &slot) in order.iter().enumerate() {
        inverse[slot as usize] = row as i32;
    }
    Routing { order, inverse, offsets: super::common::offsets(counts) }
}

/// Values of one activation at (gate, up): the result and its partial derivatives. Codes as in the Python interface.
pub fn activation(code: u8, gate: f64, up: f64) -> (f64, f64, f64) {
    let normal = |x: f64| 0.5 * (1.0 + erf(x / 2f64.sqrt()));
    let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let gelu_tanh = |x: f64| {
        let c = (2.0 / std::f64::consts::PI).sqrt();
        let t = (c * (x + 0.044715 * x * x * x)).tanh();
        (0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * c * (1.0 + 3.0 * 0.044715 * x * x))
    };
    let gelu = |x: f64| (x * normal(x), normal(x) + x * density(x));
    let silu = |x: f64| (x * sigmoid(x), sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x))));
    let relu = |x: f64| if x > 0.0 { (x, 1.0) } else { (0.0, 0.0) };
    let gated = |(value, slope): (f64, f64)| (value * up, slope * up, value);
    let plain = |(value, slope): (f64, f64)| (value, slope, 0.0);
    match code {
        0 => gated(silu(gate)),
        1 => gated(gelu(gate)),
        2 => gated(gelu_tanh(gate)),
        3 => gated(relu(gate)),
        4 => {
            let (g, u) = (gate.min(7.0), up.clamp(-7.0, 7.0));
            let q = sigmoid(1.702 * g);
            let dg = if gate <= 7.0 { (u + 1.0) * q * (1.0 + 1.702 * g * (1.0 - q)) } else { 0.0 };
            let du = if (-7.0..=7.0).contains(&up) { g * q } else { 0.0 };
            ((u + 1.0) * g * q, dg, du)
        }
        5 => plain(silu(gate)),
        6 => plain(gelu(gate)),
        7 => plain(gelu_tanh(gate)),
        8 => plain(relu(gate)),
        9 => plain(if gate > 0.0 { (gate * gate, 2.0 * gate) } else { (0.0, 0.0) }),
        _ => unreachable!(),
    }
}

/// erf by its Taylor series near zero and its continued fraction beyond, to 1e-13.
fn erf(x: f64) -> f64 {
    if x < 0.0 {
        return -erf(-x);
    }
    if x > 3.0 {
        let mut fraction = 0.0;
        for n in (1..=60).rev() {
            fraction = n as f64 / 2.0 / (x + fraction);
        }
        return 1.0 - (-x * x).exp() / std::f64::consts::PI.sqrt() / (x + fraction);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// Sizes and switches of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub tokens: usize,
    pub hidden: usize,
    pub inter: usize,
    pub experts: usize,
    pub top_k: usize,
    pub activation: u8,
    pub transposed: bool,
    pub interleaved: bool,
}

impl Shape {
    pub fn gated(&self) -> bool {
        self.activation < 5
    }

    pub fn width(&self) -> usize {
        if self.gated() { 2 * self.inter } else { self.inter }
    }

    /// Index of (gate, up) of feature `i` in a row of `pre`.
    pub fn features(&self, i: usize) -> (usize, usize) {
        match (self.gated(), self.interleaved) {
            (false, _) => (i, i),
            (true, false) => (i, self.inter + i),
            (true, true) => (2 * i, 2 * i + 1),
        }
    }

    /// Element [feature, hidden] of one expert's w_gate_up.
    pub fn gate_up_at(&self, expert: usize, feature: usize, hidden: usize) -> usize {
        let base = expert * self.width() * self.hidden;
        base + if self.transposed { hidden * self.width() + feature } else { feature * self.hidden + hidden }
    }

    /// Element [hidden, inter] of one expert's w_down.
    pub fn down_at(&self, expert: usize, hidden: usize, inter: usize) -> usize {
        let base = expert * self.inter * self.hidden;
        base + if self.transposed { inter * self.hidden + hidden } else { hidden * self.inter + inter }
    }
}

/// Operands of the layer as f64; a missing bias is empty, missing scores are ones.
pub struct Operands {
    pub x: Vec<f64>,
    pub scores: Vec<f64>,
    pub w_gate_up: Vec<f64>,
    pub w_down: Vec<f64>,
    pub b_gate_up: Vec<f64>,
    pub b_down: Vec<f64>,
}

impl Operands {
    /// In the order of the fields, which is that of [`Gradients`].
    pub fn list_mut(&mut self) -> [&mut Vec<f64>; 6] {
        let Self { x, scores, w_gate_up, w_down, b_gate_up, b_down } = self;
        [x, scores, w_gate_up, w_down, b_gate_up, b_down]
    }
}

/// A layer's tensors in one dtype, with a routing: what both passes read.
pub struct Layer {
    pub shape: Shape,
    pub routing: Routing,
    pub dtype: DType,
    pub x: Tensor,
    pub scores: Option<Tensor>,
    pub w_gate_up: Tensor,
    pub w_down: Tensor,
    pub b_gate_up: Option<Tensor>,
    pub b_down: Option<Tensor>,
}

/// Address of an optional tensor; null where it is absent.
fn address<T>(tensor: &Option<Tensor>) -> *const T {
    tensor.as_ref().map_or(null(), |t| t.ptr().cast())
}

impl Layer {
    /// Random values scaled so that results are of order one, `counts[e]` rows for expert e.
    pub fn new(
        random: &mut Random,
        shape: Shape,
        dtype: DType,
        counts: &[usize],
        sentinels: usize,
        biased: bool,
        scored: bool,
    ) -> Self {
        let routing = routing(random, counts, sentinels);
        let slots = routing.order.len();
        assert_eq!(slots, shape.tokens * shape.top_k);
        let (h, i, g, e) = (shape.hidden, shape.inter, shape.width(), shape.experts);
        let mut tensor = |len: usize, scale: f64| Tensor::normal(dtype, len, scale, random);
        let x = tensor(shape.tokens * h, 1.0);
        let w_gate_up = tensor(e * g * h, (h as f64).powf(-0.5));
        let w_down = tensor(e * h * i, (i as f64).powf(-0.5));
        let b_gate_up = biased.then(|| tensor(e * g, 1.0));
        let b_down = biased.then(|| tensor(e * h, 1.0));
        let scores = scored.then(|| Tensor::normal(DType::F32, slots, 1.0, random));
        Self { shape, routing, dtype, x, scores, w_gate_up, w_down, b_gate_up, b_down }
    }

    /// What both passes read.
    pub fn inputs(&self, isa: Isa, threads: usize) -> ExpertsInputs {
        let Shape { tokens, hidden, inter, experts, top_k, activation, transposed, interleaved } = self.shape;
        ExpertsInputs {
            isa,
            threads,
            dtype: self.dtype,
            tokens,
            hidden,
            inter,
            experts,
            top_k,
            activation: Activation::ALL[usize::from(activation)],
            transposed,
            interleaved,
            x: self.x.ptr(),
            scores: address(&self.scores),
            order: self.routing.order.as_ptr(),
            inverse: self.routing.inverse.as_ptr(),
            offsets: self.routing.offsets.as_ptr(),
            w_gate_up: self.w_gate_up.ptr(),
            w_down: self.w_down.ptr(),
            b_gate_up: address(&self.b_gate_up),
            b_down: address(&self.b_down),
        }
    }

    /// The same values in double precision.
    pub fn operands(&self) -> Operands {
        let values = |t: &Option<Tensor>| t.as_ref().map_or(vec![], Tensor::values);
        Operands {
            x: self.x.values(),
            scores: self.scores.as_ref().map_or(vec![1.0; self.routing.order.len()], Tensor::values),
            w_gate_up: self.w_gate_up.values(),
            w_down: self.w_down.values(),
            b_gate_up: values(&self.b_gate_up),
            b_down: values(&self.b_down),
        }
    }
}

/// Pre-activations of every row, [rows, width]; rows past the experts stay zero.
pub fn pre_activations(shape: &Shape, op: &Operands, order: &[i32], offsets: &[i32]) -> Vec<f64> {
    let (h, g) = (shape.hidden, shape.width());
    let mut pre = vec![0.0; order.len() * g];
    for e in 0..shape.experts {
        for row in offsets[e] as usize..offsets[e + 1] as usize {
            let x = &op.x[order[row] as usize / shape.top_k * h..][..h];
            for f in 0..g {
                let dot: f64 = (0..h).map(|j| x[j] * op.w_gate_up[shape.gate_up_at(e, f, j)]).sum();
                pre[row * g + f] = dot + op.b_gate_up.get(e * g + f).unwrap_or(&0.0);
            }
        }
    }
    pre
}

/// The layer's output from its pre-activations, [tokens, hidden].
pub fn output(shape: &Shape, op: &Operands, pre: &[f64], order: &[i32], offsets: &[i32]) -> Vec<f64> {
    let (h, i, g) = (shape.hidden, shape.inter, shape.width());
    let mut out = vec![0.0; shape.tokens * h];
    for e in 0..shape.experts {
        for row in offsets[e] as usize..offsets[e + 1] as usize {
            let slot = order[row] as usize;
            let acts: Vec<f64> = (0..i)
                .map(|f| {
                    let (a, b) = shape.features(f);
                    activation(shape.activation, pre[row * g + a], pre[row * g + b]).0
                })
                .collect();
            for j in 0..h {
                let dot: f64 = (0..i).map(|f| acts[f] * op.w_down[shape.down_at(e, j, f)]).sum();
                let y = dot + op.b_down.get(e * h + j).unwrap_or(&0.0);
                out[slot / shape.top_k * h + j] += op.scores[slot] * y;
            }
        }
    }
    out
}

/// All gradients of <dout, output>.
pub struct Gradients {
    pub dx: Vec<f64>,
    pub dscores: Vec<f64>,
    pub dw_gate_up: Vec<f64>,
    pub dw_down: Vec<f64>,
    pub db_gate_up: Vec<f64>,
    pub db_down: Vec<f64>,
}

impl Gradients {
    /// In the order of the fields.
    pub fn list(&self) -> [&[f64]; 6] {
        [&self.dx, &self.dscores, &self.dw_gate_up, &self.dw_down, &self.db_gate_up, &self.db_down]
    }
}

/// Gradients from the pre-activations saved by the forward pass.
pub fn gradients(shape: &Shape, op: &Operands, pre: &[f64], dout: &[f64], order: &[i32], offsets: &[i32]) -> Gradients {
    let (h, i, g, e) = (shape.hidden, shape.inter, shape.width(), shape.experts);
    let mut grad = Gradients {
        dx: vec![0.0; shape.tokens * h],
        dscores: vec![0.0; order.len()],
        dw_gate_up: vec![0.0; e * g * h],
        dw_down: vec![0.0; e * h * i],
        db_gate_up: vec![0.0; e * g],
        db_down: vec![0.0; e * h],
    };
    for e in 0..shape.experts {
        for row in offsets[e] as usize..offsets[e + 1] as usize {
            let slot = order[row] as usize;
            let (token, score) = (slot / shape.top_k, op.scores[slot]);
            let (dy, x) = (&dout[token * h..][..h], &op.x[token * h..][..h]);
            for j in 0..h {
                grad.dscores[slot] += dy[j] * op.b_down.get(e * h + j).unwrap_or(&0.0);
                grad.db_down[e * h + j] += score * dy[j];
            }
            for f in 0..i {
                let (a, b) = shape.features(f);
                let (value, slope_gate, slope_up) = activation(shape.activation, pre[row * g + a], pre[row * g + b]);
                let da: f64 = (0..h).map(|j| dy[j] * op.w_down[shape.down_at(e, j, f)]).sum();
                grad.dscores[slot] += da * value;
                for j in 0..h {
                    grad.dw_down[shape.down_at(e, j, f)] += score * value * dy[j];
                }
                let branches = [(a, slope_gate), (b, slope_up)];
                for &(feature, slope) in &branches[..if shape.gated() { 2 } else { 1 }] {
                    let dh = score * da * slope;
                    grad.db_gate_up[e * g + feature] += dh;
                    for j in 0..h {
                        grad.dw_gate_up[shape.gate_up_at(e, feature, j)] += dh * x[j];
                        grad.dx[token * h + j] += dh * op.w_gate_up[shape.gate_up_at(e, feature, j)];
                    }
                }
            }
        }
    }
    grad
}
