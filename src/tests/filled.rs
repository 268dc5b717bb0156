//! A small layer that is filled with random tokens, and a compactor that forgets nothing.

use std::sync::{Arc, Mutex};

use kvpack::attend::{Partial, Softmax, Summary, SummaryQueries};
use kvpack::cache::{Layer, LayerQueries, Methods, New, Request};
use kvpack::compact::{Compacted, Compactor, Leaving};
use kvpack::kernels;
use kvpack::quantize::{Codecs, Kivi};
use kvpack::tensor::{Slice, View, ViewMut};

pub const HEADS: usize = 2;
pub const GROUP: usize = 3;
pub const DIM: usize = 16;

pub fn numbers(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (kvpack::linalg::random(seed, i) >> 40) as f32 / (1u32 << 23) as f32 - 1.0).collect()
}

pub fn append(layer: &mut Layer, n: usize, seed: u64) {
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
pub fn attend(layer: &Layer, queries: usize) -> Vec<f32> {
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

pub fn close(got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < tolerance, "{got} {want}");
    }
}

pub fn filled(methods: Methods) -> Layer {
    let mut layer = Layer::new(methods);
    append(&mut layer, 150, 1);
    append(&mut layer, 1, 2);
    append(&mut layer, 40, 3);
    layer
}

pub fn codecs() -> [(Codecs, f32); 2] {
    [(Codecs::exact(), 1e-5), (Codecs::both(Kivi::new(8, 8, 16, 2).unwrap()), 0.02)]
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
pub struct Hoard {
    /// Head and position of each.
    pub seen: Mutex<Vec<(usize, u32)>>,
    kept: Mutex<[(Vec<f32>, Vec<f32>); HEADS]>,
}

impl Compactor for Hoard {
    fn compact(&self, leaving: &Leaving<'_>, before: Option<&Arc<dyn Compacted>>) -> Option<Arc<dyn Compacted>> {
        let mut seen = self.seen.lock().unwrap();
        assert_eq!(before.is_some(), seen.iter().any(|&(head, _)| head == leaving.head));
        seen.extend(leaving.positions.iter().map(|&p| (leaving.head, p)));
        let (keys, values) = &mut self.kept.lock().unwrap()[leaving.head];
        keys.extend_from_slice(leaving.keys);
        values.extend_from_slice(leaving.values);
        Some(Arc::new(Left { keys: keys.clone(), values: values.clone() }))
    }
}
