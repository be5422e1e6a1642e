//! Which kernel runs for how many rows: the tile shapes are what the register files hold without spilling, and
//! were chosen by measurement on Zen 4.

use super::dot::Dot;
use super::lanes::{Lanes, WidenWeights};
use crate::threads::jobs::even_parts;
use crate::vector::format::{F32, Format, Kind};
use crate::vector::simd::Simd;
use std::marker::PhantomData;

/// The kernel that a panel of rows is packed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PanelKernel {
    /// [`Dot`]: as many rows as there are, no lane is empty.
    Dot,
    /// [`Lanes`]: rows are the lanes of so many vectors, 0 meaning one of eight lanes.
    Lanes { vectors: usize },
}

impl PanelKernel {
    /// Lanes of so many vectors of rows.
    pub const fn lanes<S: Simd>(vectors: usize) -> usize {
        if vectors == 0 { 8 } else { vectors * S::LANES }
    }
}

/// Cuts a unit's rows into panels: rows and kernel of each, in order.
///
/// Full vectors of rows come first. While they pass by, the next weights arrive from memory; what follows finds
/// them in the second-level cache, so that the dot kernel's speed there decides how large a remainder it takes.
/// A unit without a full vector keeps all its rows together for the same reason.
pub fn panel_kernels<S: Simd, F: Format>(rows: usize) -> Vec<(usize, PanelKernel)> {
    let rest = rows % S::LANES;
    let dot = if rows <= dot_rows::<F>() {
        rows
    } else if rows > S::LANES && rest <= dot_rest::<S, F>() {
        rest
    } else {
        0
    };
    let mut panel_kernels = Vec::new();
    if dot == 0 && rows <= 8 && S::LANES == 16 {
        panel_kernels.push((rows, PanelKernel::Lanes { vectors: 0 }));
        return panel_kernels;
    }
    let vectors = (rows - dot).div_ceil(S::LANES);
    let mut left = rows - dot;
    for (_, vectors) in even_parts(vectors, max_vectors::<S, F>()) {
        let count = (vectors * S::LANES).min(left);
        panel_kernels.push((count, PanelKernel::Lanes { vectors }));
        left -= count;
    }
    panel_kernels.extend(even_parts(dot, dot_group::<S, F>()).map(|(_, count)| (count, PanelKernel::Dot)));
    panel_kernels
}

/// Units of up to so many rows use the dot kernel only. Widening in the lanes kernel costs more than it does there,
/// so its share of the rows is larger for widened formats.
const fn dot_rows<F: Format>() -> usize {
    match F::KIND {
        Kind::F32 | Kind::Bf16Pairs => 4,
        Kind::Bf16 | Kind::F16 => 15,
    }
}

/// Rows behind the last full vector that are better multiplied by the dot kernel than by a vector of them.
const fn dot_rest<S: Simd, F: Format>() -> usize {
    match (S::LANES, F::KIND) {
        (16, Kind::Bf16) => 15,
        (16, _) => 12,
        (_, Kind::Bf16) => 7,
        _ => 4,
    }
}

/// Rows of one call of the dot kernel. Widened weights take registers from the sums.
const fn dot_group<S: Simd, F: Format>() -> usize {
    match (S::LANES, F::KIND) {
        (16, _) => 8,
        (_, Kind::Bf16) => 3,
        _ => 4,
    }
}

/// Vectors of rows that a panel of the lanes kernel has at most.
const fn max_vectors<S: Simd, F: Format>() -> usize {
    // Three vectors by eight features leave no registers for widening.
    if S::LANES == 8 || matches!(F::KIND, Kind::Bf16) { 2 } else { 3 }
}

/// Whether the weights of a block are copied as fp32 before they meet `rows` rows. fp16 has no cheap
/// conversion of a broadcast value; for bf16 the copy pays where registers are few and rows many.
pub const fn widens<S: Simd, F: Format>(rows: usize) -> bool {
    match F::KIND {
        Kind::F16 => true,
        Kind::Bf16 => S::LANES == 8 && rows >= 128,
        Kind::F32 | Kind::Bf16Pairs => false,
    }
}

/// `count` features of one panel, for either kernel; the fields are theirs.
#[derive(Clone, Copy)]
pub struct Product {
    pub panel: *const f32,
    pub k: usize,
    pub weights: *const u8,
    pub stride: usize,
    pub count: usize,
    pub next: *const u8,
    pub bias: *const f32,
    pub out: *mut f32,
}

impl Product {
    /// The first `tiles * features` features removed, their results taking `out` values each.
    fn rest(mut self, done: usize, out: usize) -> Self {
        self.weights = self.weights.wrapping_add(done * self.stride);
        self.count -= done;
        if !self.bias.is_null() {
            self.bias = self.bias.wrapping_add(done);
        }
        self.out = self.out.wrapping_add(done * out);
        self
    }

    /// The lanes kernel on a panel of `vectors` vectors of rows, see [`PanelKernel::Lanes`].
    ///
    /// # Safety
    /// The kernel's requirements hold and the CPU supports `S`.
    pub unsafe fn lanes<S: Simd, F: Format>(self, vectors: usize) {
        // SAFETY: the caller's, for the tile that the panel and the registers fit.
        unsafe {
            match (vectors, S::LANES, F::KIND) {
                (0, _, _) => self.lanes_of::<S::Narrow, F, 1, 8>(),
                (1, 16, _) => self.lanes_of::<S, F, 1, 8>(),
                (1, _, _) => self.lanes_of::<S, F, 1, 6>(),
                // Rows of weights lie a power of two apart: more than eight would not fit the first-level cache's ways.
                (2, 16, _) => self.lanes_of::<S, F, 2, 8>(),
                (2, _, Kind::Bf16) => self.lanes_of::<S, F, 2, 4>(),
                (2, _, _) => self.lanes_of::<S, F, 2, 6>(),
                _ => self.lanes_of::<S, F, 3, 8>(),
            }
        }
    }

