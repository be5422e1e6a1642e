//! The grouped GEMMs of the gradients against fp64, on every instruction set this CPU has.

mod common;

use common::{Random, Tensor, error, isas, offsets, tolerance};
use moekern_core::gemm::{Gather, Grouped, GroupedTn, grouped_nn, grouped_tn};
use moekern_core::vector::{DType, Isa};

const DTYPES: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];
const TOP_K: usize = 3;

/// Rows of some experts whose sources are scattered over fewer tokens.
struct Rows {
    counts: Vec<usize>,
    offsets: Vec<i32>,
    order: Vec<i32>,
    tokens: usize,
}

impl Rows {
    fn new(counts: &[usize], random: &mut Random) -> Self {
        let rows: usize = counts.iter().sum();
        let tokens = rows.div_ceil(TOP_K).max(1);
        let order = (0..rows).map(|_| random.below(tokens * TOP_K) as i32).collect();
        Self { counts: counts.to_vec(), offsets: offsets(counts), order, tokens }
    }

    fn len(&self) -> usize {
        self.order.len()
    }

    /// Rows of the matrix, and where each row of the plan is.
    fn gather(&self, gathered: bool) -> (usize, Gather, Vec<usize>) {
        if gathered {
            let sources = self.order.iter().map(|&slot| slot as usize / TOP_K).collect();
            (self.tokens, Gather { order: self.order.as_ptr(), top_k: TOP_K }, sources)
        } else {
            (self.len(), Gather::NONE, (0..self.len()).collect())
        }
    }

    fn of(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert] as usize..self.offsets[expert + 1] as usize
    }
}

fn check_nn(isa: Isa, dtype: DType, rows: &Rows, k: usize, n: usize, gathered: bool, biased: bool) {
    let mut random = Random::new((k * n) as u64);
    let experts = rows.counts.len();
    let (height, gather, sources) = rows.gather(gathered);
    let a = Tensor::normal(dtype, height * k, 1.0, &mut random);
    let b = Tensor::normal(dtype, experts * k * n, (k as f64).powf(-0.5), &mut random);
    let bias = Tensor::normal(dtype, experts * n, 1.0, &mut random);
    let mut out = Tensor::nan(dtype, rows.len() * n);
    let job = Grouped {
        isa,
        threads: 2,
        dtype,
        experts,
        offsets: rows.offsets.as_ptr(),
        k,
        n,
        a: a.ptr(),
        gather,
        b: b.ptr(),
        bias: if biased { bias.ptr() } else { std::ptr::null() },
        out: out.mut_ptr(),
    };
    // SAFETY: the tensors have the shapes stated.
    unsafe { grouped_nn(&job) };
    let (a, b, bias) = (a.values(), b.values(), bias.values());
    let mut want = vec![0.0; rows.len() * n];
    for e in 0..experts {
        for row in rows.of(e) {
            let to = &mut want[row * n..(row + 1) * n];
            if biased {
                to.copy_from_slice(&bias[e * n..(e + 1) * n]);
            }
            for (i, x) in a[sources[row] * k..][..k].iter().enumerate() {
                for (t, w) in to.iter_mut().zip(&b[(e * k + i) * n..]) {
                    *t += x * w;
                }
            }
        }
    }
    let error = error(&out.values(), &want);
    assert!(error < tolerance(dtype), "{isa:?} {dtype:?} k={k} n={n} gathered={gathered}: {error:.2e}");
}

