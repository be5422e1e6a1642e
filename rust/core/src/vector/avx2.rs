//! AVX2 with FMA and F16C: sixteen registers of eight lanes. Also the eight-lane half of AVX-512, which the
//! macro below completes with that instruction set's own features.

use super::simd::{Kernel, Narrow, Simd, intrinsics};
use std::arch::x86_64::*;

/// AVX2, FMA, F16C.
#[derive(Clone, Copy)]
pub struct Avx2;

/// Rounds fp32 to the upper sixteen bits, NaN to a quiet NaN.
#[inline(always)]
unsafe fn round_bf16(a: __m256) -> __m256i {
    // SAFETY: the caller's: the CPU has AVX2; no memory is touched.
    unsafe {
        let bits = _mm256_castps_si256(a);
        let rounded = _mm256_srli_epi32::<16>(add_half(bits));
        let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(a, a));
        _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan)
    }
}

#[inline(always)]
pub(super) unsafe fn store_bf16(p: *mut u16, a: __m256) {
    // SAFETY: the caller's: the CPU has AVX2, and there is room for eight values.
    unsafe {
        let r = round_bf16(a);
        let packed = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(r, r));
        _mm_storeu_si128(p.cast(), _mm256_castsi256_si128(packed));
    }
}

#[inline(always)]
pub(super) unsafe fn pack_bf16(a: __m256, b: __m256) -> __m256i {
    // SAFETY: the caller's: the CPU has AVX2; no memory is touched.
    unsafe { _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(round_bf16(a), round_bf16(b))) }
}

#[inline(always)]
pub(super) unsafe fn transpose(r: &mut [__m256; 8]) {
    // SAFETY: the caller's: the CPU has AVX2; no memory is touched.
    unsafe {
        let a = [
            _mm256_unpacklo_ps(r[0], r[1]),
            _mm256_unpackhi_ps(r[0], r[1]),
            _mm256_unpacklo_ps(r[2], r[3]),
            _mm256_unpackhi_ps(r[2], r[3]),
            _mm256_unpacklo_ps(r[4], r[5]),
            _mm256_unpackhi_ps(r[4], r[5]),
            _mm256_unpacklo_ps(r[6], r[7]),
            _mm256_unpackhi_ps(r[6], r[7]),
        ];
        let b = [
            _mm256_shuffle_ps::<0x44>(a[0], a[2]),
            _mm256_shuffle_ps::<0xee>(a[0], a[2]),
            _mm256_shuffle_ps::<0x44>(a[1], a[3]),
            _mm256_shuffle_ps::<0xee>(a[1], a[3]),
            _mm256_shuffle_ps::<0x44>(a[4], a[6]),
            _mm256_shuffle_ps::<0xee>(a[4], a[6]),
            _mm256_shuffle_ps::<0x44>(a[5], a[7]),
            _mm256_shuffle_ps::<0xee>(a[5], a[7]),
        ];
        *r = [
            _mm256_permute2f128_ps::<0x20>(b[0], b[4]),
            _mm256_permute2f128_ps::<0x20>(b[1], b[5]),
            _mm256_permute2f128_ps::<0x20>(b[2], b[6]),
            _mm256_permute2f128_ps::<0x20>(b[3], b[7]),
            _mm256_permute2f128_ps::<0x31>(b[0], b[4]),
            _mm256_permute2f128_ps::<0x31>(b[1], b[5]),
            _mm256_permute2f128_ps::<0x31>(b[2], b[6]),
            _mm256_permute2f128_ps::<0x31>(b[3], b[7]),
        ];
    }
}

/// Seven horizontal additions for eight sums.
#[inline(always)]
pub(super) unsafe fn sum_each(a: [__m256; 8]) -> __m256 {
    // SAFETY: the caller's: the CPU has AVX2; no memory is touched.
    unsafe {
        let low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
        let high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
        _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
    }
}

