//! Random tensors of any element type, and fp64 arithmetic to compare with.
#![allow(dead_code, reason = "each test program uses a part")]

use half::{bf16, f16};
use moekern_core::gemm::Activation;
use moekern_core::vector::{DType, Isa};

/// A small reproducible generator (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// Roughly normal, variance 1.
    pub fn normal(&mut self) -> f64 {
        let sum: f64 = (0..6).map(|_| self.bits() as f64 / (1u64 << 53) as f64).sum();
        (sum - 3.0) * 2f64.sqrt()
    }
}

/// A tensor as bytes, with what those bytes mean.
#[derive(Clone)]
pub struct Tensor {
    pub dtype: DType,
    pub bytes: Vec<u8>,
}

impl Tensor {
    pub fn from_values(dtype: DType, values: impl IntoIterator<Item = f64>) -> Self {
        let mut bytes = Vec::new();
        for v in values {
            match dtype {
                DType::F32 => bytes.extend((v as f32).to_ne_bytes()),
                DType::F64 => bytes.extend(v.to_ne_bytes()),
                DType::Bf16 => bytes.extend(bf16::from_f64(v).to_bits().to_ne_bytes()),
                DType::F16 => bytes.extend(f16::from_f64(v).to_bits().to_ne_bytes()),
            }
        }
        Self { dtype, bytes }
    }

    pub fn normal(dtype: DType, count: usize, scale: f64, random: &mut Random) -> Self {
        Self::from_values(dtype, (0..count).map(|_| random.normal() * scale))
    }

    pub fn nan(dtype: DType, count: usize) -> Self {
        Self::from_values(dtype, (0..count).map(|_| f64::NAN))
    }

    pub fn values(&self) -> Vec<f64> {
        self.bytes
            .chunks_exact(self.dtype.size())
            .map(|b| match self.dtype {
                DType::F32 => f64::from(f32::from_ne_bytes(b.try_into().unwrap())),
                DType::F64 => f64::from_ne_bytes(b.try_into().unwrap()),
                DType::Bf16 => bf16::from_bits(u16::from_ne_bytes(b.try_into().unwrap())).to_f64(),
                DType::F16 => f16::from_bits(u16::from_ne_bytes(b.try_into().unwrap())).to_f64(),
            })
            .collect()
    }

    pub fn ptr(&self) -> *const u8 {
        self.bytes.as_ptr()
    }

    pub fn mut_ptr(&mut self) -> *mut u8 {
        self.bytes.as_mut_ptr()
    }
}

/// Levels this CPU runs.
pub fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

/// Running sums of counts, starting at 0.
pub fn offsets(counts: &[usize]) -> Vec<i32> {
    let mut offsets = vec![0];
    for &n in counts {
        offsets.push(offsets.last().unwrap() + n as i32);
    }
    offsets
}

/// Relative Frobenius error; NaN in either is an error of infinity.
pub fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut difference, mut norm) = (0.0, 0.0);
    for (g, w) in got.iter().zip(want) {
        difference += (g - w) * (g - w);
        norm += w * w;
    }
    if difference.is_nan() || norm.is_nan() {
        f64::INFINITY
    } else if norm == 0.0 {
        difference.sqrt()
    } else {
        (difference / norm).sqrt()
    }
}

/// The error that rounding the output to `dtype` and summing in fp32 may cause.
pub fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F32 | DType::F64 => 2e-6,
        DType::Bf16 => 2.2e-3,
        DType::F16 => 3e-4,
    }
}

fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x / 2f64.sqrt()))
}

fn gelu_tanh(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x)).tanh())
}

/// The definition of each activation.
pub fn activate(activation: Activation, g: f64, u: f64) -> f64 {
    match activation {
        Activation::Swiglu => g * sigmoid(g) * u,
        Activation::Geglu => gelu(g) * u,
        Activation::GegluTanh => gelu_tanh(g) * u,
        Activation::Reglu => g.max(0.0) * u,
        Activation::SwigluOai => {
            let (g, u) = (g.min(7.0), u.clamp(-7.0, 7.0));
            (u + 1.0) * g * sigmoid(1.702 * g)
        }
        Activation::Silu => g * sigmoid(g),
        Activation::Gelu => gelu(g),
        Activation::GeluTanh => gelu_tanh(g),
        Activation::Relu => g.max(0.0),
        Activation::Relu2 => g.max(0.0) * g.max(0.0),
    }
}

/// Columns of `pre` that output column `i` of `n` comes from.
pub fn gate_up(i: usize, n: usize, interleaved: bool) -> (usize, usize) {
    if interleaved { (2 * i, 2 * i + 1) } else { (i, n + i) }
}
