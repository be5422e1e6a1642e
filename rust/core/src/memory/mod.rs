//! Memory: what threads keep between calls, and pages of large results.

pub(crate) mod pages;
pub(crate) mod scratch;

pub use pages::{Pages, advise_huge_pages};
