//! Heads of which less is held: nothing, the first and the newest tokens, other coordinates, other codecs.

use std::sync::Arc;

use kvpack::amount::Amount;
use kvpack::cache::{Layer, Methods};
use kvpack::compact::{Compactor, Mean};
use kvpack::evict::{Budget, Eviction, Keys};
use kvpack::linalg::Map;
use kvpack::prune::{Pruned, Streaming, Tokens, make};
use kvpack::quantize::{Codecs, Kivi};

use super::filled::{DIM, GROUP, HEADS, Hoard, append, attend, close, codecs, filled, numbers};
use super::threads;

const SINKS: usize = 4;
const WINDOW: usize = 24;

fn with(codecs: Codecs, heads: Vec<Option<Pruned>>) -> Methods {
    let heads = heads.into_iter().enumerate().filter_map(|(h, head)| Some((h, head?)));
    Methods { prune: Some(make(heads).unwrap()), ..codecs.into() }
}

fn streaming(compactor: Option<Arc<dyn Compactor>>) -> Pruned {
    let tokens = Tokens::Streaming(Streaming { sinks: SINKS, window: WINDOW, compactor });
    Pruned { tokens, ..Pruned::default() }
}

fn positions(layer: &Layer, head: usize) -> Vec<u32> {
    layer.head(0, head).unwrap().positions().all()
}

/// Outputs of the query heads of KV head `head`.
fn of_head(outputs: &[f32], head: usize) -> Vec<f32> {
    let each = outputs.chunks_exact(HEADS * GROUP * DIM);
    each.flat_map(|all| all[head * GROUP * DIM..(head + 1) * GROUP * DIM].to_vec()).collect()
}

#[test]
fn maps_of_full_rank_change_nothing() {
    let _alone = threads(2);
    for (codecs, tolerance) in codecs() {
        let map = |seed| Some(Arc::new(Map::hadamard(DIM, seed)));
        let rotated = |seed| Some(Pruned { keys: map(seed), values: map(7), ..Pruned::default() });
        let whole = filled(codecs.clone().into());
        let pruned = filled(with(codecs, vec![rotated(0), rotated(1)]));
        for queries in [1, 5] {
            close(&attend(&pruned, queries), &attend(&whole, queries), tolerance);
        }
    }
}

#[test]
fn a_head_that_is_gone_holds_nothing_and_gives_nothing() {
    let _alone = threads(2);
    for (codecs, _) in codecs() {
        let gone = Pruned { tokens: Tokens::Gone, ..Pruned::default() };
        let whole = filled(codecs.clone().into());
        let mut layer = filled(with(codecs, vec![None, Some(gone)]));
        assert!(positions(&layer, 1).is_empty());
        assert!(layer.memory().total() < whole.memory().total() * 2 / 3);
        for queries in [1, 5] {
            let (got, want) = (attend(&layer, queries), attend(&whole, queries));
            close(&of_head(&got, 0), &of_head(&want, 0), 1e-9);
            assert!(of_head(&got, 1).iter().all(|&x| x == 0.0));
        }
        assert_eq!(layer.lossy(0).0, 191 * 2 * DIM + whole.lossy(0).0 / HEADS);
        layer.crop(3, true).unwrap();
        assert_eq!(layer.seen(), 188);
    }
}

#[test]
fn a_streaming_head_holds_its_first_and_its_newest_tokens() {
    let _alone = threads(2);
    for (codecs, _) in codecs() {
        let whole = filled(codecs.clone().into());
        let mut layer = Layer::new(with(codecs, vec![Some(streaming(None)), None]));
        append(&mut layer, 150, 1);
        let newest = |n: u32, seen: u32| (0..SINKS as u32).chain(seen - n..seen).collect::<Vec<_>>();
        assert_eq!(positions(&layer, 0), newest(WINDOW as u32, 150), "of a first prompt exactly so many are stored");
        assert!(layer.check_crop(1, true).is_err(), "the window before it is gone");
        append(&mut layer, 1, 2);
        assert!(layer.check_crop(1, true).is_ok());
        assert_eq!(positions(&layer, 0), newest(WINDOW as u32 + 1, 151), "one token more does not leave alone");
        append(&mut layer, 40, 3);
        let held = positions(&layer, 0);
        assert_eq!(held[..SINKS], [0, 1, 2, 3]);
        assert!(held.len() >= SINKS + WINDOW && held.len() < SINKS + WINDOW + 8 + 16, "{}", held.len());
        assert_eq!(held.last(), Some(&190));
        for queries in [1, 5] {
            close(&of_head(&attend(&layer, queries), 1), &of_head(&attend(&whole, queries), 1), 1e-9);
        }
        let newest = held.iter().rev().zip((0..191).rev()).take_while(|&(&held, t)| held == t).count();
        let slack = newest - WINDOW;
        assert!(layer.check_crop(slack, true).is_ok());
        assert!(layer.check_crop(slack + 1, true).is_err(), "what left does not come back");
    }
}

