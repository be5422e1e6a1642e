//! The activations between the two projections, on fp32 values.

use crate::vector::math::{erf, sigmoid};
use crate::vector::simd::{Kernel, Simd};

/// The limit of gpt-oss' clamps.
pub const OAI_LIMIT: f32 = 7.0;
/// The slope inside gpt-oss' sigmoid.
pub const OAI_ALPHA: f32 = 1.702;
/// sqrt(2 / pi) of the tanh form of GELU.
pub const GELU_SCALE: f32 = 0.797_884_6;
/// The cubic coefficient of the tanh form of GELU.
pub const GELU_CUBIC: f32 = 0.044_715;

/// The discriminants are the codes Python passes; those below 5 multiply by a second projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Activation {
    /// silu(g) u.
    Swiglu = 0,
    /// gelu(g) u, exact.
    Geglu = 1,
    /// gelu(g) u, tanh form.
    GegluTanh = 2,
    /// relu(g) u.
    Reglu = 3,
    /// gpt-oss: with g = min(g, 7), u = clamp(u, -7, 7): g sigmoid(1.702 g) (u + 1).
    SwigluOai = 4,
    /// g sigmoid(g).
    Silu = 5,
    /// Exact GELU.
    Gelu = 6,
    /// GELU, tanh form.
    GeluTanh = 7,
    /// max(g, 0).
    Relu = 8,
    /// max(g, 0)^2.
    Relu2 = 9,
}

impl Activation {
    /// All activations, in the order of their codes.
    pub const ALL: [Self; 10] = [
        Self::Swiglu,
        Self::Geglu,
        Self::GegluTanh,
        Self::Reglu,
        Self::SwigluOai,
        Self::Silu,
        Self::Gelu,
        Self::GeluTanh,
        Self::Relu,
        Self::Relu2,
    ];

    /// The name that Python knows it by.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Swiglu => "swiglu",
            Self::Geglu => "geglu",
            Self::GegluTanh => "geglu_tanh",
            Self::Reglu => "reglu",
            Self::SwigluOai => "swiglu_oai",
            Self::Silu => "silu",
            Self::Gelu => "gelu",
            Self::GeluTanh => "gelu_tanh",
            Self::Relu => "relu",
            Self::Relu2 => "relu2",
        }
    }

    /// Whether it multiplies a gate by an up projection.
    pub const fn gated(self) -> bool {
        (self as u8) < Self::Silu as u8
    }

    /// Columns of the first projection for one column of the second.
    pub const fn columns(self) -> usize {
        if self.gated() { 2 } else { 1 }
    }
}

/// Applies an activation to `rows` rows of `width` values, in vectors: up to a vector minus one value behind
/// each row is read and written too.
///
/// `out` may be `gate`. It may also overlap the inputs as long as `out_stride <= in_stride` and no row is
/// written before it is read.
pub struct Activate {
    pub activation: Activation,
    pub rows: usize,
    pub width: usize,
    pub gate: *const f32,
    /// Ignored unless the activation is gated.
    pub up: *const f32,
    /// Values from one row of the inputs to the next.
    pub in_stride: usize,
    pub out: *mut f32,
    /// Values from one row of `out` to the next.
    pub out_stride: usize,
}

macro_rules! each_vector {
    ($task:ident, $S:ident, |$g:ident| $value:expr) => {
        for row in 0..$task.rows {
            let gate = $task.gate.add(row * $task.in_stride);
            let out = $task.out.add(row * $task.out_stride);
            let mut i = 0;
            while i < $task.width {
                let $g = $S::load(gate.add(i));
                $S::store(out.add(i), $value);
                i += $S::LANES;
            }
        }
    };
    ($task:ident, $S:ident, |$g:ident, $u:ident| $value:expr) => {
        for row in 0..$task.rows {
            let gate = $task.gate.add(row * $task.in_stride);
            let up = $task.up.add(row * $task.in_stride);
            let out = $task.out.add(row * $task.out_stride);
            let mut i = 0;
            while i < $task.width {
                let $g = $S::load(gate.add(i));
                let $u = $S::load(up.add(i));
                $S::store(out.add(i), $value);
                i += $S::LANES;
            }
        }
    };
}

impl Kernel for Activate {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: rows of `width` values may be read and written up to a whole vector, as the fields say.
        unsafe {
            match self.activation {
                Activation::Swiglu => each_vector!(self, S, |g, u| S::mul(silu::<S>(g), u)),
                Activation::Geglu => each_vector!(self, S, |g, u| S::mul(gelu::<S>(g), u)),
                Activation::GegluTanh => each_vector!(self, S, |g, u| S::mul(gelu_tanh::<S>(g), u)),
                Activation::Reglu => each_vector!(self, S, |g, u| S::mul(S::max(S::zero(), g), u)),
                Activation::SwigluOai => each_vector!(self, S, |g, u| swiglu_oai::<S>(g, u)),
                Activation::Silu => each_vector!(self, S, |g| silu::<S>(g)),
                Activation::Gelu => each_vector!(self, S, |g| gelu::<S>(g)),
                Activation::GeluTanh => each_vector!(self, S, |g| gelu_tanh::<S>(g)),
                Activation::Relu => each_vector!(self, S, |g| S::max(S::zero(), g)),
                Activation::Relu2 => each_vector!(self, S, |g| square_of_positive::<S>(g)),
            }
        }
    }
}

/// What is multiplied by a factor that falls to zero on the left: this saturates before it is zero (`exp` at e^88, `erf`
/// a rounding short of -1), so from there on the argument must not grow. NaN stays NaN.
#[inline(always)]
pub(crate) unsafe fn tail<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe { S::max(S::splat(-100.0), x) }
}

#[inline(always)]
unsafe fn silu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe { S::mul(tail::<S>(x), sigmoid::<S>(x)) }
}

#[inline(always)]
unsafe fn gelu<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let cdf = S::add(S::splat(1.0), erf::<S>(S::mul(x, S::splat(std::f32::consts::FRAC_1_SQRT_2))));
        S::mul(S::mul(S::splat(0.5), tail::<S>(x)), cdf)
    }
}

/// (1 + tanh z) / 2 is sigmoid(2 z).
#[inline(always)]
unsafe fn gelu_tanh<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let cubic = S::fma(S::mul(x, x), S::splat(GELU_CUBIC), S::splat(1.0));
        let z2 = S::mul(S::mul(x, cubic), S::splat(2.0 * GELU_SCALE));
        S::mul(tail::<S>(x), sigmoid::<S>(z2))
    }
}

#[inline(always)]
unsafe fn swiglu_oai<S: Simd>(g: S::V, u: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let g = S::min(S::splat(OAI_LIMIT), g);
        let u = S::max(S::splat(-OAI_LIMIT), S::min(S::splat(OAI_LIMIT), u));
        let gate = S::mul(tail::<S>(g), sigmoid::<S>(S::mul(g, S::splat(OAI_ALPHA))));
        S::mul(S::add(u, S::splat(1.0)), gate)
    }
}

#[inline(always)]
unsafe fn square_of_positive<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let positive = S::max(S::zero(), x);
        S::mul(positive, positive)
    }
}
