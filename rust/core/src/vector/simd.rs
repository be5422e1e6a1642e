//! What the kernels need from a vector unit, as a trait with one implementation for each instruction set.
//!
//! A kernel is a plain struct holding its arguments and implementing [`Kernel`]; its `run` is generic over
//! [`Simd`] and always inlined. [`Simd::enter`] wraps it in a function compiled with the instruction set's
//! target features, so every kernel becomes one out-of-line function an instruction set, and the code around
//! the kernels stays ordinary Rust. `run` must not use closures: they would not inherit the features.
//!
//! That the CPU supports `S` is the contract of every kernel and of every function of vectors: where they say why they are
//! safe, they speak of memory alone.

/// Work to be compiled for an instruction set.
pub trait Kernel {
    /// What `run` returns.
    type Output;

    /// Does the work. Implementations are `#[inline(always)]`.
    ///
    /// # Safety
    /// The CPU supports `S`, and the kernel's own requirements hold.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// Vectors of `LANES` fp32 values, or of `LANES` 32-bit words each holding two bf16 values.
///
/// # Safety
/// All methods require that the CPU supports the instruction set, and those taking pointers that the
/// `LANES` elements behind them may be read or written. No alignment is required except for `stream*`.
pub trait Simd: Copy + Send + Sync + 'static {
    /// A vector.
    type V: Copy;
    /// Vectors of eight lanes in the same instruction set.
    type Narrow: Narrow<Narrow = Self::Narrow>;
    /// 32-bit lanes of a vector.
    const LANES: usize;

    /// Whether columns of bf16 are cheaper to take apart, and to put together again, as even and odd ones: where
    /// rounding takes several instructions and the instruction set moves halves of vectors with further ones.
    const SPLITS: bool = false;

    /// Runs `kernel` compiled for this instruction set.
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output;

    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn store(p: *mut f32, a: Self::V);
    /// Non-temporal store; `p` is aligned to the vector. `fence` must follow before other threads read.
    unsafe fn stream(p: *mut f32, a: Self::V);
    /// Rounds to nearest even.
    unsafe fn store_bf16(p: *mut u16, a: Self::V);
    /// Rounds to nearest even.
    unsafe fn store_f16(p: *mut u16, a: Self::V);
    /// `LANES` values of `a`, then `LANES` of `b`.
    unsafe fn store_bf16_pair(p: *mut u16, a: Self::V, b: Self::V);
    /// The same without passing through the caches; `p` is aligned to the vector.
    unsafe fn stream_bf16_pair(p: *mut u16, a: Self::V, b: Self::V);

    /// `even` and `odd` values in turns, rounded to nearest even. Only if [`Simd::SPLITS`]. A NaN must be one of a sum of
    /// products of bf16 values: its payload has no bits that would be rounded.
    unsafe fn store_bf16_split(p: *mut u16, even: Self::V, odd: Self::V) {
        _ = (p, even, odd);
        unreachable!("no use is made of it")
    }
    /// The same without passing through the caches; `p` is aligned to the vector.
    unsafe fn stream_bf16_split(p: *mut u16, even: Self::V, odd: Self::V) {
        _ = (p, even, odd);
        unreachable!("no use is made of it")
    }

    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn splat_bits(x: u32) -> Self::V;
    /// `a * b + c`.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one, `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger one, `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `a * 2^n` for integral `n` in -126..=127.
    unsafe fn scale_by_power_of_two(a: Self::V, n: Self::V) -> Self::V;
    /// `x` in the lanes where `a < b`, else `y`.
    unsafe fn select_less(a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;

    /// The first bf16 of each word, as fp32.
    unsafe fn widen_even(a: Self::V) -> Self::V;
    /// The second bf16 of each word, as fp32.
    unsafe fn widen_odd(a: Self::V) -> Self::V;
    /// `acc + a.even * b.even + a.odd * b.odd`, the operands being words of two bf16.
    #[inline(always)]
    unsafe fn dot_pairs(acc: Self::V, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: no memory is touched.
        unsafe {
            let even = Self::fma(Self::widen_even(a), Self::widen_even(b), acc);
            Self::fma(Self::widen_odd(a), Self::widen_odd(b), even)
        }
    }
    /// From `2 * LANES` bf16 of each of two rows, words `(a[i], b[i])`: two vectors whose words are in an order
    /// that `deinterleave` undoes on the accumulators.
    unsafe fn interleave(a: Self::V, b: Self::V) -> (Self::V, Self::V);
    /// Puts the lanes of two accumulators of `interleave`d words into the order of the columns.
    unsafe fn deinterleave(a: Self::V, b: Self::V) -> (Self::V, Self::V);

    /// Eight lanes, each the sum of the lanes equal to it modulo eight.
    unsafe fn fold(a: Self::V) -> <Self::Narrow as Simd>::V;
}

/// Vectors of exactly eight lanes.
///
/// # Safety
/// As for [`Simd`].
pub trait Narrow: Simd {
    /// Transposes an 8 x 8 block.
    unsafe fn transpose(rows: &mut [Self::V; 8]);
    /// Lane `i` of the result is the sum over the lanes of vector `i`.
    unsafe fn sum_each(a: [Self::V; 8]) -> Self::V;
}

/// Methods of [`Simd`] and [`Narrow`] that are made of an instruction set's intrinsics.
#[cfg(target_arch = "x86_64")]
macro_rules! intrinsics {
    ($(fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? $body:block)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $type),*) $(-> $out)? {
            // SAFETY: the trait's contract: the CPU has the instruction set, memory at an address may be read or written.
            // Vectors that change their type are the same bits, and every bit pattern is one.
            unsafe { $body }
        }
    )*};
}
#[cfg(target_arch = "x86_64")]
pub(super) use intrinsics;

/// Asks for the cache line at `p` in the second-level cache. Any address is allowed.
///
/// Not the first level: weight rows lie 2, 4 or 8 KiB apart, so eight of them already fill all ways of one of
/// its sets, and prefetching there evicts lines that are still being read.
#[inline(always)]
pub fn prefetch<T>(p: *const T) {
    // SAFETY: a hint: any address will do, and nothing is read.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Orders non-temporal stores before what follows.
#[inline(always)]
pub fn fence() {
    // SAFETY: SSE is part of the architecture.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
