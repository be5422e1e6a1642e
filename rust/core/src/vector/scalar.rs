//! The portable vector unit: arrays of eight values that the compiler vectorises as it can.

use super::simd::{Kernel, Narrow, Simd};
use half::{bf16, f16};

/// Plain Rust, correct on any CPU.
#[derive(Clone, Copy)]
pub struct Scalar;

type V = [f32; 8];

macro_rules! each {
    (|$i:ident| $value:expr) => {{
        let mut out = [0f32; 8];
        let mut $i = 0;
        while $i < 8 {
            out[$i] = $value;
            $i += 1;
        }
        out
    }};
}

impl Simd for Scalar {
    type V = V;
    type Narrow = Self;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
        #[inline(never)]
        unsafe fn outlined<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: the caller's: the kernel's own requirements hold.
            unsafe { kernel.run::<Scalar>() }
        }
        // SAFETY: as above.
        unsafe { outlined(kernel) }
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> V {
        // SAFETY: eight values can be read.
        unsafe { p.cast::<V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> V {
        // SAFETY: eight values can be read.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        each!(|i| f32::from_bits(u32::from(bits[i]) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> V {
        // SAFETY: eight values can be read.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        each!(|i| f16::from_bits(bits[i]).to_f32())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: V) {
        // SAFETY: there is room for eight values.
        unsafe { p.cast::<V>().write_unaligned(a) };
    }
    #[inline(always)]
    unsafe fn stream(p: *mut f32, a: V) {
        // SAFETY: the same function.
        unsafe { Self::store(p, a) };
    }
    #[inline(always)]
    unsafe fn store_bf16(p: *mut u16, a: V) {
        for (i, &x) in a.iter().enumerate() {
            // SAFETY: there is room for eight values.
            unsafe { p.add(i).write_unaligned(bf16::from_f32(x).to_bits()) };
        }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, a: V) {
        for (i, &x) in a.iter().enumerate() {
            // SAFETY: there is room for eight values.
            unsafe { p.add(i).write_unaligned(f16::from_f32(x).to_bits()) };
        }
    }
    #[inline(always)]
    unsafe fn store_bf16_pair(p: *mut u16, a: V, b: V) {
        // SAFETY: there is room for sixteen values.
        unsafe {
            Self::store_bf16(p, a);
            Self::store_bf16(p.add(8), b);
        }
    }
    #[inline(always)]
    unsafe fn stream_bf16_pair(p: *mut u16, a: V, b: V) {
        // SAFETY: the same function.
        unsafe { Self::store_bf16_pair(p, a, b) };
    }

    #[inline(always)]
    unsafe fn zero() -> V {
        [0.0; 8]
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> V {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn splat_bits(x: u32) -> V {
        [f32::from_bits(x); 8]
    }
    #[inline(always)]
    unsafe fn fma(a: V, b: V, c: V) -> V {
        // `mul_add` would call a library function where the target has no fused instruction.
        each!(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn add(a: V, b: V) -> V {
        each!(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: V, b: V) -> V {
        each!(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: V, b: V) -> V {
        each!(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: V, b: V) -> V {
        each!(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn min(a: V, b: V) -> V {
        each!(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn max(a: V, b: V) -> V {
        each!(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn round(a: V) -> V {
        // Adding and subtracting 1.5 * 2^23 leaves the nearest integer; arguments are below 2^22 here.
        each!(|i| (a[i] + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn scale_by_power_of_two(a: V, n: V) -> V {
        each!(|i| a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn select_less(a: V, b: V, x: V, y: V) -> V {
        each!(|i| if a[i] < b[i] { x[i] } else { y[i] })
    }

    #[inline(always)]
    unsafe fn widen_even(a: V) -> V {
        each!(|i| f32::from_bits(a[i].to_bits() << 16))
    }
    #[inline(always)]
    unsafe fn widen_odd(a: V) -> V {
        each!(|i| f32::from_bits(a[i].to_bits() & 0xffff_0000))
    }
    #[inline(always)]
    unsafe fn interleave(a: V, b: V) -> (V, V) {
        // SAFETY: arrays of plain bits, equally long.
        let (a, b) = unsafe { (std::mem::transmute::<V, [u16; 16]>(a), std::mem::transmute::<V, [u16; 16]>(b)) };
        let word = |i: usize| f32::from_bits(u32::from(a[i]) | u32::from(b[i]) << 16);
        (each!(|i| word(i)), each!(|i| word(i + 8)))
    }
    #[inline(always)]
    unsafe fn deinterleave(a: V, b: V) -> (V, V) {
        (a, b)
    }
    #[inline(always)]
    unsafe fn fold(a: V) -> V {
        a
    }
}

impl Narrow for Scalar {
    #[inline(always)]
    unsafe fn transpose(rows: &mut [V; 8]) {
        let from = *rows;
        for (i, row) in rows.iter_mut().enumerate() {
            *row = each!(|j| from[j][i]);
        }
    }
    #[inline(always)]
    unsafe fn sum_each(a: [V; 8]) -> V {
        each!(|i| {
            let v = a[i];
            ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
        })
    }
}
