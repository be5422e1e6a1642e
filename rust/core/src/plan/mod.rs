//! The plan of a layer, the forms of it that a device completes, and what can be read off it.

mod buckets;
mod ranks;
mod sort;
mod stats;
mod tiles;

pub use buckets::Id;
pub use ranks::{CHUNK_STEP, Chunks, rank};
pub use sort::{PlanError, plan};
pub use stats::{Stats, counts, stats};
pub use tiles::{Tile, TileOrder, most_tiles, tiles};
