//! How evenly a plan loads the experts.

/// Statistics of a plan. A load is a number of slots an expert has; sentinels belong to none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stats {
    /// The largest load.
    pub max_load: u32,
    /// The mean load.
    pub mean_load: f64,
    /// Entropy of the distribution of slots over experts, in nats: 0 if one expert has all, `ln(experts)` if all
    /// have the same load, 0 too if there are no slots.
    pub entropy: f64,
    /// Experts without slots.
    pub empty_experts: u32,
}

/// The load of each expert.
pub fn counts(offsets: &[i32]) -> impl Iterator<Item = u32> + '_ {
    offsets.windows(2).map(|bounds| (bounds[1] - bounds[0]) as u32)
}

/// Statistics from the offsets of a plan for at least one expert.
pub fn stats(offsets: &[i32]) -> Stats {
    let experts = offsets.len() - 1;
    let total = f64::from(offsets[experts] - offsets[0]);
    let information = |count: u32| {
        let share = f64::from(count) / total;
        -share * share.ln()
    };
    Stats {
        max_load: counts(offsets).max().unwrap_or(0),
        mean_load: total / experts as f64,
        entropy: counts(offsets).filter(|&count| count > 0).map(information).sum::<f64>().abs(), // not -0
        empty_experts: counts(offsets).filter(|&count| count == 0).count() as u32,
    }
}
