//! Plans once, on one thread, for counting instructions: `plan_once SLOTS EXPERTS`.

use moekern_core::plan::plan;

fn main() {
    let mut numbers = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("a number"));
    let (slots, experts) = (numbers.next().expect("SLOTS"), numbers.next().expect("EXPERTS"));
    let ids = vec![experts as i64 / 2; slots]; // which expert makes no difference to the count
    let (mut order, mut inverse, mut offsets) = (vec![0; slots], vec![0; slots], vec![0; experts + 1]);
    plan(&ids, &mut order, &mut inverse, &mut offsets, 1).expect("valid sizes");
    assert_eq!(offsets[experts] as usize, slots);
}
