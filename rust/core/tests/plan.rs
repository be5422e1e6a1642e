//! The plan, its tiles and its statistics against the shortest code that does the same.

use moekern_core::plan::{Id, PlanError, TileOrder, counts, most_tiles, plan, stats, tiles};
use proptest::prelude::*;

#[derive(Debug, PartialEq)]
struct Plan {
    order: Vec<i32>,
    inverse: Vec<i32>,
    offsets: Vec<i32>,
}

fn planned<I: Id>(ids: &[I], experts: usize, threads: usize) -> Plan {
    let poison = i32::MIN; // every element must be written
    let mut order = vec![poison; ids.len()];
    let mut inverse = vec![poison; ids.len()];
    let mut offsets = vec![poison; experts + 1];
    plan(ids, &mut order, &mut inverse, &mut offsets, threads).expect("valid sizes");
    Plan { order, inverse, offsets }
}

fn reference(ids: &[i64], experts: usize) -> Plan {
    let bucket = |id: i64| if (0..experts as i64).contains(&id) { id as usize } else { experts };
    let mut order: Vec<i32> = (0..ids.len() as i32).collect();
    order.sort_by_key(|&slot| bucket(ids[slot as usize])); // stable
    let mut inverse = vec![0; ids.len()];
    for (row, &slot) in order.iter().enumerate() {
        inverse[slot as usize] = row as i32;
    }
    let before = |e: usize| ids.iter().filter(|&&id| bucket(id) < e).count() as i32;
    Plan { order, inverse, offsets: (0..=experts).map(before).collect() }
}

/// Deterministic ids in `-1..=experts`, so sentinels of both kinds are among them.
fn scattered(slots: usize, experts: usize) -> Vec<i64> {
    let mut state = 7u64;
    (0..slots)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % (experts as u64 + 2)) as i64 - 1
        })
        .collect()
}

proptest! {
    #[test]
    fn any_ids(ids in prop::collection::vec(any::<i64>(), 0..200), experts in 1usize..300, threads in 1usize..5) {
        prop_assert_eq!(planned(&ids, experts, threads), reference(&ids, experts));
    }

    #[test]
    fn ids_in_and_around_the_range(
        (experts, ids) in (1i64..70).prop_flat_map(|e| (Just(e as usize), prop::collection::vec(-2..e + 2, 0..600))),
        threads in 1usize..5,
    ) {
        prop_assert_eq!(planned(&ids, experts, threads), reference(&ids, experts));
    }

    #[test]
    fn every_width(ids in prop::collection::vec(any::<u8>(), 0..300), experts in 1usize..400) {
        let wide: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
        let expected = reference(&wide, experts);
        prop_assert_eq!(&planned(&ids, experts, 2), &expected);
        prop_assert_eq!(&planned(&ids.iter().map(|&id| id.into()).collect::<Vec<u16>>(), experts, 2), &expected);
        prop_assert_eq!(&planned(&ids.iter().map(|&id| id.into()).collect::<Vec<i32>>(), experts, 2), &expected);
    }

    #[test]
    fn tiles_cover_every_row_once_and_evenly(
        ids in prop::collection::vec(-1i64..9, 0..400), height in 1usize..70,
    ) {
        let offsets = planned(&ids, 8, 1).offsets;
        let by_expert = tiles(&offsets, height, TileOrder::ByExpert);
        prop_assert!(by_expert.len() <= most_tiles(ids.len(), 8, height));
        let mut next = 0;
        for tile in &by_expert {
            prop_assert_eq!(tile.first_row, next);
            next += tile.rows;
            let expert = tile.expert as usize;
            prop_assert!(offsets[expert] <= tile.first_row && next <= offsets[expert + 1]);
        }
        prop_assert_eq!(next, offsets[8]);
        for (expert, count) in counts(&offsets).enumerate() {
            let rows: Vec<i32> = by_expert.iter().filter(|t| t.expert as usize == expert).map(|t| t.rows).collect();
            prop_assert_eq!(rows.len(), (count as usize).div_ceil(height));
            if let (Some(max), Some(min)) = (rows.iter().max(), rows.iter().min()) {
                prop_assert!(*max as usize <= height && max - min <= 1 && *min >= 1);
            }
        }

        let longest_first = tiles(&offsets, height, TileOrder::LongestFirst);
        prop_assert!(longest_first.windows(2).all(|t| t[0].rows > t[1].rows
            || (t[0].rows == t[1].rows && t[0].first_row < t[1].first_row)));
        let mut same = longest_first;
        same.sort_by_key(|tile| tile.first_row);
        prop_assert_eq!(same, by_expert);
    }

    #[test]
    fn statistics(ids in prop::collection::vec(-1i64..7, 0..300)) {
        let offsets = planned(&ids, 6, 1).offsets;
        let loads: Vec<u32> = (0..6).map(|e| ids.iter().filter(|&&id| id == e).count() as u32).collect();
        prop_assert_eq!(&counts(&offsets).collect::<Vec<_>>(), &loads);
        let total: u32 = loads.iter().sum();
        let s = stats(&offsets);
        prop_assert_eq!(s.max_load, *loads.iter().max().unwrap());
        prop_assert_eq!(s.mean_load, f64::from(total) / 6.0);
        prop_assert_eq!(s.empty_experts as usize, loads.iter().filter(|&&l| l == 0).count());
        prop_assert!((0.0..=6f64.ln() + 1e-12).contains(&s.entropy), "{}", s.entropy);
    }
}

