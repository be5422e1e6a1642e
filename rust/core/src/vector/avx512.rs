//! AVX-512 (F, BW, VL, DQ), with and without the bf16 dot product: thirty-two registers of sixteen lanes, and
//! their eight-lane halves, which waste less on one to eight rows.

use super::avx2::{self, simd_256};
use super::simd::{Kernel, Narrow, Simd, intrinsics};
use std::arch::x86_64::*;
use std::mem::transmute;

/// AVX-512 F, BW, VL, DQ.
#[derive(Clone, Copy)]
pub struct Avx512;

/// [`Avx512`] and `vdpbf16ps`.
#[derive(Clone, Copy)]
pub struct Avx512Bf16;

/// Eight lanes of [`Avx512`].
#[derive(Clone, Copy)]
pub struct Avx512Half;

/// Eight lanes of [`Avx512Bf16`].
#[derive(Clone, Copy)]
pub struct Avx512Bf16Half;

/// Rounds fp32 to bf16, NaN to a quiet NaN.
#[inline(always)]
unsafe fn round_bf16(a: __m512) -> __m256i {
    // SAFETY: the caller's: the CPU has AVX-512 F; no memory is touched.
    unsafe {
        let bits = _mm512_castps_si512(a);
        let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
        let half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, half));
        let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a);
        _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)))
    }
}

macro_rules! simd_512 {
    ($name:ident, $half:ident, $features:literal, { $($special:tt)* }) => {
        impl Simd for $name {
            type V = __m512;
            type Narrow = $half;
            const LANES: usize = 16;

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
                fn load(p: *const f32) -> __m512 {
                    _mm512_loadu_ps(p)
                }
                fn load_bf16(p: *const u16) -> __m512 {
                    let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
                }
                fn load_f16(p: *const u16) -> __m512 {
                    _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()))
                }
                fn store(p: *mut f32, a: __m512) {
                    _mm512_storeu_ps(p, a)
                }
                fn stream(p: *mut f32, a: __m512) {
                    _mm512_stream_ps(p, a)
                }
                fn store_f16(p: *mut u16, a: __m512) {
                    _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a))
                }
                fn zero() -> __m512 {
                    _mm512_setzero_ps()
                }
                fn splat(x: f32) -> __m512 {
                    _mm512_set1_ps(x)
                }
                fn splat_bits(x: u32) -> __m512 {
                    _mm512_castsi512_ps(_mm512_set1_epi32(x as i32))
                }
                fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
                    _mm512_fmadd_ps(a, b, c)
                }
                fn add(a: __m512, b: __m512) -> __m512 {
                    _mm512_add_ps(a, b)
                }
                fn sub(a: __m512, b: __m512) -> __m512 {
                    _mm512_sub_ps(a, b)
                }
                fn mul(a: __m512, b: __m512) -> __m512 {
                    _mm512_mul_ps(a, b)
                }
                fn div(a: __m512, b: __m512) -> __m512 {
                    _mm512_div_ps(a, b)
                }
                fn min(a: __m512, b: __m512) -> __m512 {
                    _mm512_min_ps(a, b)
                }
                fn max(a: __m512, b: __m512) -> __m512 {
                    _mm512_max_ps(a, b)
                }
                fn round(a: __m512) -> __m512 {
                    _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
                }
                fn scale_by_power_of_two(a: __m512, n: __m512) -> __m512 {
                    _mm512_scalef_ps(a, n)
                }
                fn select_less(a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
                    _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), y, x)
                }
                fn widen_even(a: __m512) -> __m512 {
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(a)))
                }
                fn widen_odd(a: __m512) -> __m512 {
                    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                    _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), upper))
                }
                fn interleave(a: __m512, b: __m512) -> (__m512, __m512) {
                    let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
                    (
                        _mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b)),
                        _mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b)),
                    )
                }
                fn deinterleave(a: __m512, b: __m512) -> (__m512, __m512) {
                    let first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
                    let second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
                    (_mm512_permutex2var_ps(a, first, b), _mm512_permutex2var_ps(a, second, b))
                }
                fn fold(a: __m512) -> __m256 {
                    _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a))
                }
            }
        }
    };
}

simd_512!(Avx512, Avx512Half, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c", {
    intrinsics! {
        fn store_bf16(p: *mut u16, a: __m512) {
            _mm256_storeu_si256(p.cast(), round_bf16(a))
        }
        fn store_bf16_pair(p: *mut u16, a: __m512, b: __m512) {
            Self::store_bf16(p, a);
            Self::store_bf16(p.add(16), b);
        }
        fn stream_bf16_pair(p: *mut u16, a: __m512, b: __m512) {
            let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(round_bf16(a)), round_bf16(b));
            _mm512_stream_si512(p.cast(), both)
        }
    }
});

simd_512!(Avx512Bf16, Avx512Bf16Half, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c", {
    intrinsics! {
        fn store_bf16(p: *mut u16, a: __m512) {
            _mm256_storeu_si256(p.cast(), transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(a)))
        }
        fn store_bf16_pair(p: *mut u16, a: __m512, b: __m512) {
            _mm512_storeu_si512(p.cast(), transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)))
        }
        fn stream_bf16_pair(p: *mut u16, a: __m512, b: __m512) {
            _mm512_stream_si512(p.cast(), transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a)))
        }
        fn dot_pairs(acc: __m512, a: __m512, b: __m512) -> __m512 {
            _mm512_dpbf16_ps(acc, transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b))
        }
    }
});

simd_256!(Avx512Half, "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c", {
    intrinsics! {
        fn store_bf16(p: *mut u16, a: __m256) {
            avx2::store_bf16(p, a)
        }
    }
});

simd_256!(Avx512Bf16Half, "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c", {
    intrinsics! {
        fn store_bf16(p: *mut u16, a: __m256) {
            _mm_storeu_si128(p.cast(), transmute::<__m128bh, __m128i>(_mm256_cvtneps_pbh(a)))
        }
        fn dot_pairs(acc: __m256, a: __m256, b: __m256) -> __m256 {
            _mm256_dpbf16_ps(acc, transmute::<__m256, __m256bh>(a), transmute::<__m256, __m256bh>(b))
        }
    }
});
