//! A unit's rows cut into panels, each packed for the kernel that suits its number of rows.

use super::kernels::{Form, forms};
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
    pub form: Form,
    /// The packed words.
    pub words: *const f32,
}

/// Packs rows of `k` elements into `to`.
///
/// # Safety
/// The rows are readable and the CPU supports `S`.
pub unsafe fn pack<S: Simd, F: Format>(rows: &[*const u8], k: usize, to: &mut Buffer) -> Vec<Panel> {
    let words = |form: Form, rows: usize| match form {
        Form::Dot => rows * step_words::<S, F>(k),
        Form::Lanes { vectors } => Form::lanes::<S>(vectors) * F::words(k),
    };
    let forms = forms::<S, F>(rows.len());
    let mut next = to.words(forms.iter().map(|&(rows, form)| words(form, rows)).sum());
    let mut row = 0;
    let mut panels = Vec::with_capacity(forms.len());
    for (count, form) in forms {
        let rows = &rows[row..row + count];
        unsafe {
            match form {
                Form::Dot => S::enter(PackSteps::<F> { rows, k, to: next, format: PhantomData }),
                Form::Lanes { vectors } => {
                    let width = Form::lanes::<S>(vectors);
                    S::enter(PackTransposed::<F> { rows, width, k, to: next, format: PhantomData });
                }
            }
            panels.push(Panel { row, rows: count, form, words: next });
            next = next.add(words(form, count));
        }
        row += count;
    }
    panels
}