#[test]
fn extreme_ids_are_sentinels() {
    let ids = [i64::MIN, 1, i64::MAX, 1 << 32, -1, 0, (1 << 32) + 1, 2];
    assert_eq!(planned(&ids, 2, 1), reference(&ids, 2));
    let ids = [i32::MIN, 1, i32::MAX, -1, 0, 2];
    assert_eq!(planned(&ids, 2, 1), reference(&ids.map(i64::from), 2));
    let ids = [u16::MAX, 0, 1, 2];
    assert_eq!(planned(&ids, 2, 1), reference(&ids.map(i64::from), 2));
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    for experts in [1, 8, 64, 1024, 5000] {
        for slots in [1 << 12, (1 << 17) + 13, 200_003] {
            let ids = scattered(slots, experts);
            let expected = planned(&ids, experts, 1);
            if experts <= 64 {
                assert_eq!(expected, reference(&ids, experts));
            }
            for threads in [2, 3, 4, 16] {
                assert_eq!(planned(&ids, experts, threads), expected, "{slots} slots, {threads} threads");
            }
        }
    }
}

#[test]
fn sizes_beyond_the_caches() {
    for (slots, experts) in [(1 << 19, 64), ((1 << 19) + 5, 1), ((1 << 20) + 3, 300)] {
        let ids = scattered(slots, experts);
        let expected = planned(&ids, experts, 1);
        assert!(expected.order.windows(2).all(|pair| {
            let key = |slot: i32| (ids[slot as usize].rem_euclid(1 << 32).min(experts as i64), slot);
            key(pair[0]) < key(pair[1])
        }));
        assert!(expected.order.iter().enumerate().all(|(row, &slot)| expected.inverse[slot as usize] == row as i32));
        assert_eq!(planned(&ids, experts, 3), expected);
    }
}

#[test]
fn more_experts_than_16_bits_count() {
    for experts in [65_534, 65_535, 65_536, 70_000] {
        let ids: Vec<i64> = scattered(200_003, experts);
        let expected = planned(&ids, experts, 1);
        let bucket = |slot: &i32| ids[*slot as usize].rem_euclid(1 << 32).min(experts as i64);
        assert!(expected.order.is_sorted_by_key(|slot| (bucket(slot), *slot)));
        for (row, slot) in expected.order.iter().enumerate() {
            assert_eq!(expected.inverse[*slot as usize], row as i32);
        }
        assert_eq!(planned(&ids, experts, 2), expected);
    }
}

#[test]
fn one_expert_takes_all() {
    let slots = 1 << 17;
    let plan = planned(&vec![5i32; slots], 1024, 4);
    assert!((0..slots).all(|i| plan.order[i] == i as i32 && plan.inverse[i] == i as i32));
    assert_eq!(plan.offsets, (0..=1024).map(|e| if e > 5 { slots as i32 } else { 0 }).collect::<Vec<_>>());
    let s = stats(&plan.offsets);
    assert_eq!((s.max_load, s.entropy, s.empty_experts), (slots as u32, 0.0, 1023));
}

#[test]
fn an_even_load_has_the_largest_entropy() {
    let ids: Vec<u16> = (0..640).map(|i| i % 64).collect();
    let s = stats(&planned(&ids, 64, 1).offsets);
    assert!((s.entropy - 64f64.ln()).abs() < 1e-12);
    assert_eq!((s.max_load, s.mean_load, s.empty_experts), (10, 10.0, 0));
}

#[test]
fn only_sentinels_and_nothing_at_all() {
    for ids in [vec![], vec![-1i64; 70]] {
        let plan = planned(&ids, 3, 2);
        assert_eq!(plan, reference(&ids, 3));
        assert_eq!(plan.offsets, [0; 4]);
        assert!(tiles(&plan.offsets, 16, TileOrder::LongestFirst).is_empty());
        let s = stats(&plan.offsets);
        assert_eq!((s.max_load, s.mean_load, s.entropy, s.empty_experts), (0, 0.0, 0.0, 3));
    }
}

#[test]
fn wrong_lengths_are_refused() {
    let (mut a, mut b, mut offsets) = ([0; 3], [0; 2], [0; 3]);
    let ids = [0i32; 3];
    let length = |output| Err(PlanError::Length { output, got: 2, expected: 3 });
    assert_eq!(plan(&ids, &mut a.clone(), &mut b, &mut offsets, 1), length("inverse"));
    assert_eq!(plan(&ids, &mut b, &mut a, &mut offsets, 1), length("order"));
    assert_eq!(plan(&ids, &mut a.clone(), &mut a, &mut [0], 1), Err(PlanError::Experts(0)));
    assert_eq!(plan(&ids, &mut a.clone(), &mut a, &mut [], 1), Err(PlanError::Experts(0)));
}
