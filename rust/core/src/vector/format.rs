//! How an operand lies in memory and how its panels are multiplied.

use super::simd::{Narrow, Simd};

/// The kinds of [`Format`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// fp32 in memory and in panels.
    F32,
    /// bf16 in memory, fp32 in panels.
    Bf16,
    /// fp16 in memory, fp32 in panels.
    F16,
    /// bf16 in memory; panels of words holding two values adjacent in k, for `Simd::dot_pairs`.
    Bf16Pairs,
}

/// A [`Kind`] as a type, so that kernels branch on it at compile time.
pub trait Format: Copy + Send + Sync + 'static {
    const KIND: Kind;
    /// Bytes of an element in memory.
    const BYTES: usize;

    /// Elements of k that a 32-bit word of a panel holds.
    const PER_WORD: usize = if matches!(Self::KIND, Kind::Bf16Pairs) { 2 } else { 1 };

    /// Words of a panel along k.
    fn words(k: usize) -> usize {
        k.div_ceil(Self::PER_WORD)
    }

    /// Eight words of a panel from consecutive elements.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn load_words<S: Narrow>(p: *const u8) -> S::V {
        // SAFETY: the caller's: eight elements, of four bytes or two.
        unsafe {
            match Self::KIND {
                Kind::F32 | Kind::Bf16Pairs => S::load(p.cast()),
                Kind::Bf16 => S::load_bf16(p.cast()),
                Kind::F16 => S::load_f16(p.cast()),
            }
        }
    }

    /// `S::LANES` elements as fp32.
    ///
    /// # Safety
    /// The elements are readable.
    #[inline(always)]
    unsafe fn load_widened<S: Simd>(p: *const u8) -> S::V {
        // SAFETY: the caller's: `LANES` elements.
        unsafe {
            match Self::KIND {
                Kind::F32 => S::load(p.cast()),
                Kind::Bf16 | Kind::Bf16Pairs => S::load_bf16(p.cast()),
                Kind::F16 => S::load_f16(p.cast()),
            }
        }
    }

    /// Rounds `S::LANES` values to elements.
    ///
    /// # Safety
    /// The elements are writable.
    #[inline(always)]
    unsafe fn store_rounded<S: Simd>(p: *mut u8, a: S::V) {
        // SAFETY: the caller's: room for `LANES` elements.
        unsafe {
            match Self::KIND {
                Kind::F32 => S::store(p.cast(), a),
                Kind::Bf16 | Kind::Bf16Pairs => S::store_bf16(p.cast(), a),
                Kind::F16 => S::store_f16(p.cast(), a),
            }
        }
    }

    /// One element as fp32.
    ///
    /// # Safety
    /// The element is readable.
    #[inline(always)]
    unsafe fn load_one(p: *const u8) -> f32 {
        // SAFETY: the caller's: one element.
        unsafe {
            match Self::KIND {
                Kind::F32 => p.cast::<f32>().read_unaligned(),
                Kind::Bf16 | Kind::Bf16Pairs => f32::from_bits(u32::from(p.cast::<u16>().read_unaligned()) << 16),
                Kind::F16 => half::f16::from_bits(p.cast::<u16>().read_unaligned()).to_f32(),
            }
        }
    }

    /// One word of a panel whose `left` elements follow each other at `p`; beyond them zero.
    ///
    /// # Safety
    /// The elements are readable and there is at least one.
    #[inline(always)]
    unsafe fn load_word(p: *const u8, left: usize) -> f32 {
        // SAFETY: the caller's: one element, and a second one if `left` says so.
        unsafe {
            match Self::KIND {
                Kind::Bf16Pairs if left > 1 => p.cast::<f32>().read_unaligned(),
                Kind::Bf16Pairs => f32::from_bits(u32::from(p.cast::<u16>().read_unaligned())),
                _ => Self::load_one(p),
            }
        }
    }
}

macro_rules! formats {
    ($($name:ident $bytes:literal)*) => {$(
        #[doc = concat!("[`Kind::", stringify!($name), "`].")]
        #[derive(Clone, Copy)]
        pub struct $name;
        impl Format for $name {
            const KIND: Kind = Kind::$name;
            const BYTES: usize = $bytes;
        }
    )*};
}
formats!(F32 4 Bf16 2 F16 2 Bf16Pairs 2);
