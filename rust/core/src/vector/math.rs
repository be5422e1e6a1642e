//! exp, erf and the logistic function on vectors, to about one unit in the last place of fp32.

use super::simd::Simd;

/// e^x, saturating below at e^-87 and above at e^88; NaN stays NaN.
///
/// Cody-Waite reduction by log 2 and the Cephes polynomial.
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let x = S::max(S::splat(-87.0), S::min(S::splat(88.0), x));
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = S::fma(p, r, S::splat(c));
        }
        let y = S::add(S::fma(S::mul(r, r), p, r), S::splat(1.0));
        S::scale_by_power_of_two(y, n)
    }
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub unsafe fn sigmoid<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        let e = exp::<S>(S::sub(S::zero(), x));
        S::div(S::splat(1.0), S::add(S::splat(1.0), e))
    }
}

/// The error function: an odd rational approximation on the range where it is not 1 in fp32.
#[inline(always)]
pub unsafe fn erf<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the CPU supports `S`; no memory is touched.
    unsafe {
        const LIMIT: f32 = 3.832_507;
        const ABOVE: [f32; 4] = [3.408_291e-3, 5.095_57e-2, 1.852_083_2e-1, std::f32::consts::FRAC_2_SQRT_PI];
        const BELOW: [f32; 6] = [2.354_796_6e-5, 1.017_962_5e-3, 1.407_047e-2, 1.109_850_5e-1, 4.974_692_5e-1, 1.0];
        let x = S::max(S::splat(-LIMIT), S::min(S::splat(LIMIT), x));
        let x2 = S::mul(x, x);
        let mut p = S::splat(2.290_506_6e-4);
        for c in ABOVE {
            p = S::fma(p, x2, S::splat(c));
        }
        let mut q = S::splat(-1.179_160_3e-7);
        for c in BELOW {
            q = S::fma(q, x2, S::splat(c));
        }
        S::div(S::mul(x, p), q)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vector::isa::{Isa, with_simd};
    use crate::vector::simd::Kernel;

    struct Each<'a> {
        x: &'a [f32],
        y: &'a mut [f32],
        which: usize,
    }

    impl Kernel for Each<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            // SAFETY: lengths are multiples of 16, so of `LANES`, and `y` is as long as `x`.
            unsafe {
                let mut i = 0;
                while i < self.x.len() {
                    let x = S::load(self.x.as_ptr().add(i));
                    let y = match self.which {
                        0 => exp::<S>(x),
                        1 => sigmoid::<S>(x),
                        _ => erf::<S>(x),
                    };
                    S::store(self.y.as_mut_ptr().add(i), y);
                    i += S::LANES;
                }
            }
        }
    }

    /// erf by its Maclaurin series, which in fp64 is good to 1e-10 up to 4.
    fn erf_series(x: f64) -> f64 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / n as f64;
            sum += term / (2 * n + 1) as f64;
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    }

    #[test]
    fn functions_agree_with_fp64() {
        let x: Vec<f32> = (0..4096).map(|i| (i as f32 - 2048.0) / 512.0 * 1.25).collect();
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for which in 0..3 {
                let mut y = vec![f32::NAN; x.len()];
                // SAFETY: `y` is as long as `x`, a multiple of 16; the CPU has the instruction set.
                with_simd!(isa, S => unsafe { S::enter(Each { x: &x, y: &mut y, which }) });
                for (&x, &y) in x.iter().zip(&y) {
                    let x = f64::from(x);
                    let (want, scale) = match which {
                        0 => (x.exp(), x.exp()),
                        1 => (1.0 / (1.0 + (-x).exp()), 1.0),
                        _ if x.abs() > 4.0 => (x.signum(), 1.0),
                        _ => (erf_series(x), 1.0),
                    };
                    let error = (f64::from(y) - want).abs() / scale;
                    assert!(error < 4e-7, "{isa:?} function {which} at {x}: {y} for {want}");
                }
            }
        }
    }

    #[test]
    fn nan_and_infinity_go_through() {
        let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0].repeat(4);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
            for which in 0..3 {
                let mut y = vec![7.0; x.len()];
                // SAFETY: `y` is as long as `x`, a multiple of 16; the CPU has the instruction set.
                with_simd!(isa, S => unsafe { S::enter(Each { x: &x, y: &mut y, which }) });
                assert!(y[0].is_nan(), "{isa:?} function {which}");
                let limits = [[1.6e38, 1e-37], [1.0, 0.0], [1.0, -1.0]][which];
                assert!(y[1] >= limits[0] - 1e-6 && (y[2] - limits[1]).abs() < 1e-6, "{isa:?} {which} {y:?}");
            }
        }
    }
}
