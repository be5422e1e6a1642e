//! The forward pass of a layer of experts: up projection with the gather, activation, down projection, combine.
//!
//! One call of the thread pool for all of it. Threads that run out of one pass's tickets go on with the next
//! pass and wait there only for the rows they need.
//!
//! | step    | reads                    | writes         | waits for                       |
//! |---------|--------------------------|----------------|---------------------------------|
//! | up      | `x`, gathered            | hidden, `pre`  | -                               |
//! | down    | hidden                   | rows           | the unit's rows of hidden       |
//! | combine | rows, gathered           | `out`          | all rows                        |
//!
//! Transposed weights have kernels that do not store through an activation: there the steps are separate calls,
//! with a pass over `pre` between the projections.

use super::activate_rows::ActivateRows;
use super::arguments::ExpertsInputs;
use crate::gemm::grouped::{Epilogue, Gather, Grouped};
use crate::gemm::nn::pass::grouped_nn;
use crate::gemm::nt::pass::NtPass;
use crate::gemm::nt::tickets::{Tickets, units};
use crate::memory::pages::advise_huge_pages;
use crate::memory::scratch::{with_scratch, with_workspace};
use crate::permute::arguments::Combine;
use crate::threads::jobs::run_jobs;
use crate::threads::pool::parallel;
use crate::vector::isa::with_kernels;
use std::marker::PhantomData;
use std::sync::atomic::AtomicUsize;

/// Arguments of [`experts_forward`].
#[derive(Clone, Copy)]
pub struct ExpertsForward {
    /// What is read.
    pub inputs: ExpertsInputs,
    /// `[slots, width]`: the rounded input of the activation is left here, except in sentinels' rows. Null: not
    /// wanted.
    pub pre: *mut u8,
    /// `[tokens, hidden]`.
    pub out: *mut u8,
}

// SAFETY: the pointers are shared by the threads of a call, which write disjoint parts of the results.
unsafe impl Send for ExpertsForward {}
// SAFETY: as above.
unsafe impl Sync for ExpertsForward {}

/// Computes `out`, and `pre` if wanted. The bits do not depend on the number of threads.
///
/// # Safety
/// All pointers are as documented.
pub unsafe fn experts_forward(args: &ExpertsForward) {
    let inputs = &args.inputs;
    // SAFETY: the caller's: the offsets are as documented.
    let used = unsafe { inputs.used() };
    let row_bytes = |columns: usize| columns * inputs.dtype.size();
    let width = inputs.width();
    advise_huge_pages(args.out, inputs.tokens * row_bytes(inputs.hidden));
    if !args.pre.is_null() {
        advise_huge_pages(args.pre, used * row_bytes(width));
    }
    with_workspace(|[hidden, rows]| {
        // Without a place for it, `pre` follows `hidden` where a pass over it is needed.
        let inner = used * row_bytes(inputs.inter);
        let extra = if inputs.transposed && args.pre.is_null() { used * row_bytes(width) } else { 0 };
        let hidden = hidden.bytes(inner + extra);
        let rows = rows.bytes(used * row_bytes(inputs.hidden));
        let x = (inputs.x, inputs.gather(), inputs.hidden);
        let up = Grouped { bias: inputs.b_gate_up, ..inputs.product(x, inputs.w_gate_up, width, hidden) };
        let activated = (hidden.cast_const(), Gather::NONE, inputs.inter);
        let down = Grouped { bias: inputs.b_down, ..inputs.product(activated, inputs.w_down, inputs.hidden, rows) };
        let combine = Combine { map: inputs.token_map(used), y: rows, weights: inputs.scores.cast(), out: args.out };
        let mut epilogue =
            Epilogue { activation: Some(inputs.activation), interleaved: inputs.interleaved, pre: args.pre };
        // SAFETY: the pointers are as documented, and the workspace has room for `hidden`, `rows` and, where it is
        // needed, `pre`.
        unsafe {
            if inputs.transposed {
                if epilogue.pre.is_null() {
                    epilogue.pre = hidden.add(inner);
                }
                transposed(&up, &epilogue, used, &down, &combine);
            } else {
                plain(&up, &epilogue, &down, &combine);
            }
        }
    });
}

/// The three steps with weights `[out, in]`.
unsafe fn plain(up: &Grouped, epilogue: &Epilogue, down: &Grouped, combine: &Combine) {
    // SAFETY: the caller's: `up` is as documented.
    let units = unsafe { units(up) };
    let columns = epilogue.columns();
    let up_tickets = Tickets::new(&units, up.n / columns, columns, up.threads);
    let down_tickets = Tickets::new(&units, down.n, 1, up.threads);
    let up = NtPass { args: *up, epilogue: *epilogue, tickets: &up_tickets, after: None };
    let down = NtPass { args: *down, epilogue: Epilogue::NONE, tickets: &down_tickets, after: Some(&up_tickets) };
    let tokens = AtomicUsize::new(0);
    parallel(down.args.threads, &|_| {
        // SAFETY: every thread writes the tickets and tokens that it has drawn, and reads what it has waited for.
        with_scratch(|scratch| unsafe {
            up.work(scratch);
            down.work(scratch);
            down_tickets.wait_all();
            combine.work(&tokens);
        });
    });
}

/// The steps with weights `[in, out]`, the activation of `used` rows among them.
unsafe fn transposed(up: &Grouped, epilogue: &Epilogue, used: usize, down: &Grouped, combine: &Combine) {
    let Some(activation) = epilogue.activation else { unreachable!("experts have an activation") };
    // SAFETY: each step reads what those before it have written; the pointers are as documented.
    unsafe {
        grouped_nn(&Grouped { out: epilogue.pre, ..*up });
        with_kernels!(up.isa, up.dtype, S, F => run_jobs(up.threads, &[&ActivateRows::<S, F> {
            activation,
            interleaved: epilogue.interleaved,
            rows: used,
            columns: down.k,
            pre: epilogue.pre,
            out: up.out,
            types: PhantomData,
        }]));
        grouped_nn(down);
        combine.run();
    }
}
