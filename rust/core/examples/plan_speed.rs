//! Prints the planner's time a slot, for several numbers of experts and kinds of routing.

use std::time::Instant;

use moekern_core::plan::plan;

fn main() {
    let slots = 1 << 18;
    for experts in [8, 64, 128, 256, 1024] {
        for (name, ids) in [
            ("uniform", uniform(slots, experts)),
            ("one expert", vec![3; slots]),
            ("sorted", (0..slots).map(|s| (s * experts / slots) as i64).collect()),
        ] {
            let one = median(&ids, experts, 1);
            let two = median(&ids, experts, 2);
            println!("{experts:5} experts, {name:10}: {one:.2} ns a slot on one thread, {two:.2} on two");
        }
    }
}

fn uniform(slots: usize, experts: usize) -> Vec<i64> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) % experts as u64) as i64
    };
    (0..slots).map(|_| next()).collect()
}

fn median(ids: &[i64], experts: usize, threads: usize) -> f64 {
    let mut order = vec![0; ids.len()];
    let mut inverse = vec![0; ids.len()];
    let mut offsets = vec![0; experts + 1];
    let mut times: Vec<f64> = (0..51)
        .map(|_| {
            let start = Instant::now();
            plan(ids, &mut order, &mut inverse, &mut offsets, threads).expect("valid sizes");
            start.elapsed().as_nanos() as f64 / ids.len() as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