fn check_tn(isa: Isa, dtype: DType, rows: &Rows, p: usize, n: usize, gathered: (bool, bool), stream: bool) {
    let mut random = Random::new((p * n) as u64);
    let experts = rows.counts.len();
    let (height_a, gather_a, source_a) = rows.gather(gathered.0);
    let (height_b, gather_b, source_b) = rows.gather(gathered.1);
    let a = Tensor::normal(dtype, height_a * p, 1.0, &mut random);
    let b = Tensor::normal(dtype, height_b * n, 1.0, &mut random);
    // Room to start on a cache line, as results of torch do; and one element further, as views may.
    let mut room = Tensor::nan(dtype, experts * p * n + 64);
    for shift in [0, 1] {
        let start = room.ptr().align_offset(64) / dtype.size() + shift;
        let job = GroupedTn {
            isa,
            threads: 2,
            dtype,
            experts,
            offsets: rows.offsets.as_ptr(),
            p,
            n,
            a: a.ptr(),
            gather_a,
            b: b.ptr(),
            gather_b,
            // SAFETY: there is room for it before the result.
            out: unsafe { room.mut_ptr().add(start * dtype.size()) },
            stream,
        };
        // SAFETY: the tensors have the shapes stated.
        unsafe { grouped_tn(&job) };
        let (a, b) = (a.values(), b.values());
        let mut want = vec![0.0; experts * p * n];
        for e in 0..experts {
            for row in rows.of(e) {
                for i in 0..p {
                    let x = a[source_a[row] * p + i];
                    for (t, y) in want[(e * p + i) * n..][..n].iter_mut().zip(&b[source_b[row] * n..]) {
                        *t += x * y;
                    }
                }
            }
        }
        let got = &room.values()[start..start + experts * p * n];
        for e in 0..experts {
            let part = e * p * n..(e + 1) * p * n;
            let error = error(&got[part.clone()], &want[part]);
            let rows = rows.counts[e];
            assert!(error < tolerance(dtype), "{isa:?} {dtype:?} {rows} rows p={p} n={n} stream={stream}: {error:.2e}");
        }
    }
}

const SIZES: [(usize, usize); 7] = [(64, 64), (72, 40), (40, 264), (37, 19), (9, 7), (272, 96), (520, 33)];
const RAGGED: [usize; 15] = [0, 1, 2, 3, 5, 4, 8, 9, 16, 17, 130, 0, 33, 12, 64];

#[test]
fn nn_with_ragged_rows() {
    let rows = Rows::new(&RAGGED, &mut Random::new(1));
    for isa in isas() {
        for dtype in DTYPES {
            for (i, (k, n)) in SIZES.into_iter().enumerate() {
                check_nn(isa, dtype, &rows, k, n, i % 2 == 0, i % 3 == 0);
            }
        }
    }
}

#[test]
fn nn_sums_over_nothing_leave_the_bias() {
    let rows = Rows::new(&RAGGED, &mut Random::new(1));
    for isa in isas() {
        for dtype in DTYPES {
            for n in [1, 64, 500, 2048] {
                check_nn(isa, dtype, &rows, 72, n, true, true); // leaves its sums in the same memory
                check_nn(isa, dtype, &rows, 0, n, true, true);
            }
        }
    }
}

#[test]
fn nn_with_whole_columns_split_among_threads() {
    let rows = Rows::new(&[7], &mut Random::new(2));
    for isa in isas() {
        for dtype in DTYPES {
            check_nn(isa, dtype, &rows, 48, 2048, true, true);
        }
    }
}

#[test]
fn nn_with_more_rows_than_a_ticket_takes() {
    let rows = Rows::new(&[1100, 513], &mut Random::new(3));
    for isa in isas() {
        for dtype in DTYPES {
            check_nn(isa, dtype, &rows, 24, 40, true, false);
        }
    }
}

#[test]
fn nn_with_long_sums() {
    let rows = Rows::new(&[1, 6, 20, 30], &mut Random::new(6));
    for isa in isas() {
        for dtype in DTYPES {
            check_nn(isa, dtype, &rows, 1544, 64, false, false);
        }
    }
}

#[test]
fn tn_with_ragged_rows() {
    let rows = Rows::new(&RAGGED, &mut Random::new(4));
    for isa in isas() {
        for dtype in DTYPES {
            for (i, (p, n)) in SIZES.into_iter().enumerate() {
                check_tn(isa, dtype, &rows, p, n, (i % 2 == 0, i % 3 == 0), i % 2 == 1);
                check_tn(isa, dtype, &rows, n, p, (i % 3 == 0, i % 2 == 0), i % 2 == 0);
            }
        }
    }
}

#[test]
fn tn_with_more_rows_than_are_packed_at_once() {
    let rows = Rows::new(&[1025, 3, 700, 2050], &mut Random::new(5));
    for isa in isas() {
        for dtype in DTYPES {
            check_tn(isa, dtype, &rows, 24, 72, (true, false), true);
        }
    }
}
