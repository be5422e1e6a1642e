//! Permute, combine and their gradients on every instruction set of the CPU, against loops in fp64.

use half::{bf16, f16};
use moekern_core::permute::{Combine, CombineBackward, Permute, TokenMap};
use moekern_core::plan::plan;
use moekern_core::vector::{DType, Isa};
use proptest::prelude::*;

/// Values as memory of a dtype.
fn encode(values: &[f64], dtype: DType) -> Vec<u8> {
    let bytes = |v: &f64| match dtype {
        DType::F32 => (*v as f32).to_ne_bytes().to_vec(),
        DType::F64 => v.to_ne_bytes().to_vec(),
        DType::Bf16 => bf16::from_f64(*v).to_ne_bytes().to_vec(),
        DType::F16 => f16::from_f64(*v).to_ne_bytes().to_vec(),
    };
    values.iter().flat_map(bytes).collect()
}

fn decode(bytes: &[u8], dtype: DType) -> Vec<f64> {
    let value = |b: &[u8]| match dtype {
        DType::F32 => f32::from_ne_bytes(b.try_into().unwrap()).into(),
        DType::F64 => f64::from_ne_bytes(b.try_into().unwrap()),
        DType::Bf16 => bf16::from_ne_bytes(b.try_into().unwrap()).to_f64(),
        DType::F16 => f16::from_ne_bytes(b.try_into().unwrap()).to_f64(),
    };
    bytes.chunks(dtype.size()).map(value).collect()
}

fn weight_type(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Memory that shows NaN wherever nothing was written, in any dtype.
fn poison(elements: usize, dtype: DType) -> Vec<u8> {
    vec![0xff; elements * dtype.size()]
}

struct Problem {
    dtype: DType,
    tokens: usize,
    top_k: usize,
    hidden: usize,
    inverse: Vec<i32>,
    used: usize,
    x: Vec<f64>,
    /// NaN in the rows of sentinels.
    y: Vec<f64>,
    weights: Option<Vec<f64>>,
}

impl Problem {
    fn new(dtype: DType, tokens: usize, top_k: usize, hidden: usize, weighted: bool, seed: u64) -> Self {
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 33
        };
        let experts = 5;
        let ids: Vec<i64> = (0..tokens * top_k).map(|_| (next() % (experts + 2)) as i64 - 1).collect();
        let (mut order, mut inverse) = (vec![0; ids.len()], vec![0; ids.len()]);
        let mut offsets = vec![0; experts as usize + 1];
        plan(&ids, &mut order, &mut inverse, &mut offsets, 1).unwrap();
        let used = offsets[experts as usize] as usize;
        let mut values = |n: usize, dtype| -> Vec<f64> {
            let raw: Vec<f64> = (0..n).map(|_| (next() % 2001) as f64 / 1000.0 - 1.0).collect();
            decode(&encode(&raw, dtype), dtype)
        };
        let x = values(tokens * hidden, dtype);
        let mut y = values(tokens * top_k * hidden, dtype);
        y[used * hidden..].fill(f64::NAN);
        let weights = weighted.then(|| values(tokens * top_k, weight_type(dtype)));
        Self { dtype, tokens, top_k, hidden, inverse, used, x, y, weights }
    }

    fn map(&self, isa: Isa, threads: usize) -> TokenMap {
        TokenMap {
            isa,
            threads,
            dtype: self.dtype,
            tokens: self.tokens,
            top_k: self.top_k,
            hidden: self.hidden,
            inverse: self.inverse.as_ptr(),
            used: self.used,
        }
    }

    /// Rows, combined rows, gradient of the rows, gradient of the weights, as memory.
    fn results(&self, isa: Isa, threads: usize) -> [Vec<u8>; 4] {
        let map = self.map(isa, threads);
        let (slots, dtype) = (self.tokens * self.top_k, self.dtype);
        let (x, y) = (encode(&self.x, dtype), encode(&self.y, dtype));
        let weights = self.weights.as_ref().map(|w| encode(w, weight_type(dtype)));
        let weights = weights.as_ref().map_or(std::ptr::null(), |w| w.as_ptr());
        let mut rows = poison(slots * self.hidden, dtype);
        let mut out = poison(self.tokens * self.hidden, dtype);
        let mut dy = poison(slots * self.hidden, dtype);
        let mut dweights = poison(slots, weight_type(dtype));
        // SAFETY: all sizes are those of the map.
        unsafe {
            Permute { map, x: x.as_ptr(), out: rows.as_mut_ptr() }.run();
            Combine { map, y: y.as_ptr(), weights, out: out.as_mut_ptr() }.run();
            CombineBackward {
                map,
                dout: x.as_ptr(),
                y: y.as_ptr(),
                weights,
                dy: dy.as_mut_ptr(),
                dweights: dweights.as_mut_ptr(),
            }
            .run();
        }
        [rows, out, dy, dweights]
    }

    /// The same in fp64, with a bound on the error of each element.
    fn expected(&self) -> [Vec<(f64, f64)>; 4] {
        let (h, slots) = (self.hidden, self.tokens * self.top_k);
        let mut rows = vec![(0.0, 0.0); slots * h];
        let mut out = vec![(0.0, 0.0); self.tokens * h];
        let mut dy = vec![(0.0, 0.0); slots * h];
        let mut dweights = vec![(0.0, 0.0); slots];
        let sum = if self.dtype == DType::F64 { f64::EPSILON } else { f32::EPSILON.into() };
        let round = match self.dtype {
            DType::F32 => f32::EPSILON.into(),
            DType::F64 => f64::EPSILON,
            DType::Bf16 => bf16::EPSILON.to_f64(),
            DType::F16 => f16::EPSILON.to_f64(),
        };
        let tiny = if self.dtype == DType::F16 { 6e-8 } else { 1e-30 };
        let add = |to: &mut (f64, f64), term: f64| {
            to.0 += term;
            to.1 += sum * (self.top_k + h) as f64 * term.abs();
        };
        for slot in 0..slots {
            let (row, token) = (self.inverse[slot] as usize, slot / self.top_k);
            if row >= self.used {
                continue;
            }
            let weight = self.weights.as_ref().map_or(1.0, |w| w[slot]);
            for i in 0..h {
                let (x, y) = (self.x[token * h + i], self.y[row * h + i]);
                rows[row * h + i].0 = x;
                add(&mut out[token * h + i], weight * y);
                add(&mut dy[row * h + i], weight * x);
                add(&mut dweights[slot], x * y);
            }
        }
        for value in out.iter_mut().chain(&mut dy) {
            value.1 += round * value.0.abs() + tiny;
        }
        [rows, out, dy, dweights]
    }

    fn check(&self, isa: Isa, threads: usize) {
        let types = [self.dtype, self.dtype, self.dtype, weight_type(self.dtype)];
        let names = ["rows", "out", "dy", "dweights"];
        for (((got, expected), dtype), name) in
            self.results(isa, threads).iter().zip(self.expected()).zip(types).zip(names)
        {
            for (i, (got, (want, bound))) in decode(got, dtype).into_iter().zip(expected).enumerate() {
                // Not `>`: NaN must fail.
                assert!((got - want).abs() <= bound, "{name}[{i}]: {got}, expected {want} within {bound} ({isa:?})");
            }
        }
    }
}

