//! The tile table: a plan's rows cut into pieces a kernel can take one at a time.

/// Rows of one expert that are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The expert.
    pub expert: i32,
    /// The first row, counted over all experts.
    pub first_row: i32,
    /// How many rows, at least one.
    pub rows: i32,
}

/// In which order tiles come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileOrder {
    /// By expert, and by row within it: neighbours share weights.
    ByExpert,
    /// By falling number of rows, those of one length by expert and row: when threads draw tiles one after the
    /// other, the short ones at the end even out when they finish.
    LongestFirst,
}

/// An upper bound on the number of tiles that depends on shapes alone.
pub fn most_tiles(slots: usize, experts: usize, height: usize) -> usize {
    slots / height + experts.min(slots)
}

/// Cuts each expert's rows into as few tiles of at most `height` rows as possible, evenly: their lengths differ by
/// one at most, the longer ones first. Experts without rows have no tile.
///
/// `offsets` is that of a plan; `height` is at least 1.
pub fn tiles(offsets: &[i32], height: usize, order: TileOrder) -> Vec<Tile> {
    assert!(height >= 1, "tiles of no rows");
    let mut tiles = Vec::new();
    for (expert, bounds) in offsets.windows(2).enumerate() {
        let rows = (bounds[1] - bounds[0]) as usize;
        let count = rows.div_ceil(height);
        let mut first_row = bounds[0];
        for i in 0..count {
            let rows = (rows / count + usize::from(i < rows % count)) as i32;
            tiles.push(Tile { expert: expert as i32, first_row, rows });
            first_row += rows;
        }
    }
    if order == TileOrder::LongestFirst {
        tiles.sort_by_key(|tile| std::cmp::Reverse(tile.rows));
    }
    tiles
}
