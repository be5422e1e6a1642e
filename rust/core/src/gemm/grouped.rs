//! The arguments that all grouped GEMMs share.

use super::activation::Activation;
use crate::vector::dtype::DType;
use crate::vector::isa::Isa;

/// Which row of a matrix each row of the plan reads.
#[derive(Clone, Copy)]
pub struct Gather {
    /// `order[row]` is a slot, `order[row] / top_k` the row to read; null: rows are read in place.
    pub order: *const i32,
    /// Slots of one token.
    pub top_k: usize,
}

impl Gather {
    /// Rows are read in place.
    pub const NONE: Self = Self { order: std::ptr::null(), top_k: 1 };

    /// The row of the matrix that `row` of the plan reads.
    ///
    /// # Safety
    /// `order` is null or holds `row`.
    #[inline]
    pub unsafe fn source(&self, row: usize) -> usize {
        // SAFETY: the caller's: `order` holds the row.
        if self.order.is_null() { row } else { unsafe { *self.order.add(row) as usize / self.top_k } }
    }

    /// Addresses of the sources of `rows`, replacing what `to` held.
    ///
    /// # Safety
    /// As for `source`; `base` is a matrix of rows of `row_bytes` bytes.
    pub unsafe fn addresses(
        &self,
        rows: std::ops::Range<usize>,
        base: *const u8,
        row_bytes: usize,
        to: &mut Vec<*const u8>,
    ) {
        to.clear();
        for row in rows {
            // SAFETY: the caller's: `base` has the source of every row.
            to.push(unsafe { base.add(self.source(row) * row_bytes) });
        }
    }
}

/// `out[row, :] = a[source(row), :] * b[expert] (+ bias[expert])` for the rows of every expert.
///
/// All matrices are row-major and of type `dtype` (not fp64). What `b[expert]` is, `[n, k]` or `[k, n]`, the
/// function called says. Rows from `offsets[experts]` on are not touched.
#[derive(Clone, Copy)]
pub struct Grouped {
    /// Instruction set of the kernels, one that this CPU has.
    pub isa: Isa,
    /// Threads to use, at least one.
    pub threads: usize,
    /// Element type of `a`, `b`, `bias` and `out`.
    pub dtype: DType,
    /// Number of experts.
    pub experts: usize,
    /// `experts + 1` ascending row offsets, the first 0.
    pub offsets: *const i32,
    /// Columns of `a`.
    pub k: usize,
    /// Columns of `out`.
    pub n: usize,
    /// Activations.
    pub a: *const u8,
    /// Which of their rows are read.
    pub gather: Gather,
    /// Weights.
    pub b: *const u8,
    /// `[experts, n]`, or null.
    pub bias: *const u8,
    /// `[offsets[experts], n]`.
    pub out: *mut u8,
}

// SAFETY: the pointers are shared by the threads of a call, which write disjoint parts of `out`.
unsafe impl Send for Grouped {}
// SAFETY: as above.
unsafe impl Sync for Grouped {}

impl Grouped {
    /// The rows of `expert`.
    ///
    /// # Safety
    /// `offsets` is as documented and `expert < experts`.
    pub unsafe fn rows(&self, expert: usize) -> std::ops::Range<usize> {
        // SAFETY: the caller's: there is an offset behind the last expert's too.
        unsafe { *self.offsets.add(expert) as usize..*self.offsets.add(expert + 1) as usize }
    }
}

/// What happens to the sums before they are stored.
#[derive(Clone, Copy)]
pub struct Epilogue {
    /// Applied to the sums; if gated, two columns of the product become one of the output.
    pub activation: Option<Activation>,
    /// Gate and up columns alternate, instead of all gate columns preceding all up columns.
    pub interleaved: bool,
    /// Where the rounded sums are stored before the activation, `[rows, n]`; null if not wanted.
    pub pre: *mut u8,
}

// SAFETY: the pointer is shared by the threads of a call, which write disjoint parts.
unsafe impl Send for Epilogue {}
// SAFETY: as above.
unsafe impl Sync for Epilogue {}

impl Epilogue {
    /// Sums are only rounded.
    pub const NONE: Self = Self { activation: None, interleaved: false, pre: std::ptr::null_mut() };

    /// Columns of the product for one column of the output.
    pub fn columns(&self) -> usize {
        self.activation.map_or(1, Activation::columns)
    }
}