/// `impl Simd` and `impl Narrow` on 256-bit registers for `$name`, compiled with `$features`. The bracket holds
/// the methods that differ between instruction sets.
macro_rules! simd_256 {
    ($name:ident, $features:literal, { $($special:tt)* }) => {
        impl Simd for $name {
            type V = __m256;
            type Narrow = Self;
            const LANES: usize = 8;

            #[inline(always)]
            unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
                #[target_feature(enable = $features)]
                #[inline(never)]
                unsafe fn featured<K: Kernel>(kernel: K) -> K::Output {
                    // SAFETY: the caller's: the CPU has the features, and the kernel's own requirements hold.
                    unsafe { kernel.run::<$name>() }
                }
                // SAFETY: as above.
                unsafe { featured(kernel) }
            }

            $($special)*

            intrinsics! {
                fn load(p: *const f32) -> __m256 {
                    _mm256_loadu_ps(p)
                }
                fn load_bf16(p: *const u16) -> __m256 {
                    let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
                }
                fn load_f16(p: *const u16) -> __m256 {
                    _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
                }
                fn store(p: *mut f32, a: __m256) {
                    _mm256_storeu_ps(p, a)
                }
                fn stream(p: *mut f32, a: __m256) {
                    _mm256_stream_ps(p, a)
                }
                fn store_f16(p: *mut u16, a: __m256) {
                    _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a))
                }
                fn stream_bf16_pair(p: *mut u16, a: __m256, b: __m256) {
                    _mm256_stream_si256(p.cast(), $crate::vector::avx2::pack_bf16(a, b))
                }
                fn store_bf16_pair(p: *mut u16, a: __m256, b: __m256) {
                    _mm256_storeu_si256(p.cast(), $crate::vector::avx2::pack_bf16(a, b))
                }
                fn zero() -> __m256 {
                    _mm256_setzero_ps()
                }
                fn splat(x: f32) -> __m256 {
                    _mm256_set1_ps(x)
                }
                fn splat_bits(x: u32) -> __m256 {
                    _mm256_castsi256_ps(_mm256_set1_epi32(x as i32))
                }
                fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
                    _mm256_fmadd_ps(a, b, c)
                }
                fn add(a: __m256, b: __m256) -> __m256 {
                    _mm256_add_ps(a, b)
                }
                fn sub(a: __m256, b: __m256) -> __m256 {
                    _mm256_sub_ps(a, b)
                }
                fn mul(a: __m256, b: __m256) -> __m256 {
                    _mm256_mul_ps(a, b)
                }
                fn div(a: __m256, b: __m256) -> __m256 {
                    _mm256_div_ps(a, b)
                }
                fn min(a: __m256, b: __m256) -> __m256 {
                    _mm256_min_ps(a, b)
                }
                fn max(a: __m256, b: __m256) -> __m256 {
                    _mm256_max_ps(a, b)
                }
                fn round(a: __m256) -> __m256 {
                    _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
                }
                fn scale_by_power_of_two(a: __m256, n: __m256) -> __m256 {
                    let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                    _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)))
                }
                fn select_less(a: __m256, b: __m256, x: __m256, y: __m256) -> __m256 {
                    _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
                }
                fn widen_even(a: __m256) -> __m256 {
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(a)))
                }
                fn widen_odd(a: __m256) -> __m256 {
                    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                    _mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(a), upper))
                }
                fn interleave(a: __m256, b: __m256) -> (__m256, __m256) {
                    let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
                    (
                        _mm256_castsi256_ps(_mm256_unpacklo_epi16(a, b)),
                        _mm256_castsi256_ps(_mm256_unpackhi_epi16(a, b)),
                    )
                }
                fn deinterleave(a: __m256, b: __m256) -> (__m256, __m256) {
                    (_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
                }
            }

            #[inline(always)]
            unsafe fn fold(a: __m256) -> __m256 {
                a
            }
        }

        impl Narrow for $name {
            intrinsics! {
                fn transpose(rows: &mut [__m256; 8]) {
                    $crate::vector::avx2::transpose(rows)
                }
                fn sum_each(a: [__m256; 8]) -> __m256 {
                    $crate::vector::avx2::sum_each(a)
                }
            }
        }
    };
}
pub(super) use simd_256;

/// Values that come in turns, the upper halves of words that are what is rounded to.
#[inline(always)]
unsafe fn join_bf16(even: __m256, odd: __m256) -> __m256i {
    // SAFETY: the caller's: the CPU has AVX2; no memory is touched.
    unsafe {
        let (even, odd) = (add_half(_mm256_castps_si256(even)), add_half(_mm256_castps_si256(odd)));
        _mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(even), odd)
    }
}

/// What makes the upper halves of words nearest, and even in the middle.
#[inline(always)]
unsafe fn add_half(bits: __m256i) -> __m256i {
    // SAFETY: the caller's: the CPU has AVX2; no memory is touched.
    unsafe {
        let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)))
    }
}

simd_256!(Avx2, "avx2,fma,f16c", {
    const SPLITS: bool = true;

    intrinsics! {
        fn store_bf16_split(p: *mut u16, even: __m256, odd: __m256) {
            _mm256_storeu_si256(p.cast(), join_bf16(even, odd))
        }
        fn stream_bf16_split(p: *mut u16, even: __m256, odd: __m256) {
            _mm256_stream_si256(p.cast(), join_bf16(even, odd))
        }
        fn store_bf16(p: *mut u16, a: __m256) {
            store_bf16(p, a)
        }
    }
});