fn levels() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available())
}

const DTYPES: [DType; 4] = [DType::F32, DType::F64, DType::Bf16, DType::F16];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_shape(
        dtype in prop::sample::select(DTYPES.to_vec()), tokens in 0usize..20, top_k in 0usize..6,
        hidden in 0usize..150, weighted: bool, threads in 1usize..4, seed: u64,
    ) {
        for isa in levels() {
            Problem::new(dtype, tokens, top_k, hidden, weighted, seed).check(isa, threads);
        }
    }
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    for dtype in DTYPES {
        let problem = Problem::new(dtype, 500, 4, 193, true, 3);
        for isa in levels() {
            let expected = problem.results(isa, 1);
            for threads in [2, 3, 8] {
                assert_eq!(problem.results(isa, threads), expected, "{dtype:?} {isa:?} {threads} threads");
            }
        }
    }
}

#[test]
fn gradients_not_wanted_are_not_written() {
    let problem = Problem::new(DType::F32, 5, 2, 9, true, 1);
    let map = problem.map(Isa::best(), 1);
    let [_, _, dy, dweights] = problem.results(Isa::best(), 1);
    let (x, y) = (encode(&problem.x, DType::F32), encode(&problem.y, DType::F32));
    let weights = encode(problem.weights.as_ref().unwrap(), DType::F32);
    let null = std::ptr::null_mut();
    let (mut only_dy, mut only_dweights) = (poison(90, DType::F32), poison(10, DType::F32));
    let job = CombineBackward {
        map,
        dout: x.as_ptr(),
        y: std::ptr::null(),
        weights: weights.as_ptr(),
        dy: only_dy.as_mut_ptr(),
        dweights: null,
    };
    // SAFETY: as above; `y` is not read without `dweights`.
    unsafe {
        job.run();
        CombineBackward { y: y.as_ptr(), dy: null, dweights: only_dweights.as_mut_ptr(), ..job }.run();
    }
    assert_eq!(only_dy, dy);
    assert_eq!(only_dweights, dweights);
}
