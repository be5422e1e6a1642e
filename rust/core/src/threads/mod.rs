//! Threads of the package's own, and how work is shared out among them.

mod affinity;
mod bandwidth;
pub(crate) mod jobs;
pub(crate) mod pool;

pub use bandwidth::memory_rate;
pub use pool::{parallel, parallel_while};
