//! The way back through the activation, on a block of `dout * w_down` that is still in the cache.
//!
//! With `g` the gradient of a row's activations before its routing score `s` is applied, and `A` its
//! activations, recomputed from the saved pre-activations: `dscore = <g, A>`, `dH = J^T (s g)`, `A' = s A`.
//! None of `g` goes to memory.

use crate::gemm::activation::{Activation, GELU_CUBIC, GELU_SCALE, OAI_ALPHA, OAI_LIMIT, tail};
use crate::gemm::nn::pass::{COLUMN_BLOCK, Finish, FinishedSums};
use crate::vector::format::Format;
use crate::vector::math::{erf, exp, sigmoid};
use crate::vector::round::{load_values_up_to, round_row, widen_row};
use crate::vector::simd::{Kernel, Narrow, Simd};
use std::marker::PhantomData;

/// What the backward pass makes of the gradient of the activations. Absent results are null.
pub struct HiddenGradient<F> {
    pub activation: Activation,
    /// Whether gate and up features alternate in `pre` and `hidden`.
    pub interleaved: bool,
    /// Columns of the activations.
    pub inter: usize,
    /// Rows of the plan, sentinels included.
    pub slots: usize,
    /// `[slots, inter]`, twice as wide if gated.
    pub pre: *const u8,
    /// Row to slot.
    pub order: *const i32,
    /// A score for each slot; null: all are one.
    pub scores: *const f32,
    /// `dH`, shaped as `pre`.
    pub hidden: *mut u8,
    /// `A'`, `[slots, inter]`.
    pub scaled: *mut u8,
    /// Each column block's share of `dscore`, `[inter / COLUMN_BLOCK, slots]`, so that the sum over the blocks has
    /// one order however the work was cut.
    pub shares: *mut f32,
    pub format: PhantomData<F>,
}

// SAFETY: blocks write disjoint parts.
unsafe impl<F> Sync for HiddenGradient<F> {}

impl<F: Format> Finish for HiddenGradient<F> {
    unsafe fn finish<S: Simd>(&self, sums: &FinishedSums) {
        // SAFETY: the sums are those of the GEMM that this was made for, so columns from `column` on are theirs too.
        unsafe {
            for column in (0..sums.columns).step_by(COLUMN_BLOCK) {
                let part = FinishedSums {
                    column: sums.column + column,
                    columns: COLUMN_BLOCK.min(sums.columns - column),
                    values: sums.values.add(column),
                    ..*sums
                };
                S::enter(Differentiate { of: self, sums: part });
            }
        }
    }
}

impl<F> HiddenGradient<F> {
    /// The score of a row.
    unsafe fn score(&self, row: usize) -> f32 {
        // SAFETY: the caller's row is one of the plan, and its slot has a score.
        unsafe { if self.scores.is_null() { 1.0 } else { *self.scores.add(*self.order.add(row) as usize) } }
    }
}

/// [`HiddenGradient::finish`] for at most [`COLUMN_BLOCK`] columns.
struct Differentiate<'a, F> {
    of: &'a HiddenGradient<F>,
    sums: FinishedSums,
}

/// fp32 values of one row of a block.
struct Row {
    /// The gate's pre-activations, then their gradients.
    gate: [f32; COLUMN_BLOCK],
    /// The same for the up projection.
    up: [f32; COLUMN_BLOCK],
    /// The scaled activations.
    scaled: [f32; COLUMN_BLOCK],
}