#[test]
fn what_a_streaming_head_lets_go_may_take_weight() {
    let _alone = threads(2);
    for (codecs, tolerance) in codecs() {
        let hoard = Arc::new(Hoard::default());
        let whole = filled(codecs.clone().into());
        let heads = (0..HEADS).map(|_| Some(streaming(Some(hoard.clone())))).collect();
        let layer = filled(with(codecs, heads));
        for head in 0..HEADS {
            let mut all: Vec<u32> = hoard.seen.lock().unwrap().iter().filter(|x| x.0 == head).map(|x| x.1).collect();
            all.extend(positions(&layer, head));
            all.sort_unstable();
            assert_eq!(all, (0..191).collect::<Vec<_>>(), "each token is held, or left once");
        }
        for queries in [1, 5] {
            close(&attend(&layer, queries), &attend(&whole, queries), 1e-5 + 2.0 * tolerance);
        }
    }
}

#[test]
fn the_mean_of_what_left_is_one_token_of_their_weight() {
    let _alone = threads(2);
    let layer = filled(with(Codecs::exact(), vec![Some(streaming(Some(Arc::new(Mean)))), None]));
    let held = positions(&layer, 0);
    // The tokens as `filled` appends them, of head 0.
    let parts = [(150, 1), (1, 2), (40, 3)];
    let of = |offset: u64| -> Vec<Vec<f64>> {
        let rows = |(n, seed): (usize, u64)| numbers(HEADS * n * DIM, seed + offset)[..n * DIM].to_vec();
        let all: Vec<f32> = parts.into_iter().flat_map(rows).collect();
        all.chunks_exact(DIM).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
    };
    let (keys, values) = (of(0), of(100));
    let left: Vec<usize> = (0..191).filter(|&t| !held.contains(&(t as u32))).collect();
    let mean = |rows: &[Vec<f64>]| -> Vec<f64> {
        (0..DIM).map(|c| left.iter().map(|&t| rows[t][c]).sum::<f64>() / left.len() as f64).collect()
    };
    let (mean_key, mean_value) = (mean(&keys), mean(&values));
    let q = numbers(HEADS * GROUP * DIM, 9);
    let got = attend(&layer, 1);
    for g in 0..GROUP {
        let logit = |key: &[f64]| q[g * DIM..].iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum::<f64>() * 0.25;
        let (mut sum, mut out) = (0.0, [0.0; DIM]);
        let mut add = |weight: f64, value: &[f64]| {
            sum += weight;
            out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        };
        for &t in &held {
            add(logit(&keys[t as usize]).exp(), &values[t as usize]);
        }
        add(left.len() as f64 * logit(&mean_key).exp(), &mean_value);
        let want: Vec<f32> = out.iter().map(|o| (o / sum) as f32).collect();
        close(&got[g * DIM..(g + 1) * DIM], &want, 1e-5);
    }
}

#[test]
fn a_head_may_have_codecs_of_its_own() {
    let _alone = threads(2);
    let kivi = Codecs::both(Kivi::new(4, 8, 16, 2).unwrap());
    let own = Pruned { codecs: Some(kivi.clone()), ..Pruned::default() };
    let (exact, packed) = (filled(Codecs::exact().into()), filled(kivi.into()));
    let layer = filled(with(Codecs::exact(), vec![None, Some(own)]));
    for queries in [1, 5] {
        let got = attend(&layer, queries);
        close(&of_head(&got, 0), &of_head(&attend(&exact, queries), 0), 1e-9);
        close(&of_head(&got, 1), &of_head(&attend(&packed, queries), 1), 1e-9);
    }
    let between = exact.memory().total() + packed.memory().total();
    assert!(layer.memory().total().abs_diff(between / 2) < 200);
}

#[test]
fn evictions_choose_among_the_tokens_of_the_other_heads() {
    let _alone = threads(2);
    for floor in [None, Some(0.25)] {
        let eviction = Eviction {
            scorer: Arc::new(Keys::KeyDiff),
            budget: Budget { amount: Amount::Tokens(60), pyramid: None },
            sinks: 4,
            recent: Amount::Tokens(8),
            block: Some(8),
            floor,
            protect: Vec::new(),
            closing: None,
        };
        let methods = with(Codecs::exact(), vec![None, Some(streaming(None))]);
        let layer = filled(Methods { eviction: Some(Arc::new(eviction)), ..methods });
        assert!((60..68).contains(&positions(&layer, 0).len()), "{}", positions(&layer, 0).len());
        let held = positions(&layer, 1);
        assert!((SINKS + WINDOW..SINKS + WINDOW + 8).contains(&held.len()), "{}", held.len());
        assert_eq!(held[held.len() - WINDOW..], (191 - WINDOW as u32..191).collect::<Vec<_>>());
    }
}
