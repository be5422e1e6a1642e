//! Ids of experts as small integers: what the planner's passes read in place of them.
//!
//! Ids are mostly `i64`. Narrowing and clamping them is work for vectors, done once; afterwards a slot's bucket is one
//! load, of a quarter of the bytes.

use crate::vector::isa::Isa;

/// An integer that names an expert.
pub trait Id: Copy + Send + Sync {
    /// The expert's index, or `experts` for every id that is not in `0..experts`.
    fn bucket(self, experts: u32) -> u32;
}

macro_rules! ids {
    ($($id:ty, $unsigned:ty);*) => {$(
        impl Id for $id {
            #[inline(always)]
            fn bucket(self, experts: u32) -> u32 {
                // A negative id becomes a huge one. With at most i32::MAX experts this holds at every width.
                u32::from(self as $unsigned).min(experts)
            }
        }
    )*};
}
ids!(u8, u8; u16, u16; i32, u32);

impl Id for i64 {
    #[inline(always)]
    fn bucket(self, experts: u32) -> u32 {
        // Two compares of 32 bits instead of one of 64, which AVX2 has for signed numbers only.
        let (low, high) = (self as u32, (self >> 32) as u32);
        if high == 0 { low.min(experts) } else { experts }
    }
}

/// How a bucket is stored between the passes.
pub trait Bucket: Copy {
    /// The bucket of this index, which must fit.
    fn new(index: u32) -> Self;
    /// Its index.
    fn index(self) -> usize;
}

impl Bucket for u16 {
    #[inline(always)]
    fn new(index: u32) -> Self {
        index as u16
    }

    #[inline(always)]
    fn index(self) -> usize {
        self.into()
    }
}

impl Bucket for u32 {
    #[inline(always)]
    fn new(index: u32) -> Self {
        index
    }

    #[inline(always)]
    fn index(self) -> usize {
        self as usize
    }
}

/// Writes the bucket of every id.
///
/// # Safety
/// `buckets` has room for as many as there are ids; its elements may lie at any address. `isa` is available.
pub unsafe fn narrow<I: Id, B: Bucket>(isa: Isa, ids: &[I], experts: u32, buckets: *mut B) {
    // SAFETY: the caller's.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 => narrow_avx512(ids, experts, buckets),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => narrow_avx2(ids, experts, buckets),
            _ => narrow_with_any(ids, experts, buckets),
        }
    }
}

// The compiler makes vectors of the loop, of the instructions each copy of it may use.

#[inline(always)]
unsafe fn narrow_with_any<I: Id, B: Bucket>(ids: &[I], experts: u32, buckets: *mut B) {
    for (i, id) in ids.iter().enumerate() {
        // SAFETY: the caller's: there is room for a bucket of every id.
        unsafe { buckets.add(i).write_unaligned(B::new(id.bucket(experts))) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn narrow_avx2<I: Id, B: Bucket>(ids: &[I], experts: u32, buckets: *mut B) {
    // SAFETY: the caller's.
    unsafe { narrow_with_any(ids, experts, buckets) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
unsafe fn narrow_avx512<I: Id, B: Bucket>(ids: &[I], experts: u32, buckets: *mut B) {
    // SAFETY: the caller's.
    unsafe { narrow_with_any(ids, experts, buckets) }
}