impl<F: Format> Kernel for Differentiate<'_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: rows and columns are those of the finished sums, so `pre` and the wanted results have them. A
        // row's arrays hold `COLUMN_BLOCK` values, whole vectors and no fewer than the columns.
        unsafe {
            let Self { of, sums } = &self;
            let (gated, n) = (of.activation.gated(), sums.columns);
            let width = of.inter * of.activation.columns();
            let mut row = Row { gate: [0.0; COLUMN_BLOCK], up: [0.0; COLUMN_BLOCK], scaled: [0.0; COLUMN_BLOCK] };
            let mut mixed = [0f32; 2 * COLUMN_BLOCK];
            let alternate = gated && of.interleaved;
            for r in 0..sums.rows {
                let index = sums.row + r;
                // Where this block's features start in a row of `pre`, and the up features if they are apart.
                let first = (index * width + if alternate { 2 * sums.column } else { sums.column }) * F::BYTES;
                let second = first + of.inter * F::BYTES;
                let pre = of.pre.add(first);
                if alternate {
                    widen_row::<S, F>(pre, mixed.as_mut_ptr(), 2 * n);
                    for i in 0..n {
                        row.gate[i] = mixed[2 * i];
                        row.up[i] = mixed[2 * i + 1];
                    }
                } else {
                    widen_row::<S, F>(pre, row.gate.as_mut_ptr(), n);
                    if gated {
                        widen_row::<S, F>(of.pre.add(second), row.up.as_mut_ptr(), n);
                    }
                }
                let share = row.differentiate::<S>(of.activation, of.score(index), sums.values.add(r * sums.stride), n);
                if !of.shares.is_null() {
                    *of.shares.add(sums.column / COLUMN_BLOCK * of.slots + index) = share;
                }
                if !of.scaled.is_null() {
                    let to = of.scaled.add((index * of.inter + sums.column) * F::BYTES);
                    round_row::<S, F>(row.scaled.as_ptr(), to, n);
                }
                if of.hidden.is_null() {
                    continue;
                }
                if alternate {
                    for i in 0..n {
                        mixed[2 * i] = row.gate[i];
                        mixed[2 * i + 1] = row.up[i];
                    }
                    round_row::<S, F>(mixed.as_ptr(), of.hidden.add(first), 2 * n);
                } else {
                    round_row::<S, F>(row.gate.as_ptr(), of.hidden.add(first), n);
                    if gated {
                        round_row::<S, F>(row.up.as_ptr(), of.hidden.add(second), n);
                    }
                }
            }
        }
    }
}

impl Row {
    /// From pre-activations to gradients in place, for the gradient `g` of `n` activations. Returns `<g, A>`.
    #[inline(always)]
    unsafe fn differentiate<S: Simd>(&mut self, activation: Activation, score: f32, g: *const f32, n: usize) -> f32 {
        // SAFETY: `n` is at most `COLUMN_BLOCK`, a multiple of `LANES`, and `g` has `n` values.
        unsafe {
            let s = S::splat(score);
            let mut share = S::zero();
            macro_rules! each_vector {
                ($function:ident, $gated:literal) => {{
                    let mut i = 0;
                    while i < n {
                        let grad = load_values_up_to::<S>(g.add(i), n - i);
                        let (gate, up) = (S::load(self.gate.as_ptr().add(i)), S::load(self.up.as_ptr().add(i)));
                        let (value, slope_gate, slope_up) = $function::<S>(gate, up);
                        let scaled_grad = S::mul(s, grad);
                        share = S::fma(grad, value, share);
                        S::store(self.scaled.as_mut_ptr().add(i), S::mul(s, value));
                        S::store(self.gate.as_mut_ptr().add(i), S::mul(scaled_grad, slope_gate));
                        if $gated {
                            S::store(self.up.as_mut_ptr().add(i), S::mul(scaled_grad, slope_up));
                        }
                        i += S::LANES;
                    }
                }};
            }
            match activation {
                Activation::Swiglu => each_vector!(swiglu, true),
                Activation::Geglu => each_vector!(geglu, true),
                Activation::GegluTanh => each_vector!(geglu_tanh, true),
                Activation::Reglu => each_vector!(reglu, true),
                Activation::SwigluOai => each_vector!(swiglu_oai, true),
                Activation::Silu => each_vector!(silu, false),
                Activation::Gelu => each_vector!(gelu, false),
                Activation::GeluTanh => each_vector!(gelu_tanh, false),
                Activation::Relu => each_vector!(relu, false),
                Activation::Relu2 => each_vector!(relu2, false),
            }
            let mut lanes = [<S::Narrow as Simd>::zero(); 8];
            lanes[0] = S::fold(share);
            let mut sums = [0f32; 8];
            <S::Narrow as Simd>::store(sums.as_mut_ptr(), S::Narrow::sum_each(lanes));
            sums[0]
        }
    }
}

/// An activation's value and its derivatives by gate and by up.
type Derived<V> = (V, V, V);

/// `slope(x) * up` and so on, from a function of the gate and its slope.
#[inline(always)]
unsafe fn times_up<S: Simd>((value, slope, _): Derived<S::V>, up: S::V) -> Derived<S::V> {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe { (S::mul(value, up), S::mul(slope, up), value) }
}