    /// The same on weights that `widen` copied.
    ///
    /// # Safety
    /// As for `lanes`.
    pub unsafe fn widened_lanes<S: Simd>(self, vectors: usize) {
        // SAFETY: the caller's; the weights are fp32 now.
        unsafe { self.lanes::<S, F32>(vectors) }
    }

    unsafe fn lanes_of<S: Simd, F: Format, const VECTORS: usize, const FEATURES: usize>(self) {
        let width = VECTORS * S::LANES;
        let whole = self.count / FEATURES;
        // SAFETY: the caller's: tiles of eight, four and one feature are together as many as there are.
        unsafe {
            self.lanes_tiles::<S, F, VECTORS, FEATURES>(whole);
            let rest = self.rest(whole * FEATURES, width);
            let fours = rest.count / 4;
            rest.lanes_tiles::<S, F, VECTORS, 4>(fours);
            let rest = rest.rest(fours * 4, width);
            rest.lanes_tiles::<S, F, VECTORS, 1>(rest.count);
        }
    }

    unsafe fn lanes_tiles<S: Simd, F: Format, const VECTORS: usize, const FEATURES: usize>(self, tiles: usize) {
        if tiles == 0 {
            return;
        }
        let done = tiles * FEATURES;
        let next = if done == self.count { self.next } else { self.weights.wrapping_add(done * self.stride) };
        // SAFETY: the caller's: the product has so many tiles of features.
        unsafe {
            S::enter(Lanes::<F, VECTORS, FEATURES> {
                panel: self.panel,
                k: self.k,
                weights: self.weights,
                stride: self.stride,
                tiles,
                next,
                bias: self.bias,
                out: self.out,
                format: PhantomData,
            });
        }
    }

    /// The dot kernel on a group of `rows` rows; `out_stride` values separate rows of results.
    ///
    /// # Safety
    /// The kernel's requirements hold and the CPU supports `S`.
    pub unsafe fn dot<S: Simd, F: Format>(self, rows: usize, out_stride: usize) {
        // SAFETY: the caller's, for the tile that the rows and the registers fit.
        unsafe {
            // Widening holds each weight vector twice, as words and as fp32, so its tiles are narrower.
            match (rows, S::LANES, matches!(F::KIND, Kind::Bf16)) {
                (1, _, _) => self.dot_of::<S, F, 1, 8>(out_stride),
                (2, 16, false) => self.dot_of::<S, F, 2, 8>(out_stride),
                (2, 16, true) => self.dot_of::<S, F, 2, 6>(out_stride),
                (3, 16, _) => self.dot_of::<S, F, 3, 6>(out_stride),
                (4, 16, false) => self.dot_of::<S, F, 4, 6>(out_stride),
                (4, 16, true) => self.dot_of::<S, F, 4, 4>(out_stride),
                (5, 16, _) => self.dot_of::<S, F, 5, 4>(out_stride),
                (6, 16, _) => self.dot_of::<S, F, 6, 4>(out_stride),
                (7, 16, _) => self.dot_of::<S, F, 7, 3>(out_stride),
                (8, 16, _) => self.dot_of::<S, F, 8, 3>(out_stride),
                (2, _, _) => self.dot_of::<S, F, 2, 4>(out_stride),
                (3, _, false) => self.dot_of::<S, F, 3, 4>(out_stride),
                (3, _, true) => self.dot_of::<S, F, 3, 3>(out_stride),
                (4, _, false) => self.dot_of::<S, F, 4, 3>(out_stride),
                _ => unreachable!("groups have one to eight rows"),
            }
        }
    }

    unsafe fn dot_of<S: Simd, F: Format, const ROWS: usize, const FEATURES: usize>(self, out_stride: usize) {
        let whole = self.count / FEATURES;
        // SAFETY: the caller's: tiles are together as many features as there are.
        unsafe {
            self.dot_tiles::<S, F, ROWS, FEATURES>(whole, out_stride);
            let rest = self.rest(whole * FEATURES, 1);
            rest.dot_tiles::<S, F, ROWS, 1>(rest.count, out_stride);
        }
    }

    unsafe fn dot_tiles<S: Simd, F: Format, const ROWS: usize, const FEATURES: usize>(
        self,
        tiles: usize,
        out_stride: usize,
    ) {
        if tiles == 0 {
            return;
        }
        let done = tiles * FEATURES;
        let next = if done == self.count { self.next } else { self.weights.wrapping_add(done * self.stride) };
        // SAFETY: the caller's: the product has so many tiles of features.
        unsafe {
            S::enter(Dot::<F, ROWS, FEATURES> {
                steps: self.panel,
                k: self.k,
                weights: self.weights,
                stride: self.stride,
                tiles,
                next,
                bias: self.bias,
                out: self.out,
                out_stride,
                format: PhantomData,
            });
        }
    }

    /// Copies `rows` weight rows of `k` elements as fp32.
    ///
    /// # Safety
    /// As for [`WidenWeights`].
    pub unsafe fn widen<S: Simd, F: Format>(
        from: *const u8,
        from_stride: usize,
        rows: usize,
        k: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        // SAFETY: the caller's: rows of `k` elements on both sides.
        unsafe { S::enter(WidenWeights::<F> { from, from_stride, rows, k, to, to_stride, format: PhantomData }) };
    }
}
