//! A layer's sockets, each with a dummy: heads that hold nothing or other coordinates, tokens that leave, layers that share.

use std::sync::{Arc, Mutex};

use kvpack::amount::Amount;
use kvpack::attend::{Partial, Softmax, Summary, SummaryQueries};
use kvpack::cache::{Cache, Layer, LayerQueries, Methods, New, Request};
use kvpack::compact::{Compactor, Forget, Leaving};
use kvpack::evict::{Budget, Eviction, Pattern};
use kvpack::kernels;
use kvpack::linalg::Map;
use kvpack::prune::{Keep, Prune, Pruned};
use kvpack::quantize::{Codecs, Kivi};
use kvpack::share::{Apart, Share};
use kvpack::tensor::{Kept, Slice, View, ViewMut};

use super::threads;

const HEADS: usize = 2;
const GROUP: usize = 3;
const DIM: usize = 16;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (kvpack::linalg::random(seed, i) >> 40) as f32 / (1u32 << 23) as f32 - 1.0).collect()
}

fn append(layer: &mut Layer, n: usize, seed: u64) {
    let (k, v, q) = (
        numbers(HEADS * n * DIM, seed),
        numbers(HEADS * n * DIM, seed + 100),
        numbers(HEADS * GROUP * n * DIM, seed + 200),
    );
    let shape = [1, HEADS, n, DIM];
    let [k, v] = [&k, &v].map(|x| View::of_slice(Slice::F32(x), shape));
    let query = View::of_slice(Slice::F32(&q), [1, HEADS * GROUP, n, DIM]);
    let softmax = Softmax { scaling: 0.25, softcap: None };
    let queries = Some(LayerQueries { query: &query, softmax, sink_logits: None });
    layer.check(&k, &v).unwrap();
    layer.append(&New { k: &k, v: &v, valid: None, queries, flush: true }).unwrap();
}

/// Attention of the newest positions' queries `[queries, heads, DIM]`.
fn attend(layer: &Layer, queries: usize) -> Vec<f32> {
    let heads = HEADS * GROUP;
    let q = numbers(heads * queries * DIM, 9);
    let query = View::of_slice(Slice::F32(&q), [1, heads, queries, DIM]);
    let mut out = vec![0.0; heads * queries * DIM];
    let softmax = Softmax { scaling: 0.25, softcap: None };
    let request = Request { query, mask: None, softmax, sink_logits: None, scores: false };
    let mut view = ViewMut::of_slice(&mut out, [1, queries, heads, DIM]);
    layer.attend(&request, &mut view, kernels::chosen().unwrap()).unwrap();
    out
}

fn close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < tolerance, "{got} {want}");
    }
}

fn filled(methods: Methods) -> Layer {
    let mut layer = Layer::new(methods);
    append(&mut layer, 150, 1);
    append(&mut layer, 1, 2);
    append(&mut layer, 40, 3);
    layer
}

fn codecs() -> [(Codecs, f32); 2] {
    [(Codecs::exact(), 1e-5), (Codecs::both(Kivi::new(8, 8, 16, 2).unwrap()), 0.02)]
}

#[derive(Debug)]
struct Rotated;

impl Prune for Rotated {
    fn head(&self, head: usize, key_dim: usize, value_dim: usize) -> Pruned {
        let map = |dim, seed| Some(Arc::new(Map::hadamard(dim, seed)));
        Pruned::Sliced { keys: map(key_dim, head as u64), values: map(value_dim, 7) }
    }
}

#[derive(Debug)]
struct Without(usize);

impl Prune for Without {
    fn head(&self, head: usize, _: usize, _: usize) -> Pruned {
        if head == self.0 { Pruned::Gone } else { Pruned::Whole }
    }
}

#[test]
fn maps_of_full_rank_and_heads_that_are_kept_change_nothing() {
    let _alone = threads(2);
    for (codecs, tolerance) in codecs() {
        let whole = filled(codecs.clone().into());
        for (prune, tolerance) in [(Arc::new(Rotated) as Arc<dyn Prune>, tolerance), (Arc::new(Keep), 1e-9)] {
            let pruned = filled(Methods { prune: Some(prune), ..codecs.clone().into() });
            for queries in [1, 5] {
                close(&attend(&pruned, queries), &attend(&whole, queries), tolerance);
            }
        }
    }
}

#[test]
fn a_head_that_is_gone_holds_nothing_and_gives_nothing() {
    let _alone = threads(2);
    for (codecs, _) in codecs() {
        let whole = filled(codecs.clone().into());
        let mut layer = filled(Methods { prune: Some(Arc::new(Without(1))), ..codecs.into() });
        assert!(layer.head(0, 1).unwrap().positions().is_empty());
        assert!(layer.memory().total() < whole.memory().total() * 2 / 3);
        for queries in [1, 5] {
            let (got, want) = (attend(&layer, queries), attend(&whole, queries));
            for (got, want) in got.chunks_exact(HEADS * GROUP * DIM).zip(want.chunks_exact(HEADS * GROUP * DIM)) {
                close(&got[..GROUP * DIM], &want[..GROUP * DIM], 1e-9);
                assert!(got[GROUP * DIM..].iter().all(|&x| x == 0.0));
            }
        }
        layer.crop(3, true).unwrap();
        assert_eq!(layer.seen(), 188);
    }
}