macro_rules! gated {
    ($($name:ident = $plain:ident)*) => {$(
        #[inline(always)]
        unsafe fn $name<S: Simd>(gate: S::V, up: S::V) -> Derived<S::V> {
            // SAFETY: the CPU supports `S`; no memory is touched.
            unsafe {
            times_up::<S>($plain::<S>(gate, up), up)
            }
        }
    )*};
}
gated!(swiglu = silu geglu = gelu geglu_tanh = gelu_tanh reglu = relu);

/// The argument, bounded where the slopes of both GELUs have long been 0 and 1: its powers would overflow. NaN stays NaN.
#[inline(always)]
unsafe fn bounded<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe { S::min(S::splat(100.0), tail::<S>(x)) }
}

#[inline(always)]
unsafe fn silu<S: Simd>(x: S::V, _: S::V) -> Derived<S::V> {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let q = sigmoid::<S>(x);
        let value = S::mul(tail::<S>(x), q);
        // q (1 + x (1 - q)) = q + value (1 - q)
        (value, S::fma(value, S::sub(S::splat(1.0), q), q), S::zero())
    }
}

#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::V, _: S::V) -> Derived<S::V> {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        const DENSITY_AT_ZERO: f32 = 0.398_942_3;
        let root = S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let cdf = S::mul(S::splat(0.5), S::add(S::splat(1.0), erf::<S>(root)));
        let exponent = S::sub(S::zero(), S::mul(root, root));
        let density = S::mul(S::splat(DENSITY_AT_ZERO), exp::<S>(exponent));
        (S::mul(tail::<S>(x), cdf), S::fma(bounded::<S>(x), density, cdf), S::zero())
    }
}

#[inline(always)]
unsafe fn gelu_tanh<S: Simd>(x: S::V, _: S::V) -> Derived<S::V> {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let near = bounded::<S>(x);
        let square = S::mul(near, near);
        let cubic = S::fma(square, S::splat(GELU_CUBIC), S::splat(1.0));
        // (1 + tanh z) / 2 is sigmoid(2 z).
        let q = sigmoid::<S>(S::mul(S::mul(near, cubic), S::splat(2.0 * GELU_SCALE)));
        let inner = S::fma(square, S::splat(6.0 * GELU_SCALE * GELU_CUBIC), S::splat(2.0 * GELU_SCALE));
        let slope = S::fma(S::mul(S::mul(near, q), S::sub(S::splat(1.0), q)), inner, q);
        (S::mul(tail::<S>(x), q), slope, S::zero())
    }
}

#[inline(always)]
unsafe fn relu<S: Simd>(x: S::V, _: S::V) -> Derived<S::V> {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe { (S::max(S::zero(), x), S::select_less(S::zero(), x, S::splat(1.0), S::zero()), S::zero()) }
}

#[inline(always)]
unsafe fn relu2<S: Simd>(x: S::V, _: S::V) -> Derived<S::V> {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let positive = S::max(S::zero(), x);
        (S::mul(positive, positive), S::add(positive, positive), S::zero())
    }
}

/// Clamped inputs have no gradient, those on the limit included, as in torch from 2.14 on. NaN is not clamped.
#[inline(always)]
unsafe fn swiglu_oai<S: Simd>(gate: S::V, up: S::V) -> Derived<S::V> {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        const INSIDE: f32 = OAI_LIMIT.next_down(); // the largest value that is not clamped
        let (limit, floor) = (S::splat(OAI_LIMIT), S::splat(-OAI_LIMIT));
        let (inside, above) = (S::splat(INSIDE), S::splat(-INSIDE));
        let g = S::min(limit, gate);
        let u1 = S::add(S::max(floor, S::min(limit, up)), S::splat(1.0));
        let q = sigmoid::<S>(S::mul(g, S::splat(OAI_ALPHA)));
        let value = S::mul(tail::<S>(g), q);
        let slope = S::fma(S::mul(value, S::splat(OAI_ALPHA)), S::sub(S::splat(1.0), q), q);
        let slope_gate = S::select_less(inside, gate, S::zero(), S::mul(u1, slope));
        let slope_up = S::select_less(inside, up, S::zero(), S::select_less(up, above, S::zero(), value));
        (S::mul(u1, value), slope_gate, slope_up)
    }
}
