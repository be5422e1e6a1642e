//! How a grouped GEMM is cut into pieces that threads draw from a counter.
//!
//! A unit is some rows of one expert, a ticket some features of a unit. Tickets ascend unit by unit, so a thread
//! packs a unit's rows at most once, and a pass that reads another's output may wait for single units: their
//! tickets were drawn earlier, by threads that are running.

use crate::gemm::grouped::Grouped;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Rows of a unit at most: keeps its packed rows within a few megabytes.
const UNIT_ROWS: usize = 512;
/// Weight rows of a ticket while the rows are few and the bytes decide.
const STREAMING: usize = 480;
/// Weight rows handled together; they stay in the second-level cache while all rows of the unit pass by.
pub const BLOCK: usize = 96;

/// Consecutive rows of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Whose rows.
    pub expert: usize,
    /// Rows of the plan, not empty.
    pub rows: Range<usize>,
}

/// The units of all experts that have rows.
///
/// # Safety
/// `args.offsets` is as documented.
pub unsafe fn units(args: &Grouped) -> Vec<Unit> {
    let mut units = Vec::new();
    for expert in 0..args.experts {
        // SAFETY: the caller's: the offsets are as documented.
        let rows = unsafe { args.rows(expert) };
        let pieces = rows.len().div_ceil(UNIT_ROWS);
        let mut start = rows.start;
        for piece in 0..pieces {
            let end = start + (rows.end - start).div_ceil(pieces - piece);
            units.push(Unit { expert, rows: start..end });
            start = end;
        }
    }
    units
}

/// Tickets of one pass over the units, and how far its threads have come.
pub struct Tickets<'a> {
    units: &'a [Unit],
    features: usize,
    block: usize,
    /// First ticket of each unit, then the number of tickets.
    first: Vec<usize>,
    next: AtomicUsize,
    /// Tickets of each unit not yet finished.
    left: Vec<AtomicUsize>,
    failed: AtomicBool,
}

/// A drawn ticket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Index of its unit.
    pub unit: usize,
    /// Features to compute.
    pub features: Range<usize>,
}

impl<'a> Tickets<'a> {
    /// Tickets for `features` features of every unit, each made from `columns` weight rows.
    pub fn new(units: &'a [Unit], features: usize, columns: usize, threads: usize) -> Self {
        let block = BLOCK / columns;
        let streaming = (STREAMING / columns).min(features.div_ceil(block) * block).max(block);
        let scarce = units.len() * features.div_ceil(streaming) < 4 * threads;
        let mut first = vec![0];
        let mut left = Vec::with_capacity(units.len());
        for unit in units {
            let size = if scarce || unit.rows.len() > 64 { block } else { streaming };
            let count = features.div_ceil(size);
            first.push(first.last().unwrap_or(&0) + count);
            left.push(AtomicUsize::new(count));
        }
        let tickets =
            Self { units, features, block, first, next: AtomicUsize::new(0), left, failed: AtomicBool::new(false) };
        debug_assert!(tickets.units.len() == tickets.left.len());
        tickets
    }

    /// The units.
    pub fn units(&self) -> &'a [Unit] {
        self.units
    }

    /// Features of a block.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The ticket numbered `number`, if there is one, looking from unit `from` on.
    fn get(&self, number: usize, from: usize) -> Option<Ticket> {
        if number >= *self.first.last()? {
            return None;
        }
        let mut unit = from;
        while number >= self.first[unit + 1] {
            unit += 1;
        }
        let count = self.first[unit + 1] - self.first[unit];
        // Whole blocks, spread evenly.
        let size = self.features.div_ceil(count).next_multiple_of(self.block);
        let start = (number - self.first[unit]) * size;
        Some(Ticket { unit, features: start.min(self.features)..(start + size).min(self.features) })
    }

    /// Draws the next ticket. `from` is the unit of the caller's last ticket, 0 at first.
    pub fn draw(&self, from: usize) -> Option<Ticket> {
        self.get(self.next.fetch_add(1, Ordering::Relaxed), from)
    }

    /// The ticket that would be drawn now.
    pub fn peek(&self, from: usize) -> Option<Ticket> {
        self.get(self.next.load(Ordering::Relaxed), from)
    }

    /// Reports a ticket's output as written.
    pub fn finish(&self, ticket: &Ticket) {
        self.left[ticket.unit].fetch_sub(1, Ordering::Release);
    }

    /// Waits until all features of a unit are written.
    pub fn wait(&self, unit: usize) {
        let mut spins = 0u32;
        while self.left[unit].load(Ordering::Acquire) > 0 {
            assert!(!self.failed.load(Ordering::Relaxed), "another thread of this call panicked");
            spins += 1;
            if spins < 2000 { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }

    /// Waits until the whole pass is written.
    pub fn wait_all(&self) {
        for unit in 0..self.units.len() {
            self.wait(unit);
        }
    }

    /// To be held while working: a panic then releases the threads that wait.
    pub fn guard(&self) -> Guard<'_> {
        Guard(&self.failed)
    }
}

/// See [`Tickets::guard`].
pub struct Guard<'a>(&'a AtomicBool);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_cover_every_feature_of_every_unit_once() {
        for (features, columns, threads) in
            [(1024, 2, 2), (2048, 1, 1), (8, 1, 3), (1000, 2, 64), (97, 1, 2), (481, 1, 2)]
        {
            let units: Vec<Unit> = [3usize, 64, 65, 512, 1]
                .iter()
                .enumerate()
                .map(|(expert, &rows)| Unit { expert, rows: 0..rows })
                .collect();
            let tickets = Tickets::new(&units, features, columns, threads);
            let mut seen = vec![0; units.len() * features];
            let mut unit = 0;
            while let Some(ticket) = tickets.draw(unit) {
                unit = ticket.unit;
                for f in ticket.features.clone() {
                    seen[unit * features + f] += 1;
                }
                tickets.finish(&ticket);
            }
            assert!(seen.iter().all(|&n| n == 1), "{features} features");
            tickets.wait_all();
        }
    }
}
