//! A layer's sockets, each with a dummy: tokens that leave, layers that share.

use std::sync::Arc;

use kvpack::amount::Amount;
use kvpack::cache::{Cache, Layer, Methods};
use kvpack::compact::Forget;
use kvpack::evict::{Budget, Eviction, Pattern};
use kvpack::quantize::Codecs;
use kvpack::share::{Apart, Share};
use kvpack::tensor::{Kept, Slice, View};

use super::filled::{DIM, HEADS, Hoard, attend, close, filled, numbers};
use super::threads;

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
