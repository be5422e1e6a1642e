//! Which instruction set the kernels use: the best the CPU has, or a lower one on request.

use std::fmt;
use std::sync::OnceLock;

/// The environment variable that forces a level.
pub const ISA_VARIABLE: &str = "MOEKERN_CPU_ISA";

/// Instruction sets in ascending order; each includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Portable Rust.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
    /// AVX-512 with bf16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// All levels, ascending.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// The name `MOEKERN_CPU_ISA` accepts.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
        }
    }

    /// Whether this CPU, under this operating system, runs the level.
    pub fn available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            let avx512 = avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq");
            match self {
                Self::Scalar => true,
                Self::Avx2 => avx2,
                Self::Avx512 => avx512,
                Self::Avx512Bf16 => avx512 && has!("avx512bf16"),
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Scalar
        }
    }

    /// The highest available level.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.available()).unwrap_or(Self::Scalar)
    }

    /// The level `request` names.
    pub fn parse(request: &str) -> Result<Self, IsaError> {
        let isa = Self::ALL
            .into_iter()
            .find(|isa| isa.name() == request)
            .ok_or_else(|| IsaError::Unknown(request.to_owned()))?;
        if isa.available() { Ok(isa) } else { Err(IsaError::Unavailable(isa)) }
    }

    /// The level used in this process: what `MOEKERN_CPU_ISA` says, else the best. Read once.
    pub fn current() -> Result<Self, IsaError> {
        static CURRENT: OnceLock<Result<Isa, IsaError>> = OnceLock::new();
        CURRENT
            .get_or_init(|| match std::env::var_os(ISA_VARIABLE) {
                Some(value) if !value.is_empty() => Self::parse(&value.to_string_lossy()),
                _ => Ok(Self::best()),
            })
            .clone()
    }
}

/// Why a requested instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum IsaError {
    /// Not a name of a level.
    Unknown(String),
    /// The CPU lacks it.
    Unavailable(Isa),
}

impl fmt::Display for IsaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown(name) => {
                write!(f, "{ISA_VARIABLE}={name}: unknown instruction set; accepted: scalar, avx2, avx512, avx512bf16")
            }
            Self::Unavailable(isa) => write!(
                f,
                "{ISA_VARIABLE}={}: this CPU does not have it; the best it has is {}",
                isa.name(),
                Isa::best().name()
            ),
        }
    }
}

impl std::error::Error for IsaError {}

/// Evaluates `$body` with the type `$S` bound to the fp32 vector unit of `$isa`.
macro_rules! with_simd {
    ($isa:expr, $S:ident => $body:expr) => {{
        use $crate::vector::{isa::Isa, scalar::Scalar};
        match $isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                type $S = $crate::vector::avx2::Avx2;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => {
                type $S = $crate::vector::avx512::Avx512;
                $body
            }
            _ => {
                type $S = Scalar;
                $body
            }
        }
    }};
}
pub(crate) use with_simd;

/// Evaluates `$body` with `$S` bound to a vector unit and `$F` to the format in which it multiplies operands of
/// type `$dtype`. Only bf16 has kernels of its own for `Avx512Bf16`; the other types share those of `Avx512`.
macro_rules! with_kernels {
    ($isa:expr, $dtype:expr, $S:ident, $F:ident => $body:expr) => {{
        use $crate::vector::dtype::DType;
        use $crate::vector::format;
        use $crate::vector::isa::{Isa, with_simd};
        match ($isa, $dtype) {
            #[cfg(target_arch = "x86_64")]
            (Isa::Avx512Bf16, DType::Bf16) => {
                type $S = $crate::vector::avx512::Avx512Bf16;
                type $F = format::Bf16Pairs;
                $body
            }
            (isa, dtype) => {
                let isa = isa.min(Isa::Avx512);
                match dtype {
                    DType::F32 => {
                        type $F = format::F32;
                        with_simd!(isa, $S => $body)
                    }
                    DType::Bf16 => {
                        type $F = format::Bf16;
                        with_simd!(isa, $S => $body)
                    }
                    DType::F16 => {
                        type $F = format::F16;
                        with_simd!(isa, $S => $body)
                    }
                    DType::F64 => unreachable!("fp64 is served by the reference"),
                }
            }
        }
    }};
}
pub(crate) use with_kernels;
