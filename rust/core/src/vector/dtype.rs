//! Element types of tensors that cross the language border.

/// Floating-point element types. The discriminants are the codes Python passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum DType {
    /// IEEE single precision.
    F32 = 0,
    /// IEEE double precision.
    F64 = 1,
    /// bfloat16.
    Bf16 = 2,
    /// IEEE half precision.
    F16 = 3,
}

impl DType {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::F32, Self::F64, Self::Bf16, Self::F16];

    /// The type with this code, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|d| *d as u8 == code)
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Integer types of expert ids. The discriminants are the codes Python passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum IdType {
    /// Unsigned, 8 bits.
    U8 = 0,
    /// Unsigned, 16 bits.
    U16 = 1,
    /// Signed, 32 bits.
    I32 = 2,
    /// Signed, 64 bits.
    I64 = 3,
}

impl IdType {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::U8, Self::U16, Self::I32, Self::I64];

    /// The type with this code, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|d| *d as u8 == code)
    }
}
