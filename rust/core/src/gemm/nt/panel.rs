//! A unit's rows cut into panels, each packed for the kernel that suits its number of rows.

use super::kernels::{PanelKernel, panel_kernels};
use crate::gemm::pack::{PackSteps, PackTransposed, step_words};
use crate::memory::scratch::Buffer;
use crate::vector::format::Format;
use crate::vector::simd::Simd;
use std::marker::PhantomData;

/// Rows packed together.
#[derive(Clone, Copy, Debug)]
pub struct Panel {
    /// The first, counted from the unit's first row.
    pub row: usize,
    /// How many.
    pub rows: usize,
    /// The kernel they are packed for.
    pub kernel: PanelKernel,
    /// The packed words.
    pub words: *const f32,
}

/// Packs rows of `k` elements into `to`.
///
/// # Safety
/// The rows are readable and the CPU supports `S`.
pub unsafe fn pack<S: Simd, F: Format>(rows: &[*const u8], k: usize, to: &mut Buffer) -> Vec<Panel> {
    let words = |kernel: PanelKernel, rows: usize| match kernel {
        PanelKernel::Dot => rows * step_words::<S, F>(k),
        PanelKernel::Lanes { vectors } => PanelKernel::lanes::<S>(vectors) * F::words(k),
    };
    let panel_kernels = panel_kernels::<S, F>(rows.len());
    let mut next = to.words(panel_kernels.iter().map(|&(rows, kernel)| words(kernel, rows)).sum());
    let mut row = 0;
    let mut panels = Vec::with_capacity(panel_kernels.len());
    for (count, kernel) in panel_kernels {
        let rows = &rows[row..row + count];
        // SAFETY: the rows are readable, and `next` has the words that were summed up above for this panel.
        unsafe {
            match kernel {
                PanelKernel::Dot => S::enter(PackSteps::<F> { rows, k, to: next, format: PhantomData }),
                PanelKernel::Lanes { vectors } => {
                    let width = PanelKernel::lanes::<S>(vectors);
                    S::enter(PackTransposed::<F> { rows, width, k, to: next, format: PhantomData });
                }
            }
            panels.push(Panel { row, rows: count, kernel, words: next });
            next = next.add(words(kernel, count));
        }
        row += count;
    }
    panels
}
