//! Tiles of sums in registers, from operands whose summed index runs over rows: shared by "nn" and "tn".

pub(crate) mod panels;
pub(crate) mod tiles;
