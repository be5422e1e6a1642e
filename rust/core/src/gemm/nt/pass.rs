//! The forward grouped GEMM: `out = activation(a[source] * b^T + bias)` for the rows of every expert, weights
//! `[n, k]`.
//!
//! Activations are packed, with the gather fused, by every thread for itself; weights are read where they lie.
//! A block of features is computed into fp32 scratch and leaves it once: bias, activation, rounding.

use super::block::{FeatureBlock, Segment};
use super::panel::{Panel, pack};
use super::tickets::{Ticket, Tickets, units};
use crate::gemm::grouped::{Epilogue, Grouped};
use crate::memory::scratch::{Scratch, with_scratch};
use crate::threads::pool::parallel;
use crate::vector::format::Format;
use crate::vector::isa::with_kernels;
use crate::vector::simd::Simd;

/// One pass over all experts' rows, shared by the threads of a call.
pub struct NtPass<'a> {
    /// The product; its `n` counts weight rows, `out` has `n / epilogue.columns()` columns.
    pub args: Grouped,
    pub epilogue: Epilogue,
    pub tickets: &'a Tickets<'a>,
    /// The pass that writes `a`: a unit's rows are waited for.
    pub after: Option<&'a Tickets<'a>>,
}

/// `out[row, :] = a[source(row), :] * b[expert]^T + bias[expert]`, weights `[experts, n, k]`, then the epilogue.
///
/// # Safety
/// The args's and the epilogue's pointers are as documented there.
pub unsafe fn grouped_nt(args: &Grouped, epilogue: &Epilogue) {
    // SAFETY: the caller's: the offsets are as documented.
    let units = unsafe { units(args) };
    let tickets = Tickets::new(&units, args.n / epilogue.columns(), epilogue.columns(), args.threads);
    let pass = NtPass { args: *args, epilogue: *epilogue, tickets: &tickets, after: None };
    // SAFETY: the caller's; threads compute the tickets that they draw.
    parallel(args.threads, &|_| with_scratch(|scratch| unsafe { pass.work(scratch) }));
}

impl NtPass<'_> {
    /// Draws and computes tickets until none is left. Called by every thread.
    ///
    /// # Safety
    /// As for [`grouped_nt`].
    pub unsafe fn work(&self, scratch: &mut Scratch) {
        let _guard = self.tickets.guard();
        // SAFETY: the caller's, on the vector unit that the instruction set has.
        with_kernels!(self.args.isa, self.args.dtype, S, F => unsafe { self.work_with::<S, F>(scratch) });
    }

    unsafe fn work_with<S: Simd, F: Format>(&self, scratch: &mut Scratch) {
        let mut packed: Option<(usize, Vec<Panel>)> = None;
        let mut unit = 0;
        while let Some(ticket) = self.tickets.draw(unit) {
            unit = ticket.unit;
            if packed.as_ref().is_none_or(|(of, _)| *of != unit) {
                if let Some(after) = self.after {
                    after.wait(unit);
                }
                // SAFETY: the unit's rows are there: they were waited for if another pass writes them.
                packed = Some((unit, unsafe { self.pack::<S, F>(unit, scratch) }));
            }
            if let Some((_, packed)) = &packed {
                // SAFETY: the panels are those of the ticket's unit.
                unsafe { self.compute::<S, F>(&ticket, packed, scratch) };
            }
            self.tickets.finish(&ticket);
        }
    }

    unsafe fn pack<S: Simd, F: Format>(&self, unit: usize, scratch: &mut Scratch) -> Vec<Panel> {
        let (args, rows) = (&self.args, self.tickets.units()[unit].rows.clone());
        let Scratch { panels, rows: addresses, .. } = scratch;
        // SAFETY: the unit's rows are some of the plan, of `k` elements each.
        unsafe {
            args.gather.addresses(rows, args.a, args.k * F::BYTES, addresses);
            pack::<S, F>(addresses, args.k, panels)
        }
    }

    unsafe fn compute<S: Simd, F: Format>(&self, ticket: &Ticket, panels: &[Panel], scratch: &mut Scratch) {
        let step = self.tickets.block();
        let mut start = ticket.features.start;
        while start < ticket.features.end {
            let end = (start + step).min(ticket.features.end);
            let next = if end < ticket.features.end {
                self.weights::<F>(ticket.unit, end)
            } else {
                match self.tickets.peek(ticket.unit) {
                    Some(next) => self.weights::<F>(next.unit, next.features.start),
                    None => self.weights::<F>(ticket.unit, start),
                }
            };
            let unit = &self.tickets.units()[ticket.unit];
            let block = FeatureBlock { args: &self.args, epilogue: &self.epilogue, unit, features: start..end, next };
            // SAFETY: panels and pointers are the caller's; the block is a part of the ticket.
            unsafe { block.run::<S, F>(panels, scratch) };
            start = end;
        }
    }

    /// Where the weights of a unit's feature begin.
    fn weights<F: Format>(&self, unit: usize, feature: usize) -> *const u8 {
        let expert = self.tickets.units()[unit].expert;
        let row = expert * self.args.n + Segment::first_row(&self.epilogue, feature);
        self.args.b.wrapping_add(row * self.args.k * F::BYTES)
    }
}