/// All tokens that left, one by one.
struct Left {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Summary for Left {
    fn add_to(&self, queries: &SummaryQueries<'_>, partial: &mut Partial) {
        for row in 0..partial.rows() {
            for (key, value) in self.keys.chunks_exact(DIM).zip(self.values.chunks_exact(DIM)) {
                let logit = queries.q.row(row).iter().zip(key).map(|(q, k)| q * k).sum();
                partial.add(row, logit, value);
            }
        }
    }

    fn bytes(&self) -> usize {
        4 * (self.keys.len() + self.values.len())
    }
}

/// Keeps what leaves, and remembers who left.
#[derive(Debug, Default)]
struct Hoard {
    /// Head and position of each, and what had left before.
    seen: Mutex<Vec<(usize, u32)>>,
    kept: Mutex<[(Vec<f32>, Vec<f32>); HEADS]>,
}

impl Compactor for Hoard {
    fn compact(&self, leaving: &Leaving<'_>, before: Option<&Arc<dyn Summary>>) -> Option<Arc<dyn Summary>> {
        let mut seen = self.seen.lock().unwrap();
        assert_eq!(before.is_some(), seen.iter().any(|&(head, _)| head == leaving.head));
        seen.extend(leaving.positions.iter().map(|&p| (leaving.head, p)));
        let (keys, values) = &mut self.kept.lock().unwrap()[leaving.head];
        keys.extend_from_slice(leaving.keys);
        values.extend_from_slice(leaving.values);
        Some(Arc::new(Left { keys: keys.clone(), values: values.clone() }))
    }
}

#[test]
fn what_leaves_is_seen_and_may_go_on_to_take_weight() {
    let _alone = threads(2);
    let eviction = Eviction {
        scorer: Arc::new(Pattern::Newest),
        budget: Budget { amount: Amount::Tokens(60), pyramid: None },
        sinks: 4,
        recent: Amount::Tokens(0),
        block: Some(8),
        floor: None,
        protect: Vec::new(),
        closing: None,
    };
    let whole = filled(Codecs::exact().into());
    let hoard = Arc::new(Hoard::default());
    let methods =
        Methods { eviction: Some(Arc::new(eviction)), compactor: Some(hoard.clone()), ..Codecs::exact().into() };
    let layer = filled(methods.clone());
    let held: Vec<u32> = layer.head(0, 0).unwrap().positions().all();
    assert!(held.len() <= 68 && held.len() >= 60);
    let mut left: Vec<u32> = hoard.seen.lock().unwrap().iter().filter(|(h, _)| *h == 0).map(|&(_, p)| p).collect();
    left.extend(&held);
    left.sort_unstable();
    assert_eq!(left, (0..191).collect::<Vec<_>>(), "each token is held, or left once");
    for queries in [1, 5] {
        close(&attend(&layer, queries), &attend(&whole, queries), 1e-5);
    }
    let forgotten = filled(Methods { compactor: Some(Arc::new(Forget)), ..methods.clone() });
    let evicted = filled(Methods { compactor: None, ..methods });
    close(&attend(&forgotten, 1), &attend(&evicted, 1), 1e-9);
    assert_eq!(forgotten.memory(), evicted.memory());
    assert!(layer.memory().total() > evicted.memory().total());
}

#[derive(Debug)]
struct First;

impl Share for First {
    fn source(&self, _: usize) -> usize {
        0
    }
}

#[test]
fn a_layer_may_read_what_another_holds() {
    let _alone = threads(1);
    let layers = || (0..2).map(|_| Some((Layer::new(Codecs::exact()), true))).collect();
    let kept = |seed| {
        let x = Arc::new(numbers(HEADS * 30 * DIM, seed));
        let view = View::of_slice(Slice::F32(&x), [1, HEADS, 30, DIM]);
        // SAFETY: the numbers are the owner's, and nobody writes them.
        unsafe { Kept::new(view, x.clone()) }
    };
    let mut apart = Cache::new(layers(), 1, true).with_share(&Apart);
    let mut shared = Cache::new(layers(), 1, true).with_share(&First);
    for cache in [&mut apart, &mut shared] {
        cache.load(0, &kept(1).view(), &kept(2).view(), None, 0).unwrap();
    }
    assert_eq!(apart.seen(1).unwrap(), 0);
    assert_eq!((shared.seen(0).unwrap(), shared.seen(1).unwrap()), (30, 30));
    let memory = |cache: &Cache, i| cache.memory(i, &mut std::collections::HashSet::new()).unwrap().total();
    assert_eq!(memory(&shared, 1), 0);
    assert_eq!(memory(&shared, 0), memory(&apart, 0));
    assert_eq!(attend(&shared.layer(1).unwrap(), 1), attend(&apart.layer(0).unwrap(), 1));
    assert!(shared.update(1, kept(3), kept(4), false).is_err(), "it holds nothing of its own");
    assert_eq!(shared.fork().seen(1).unwrap(), 30);
}
