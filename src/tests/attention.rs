//! A layer's attention against softmax(q k / sqrt(d)) v in f64 over the keys and values that it says it holds.

use kvpack::attend::{Mask, MaskData, Softmax};
use kvpack::cache::{Layer, New, Request, Which};
use kvpack::kernels::{Kernels, available};
use kvpack::quantize::{Block, Codecs, Graded, Kivi, Rotated, Spacing};
use kvpack::tensor::{Slice, View, ViewMut};
use ndarray::ArrayView4;
use std::sync::Arc;

use super::kvquant::kvquant;
use super::threads;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u32 << 22) as f32 - 2.0
        })
        .collect()
}

/// Sizes of one case.
struct Case {
    codec: Codecs,
    batch: usize,
    heads: usize,
    group: usize,
    key_dim: usize,
    value_dim: usize,
    /// Tokens of each forward.
    forwards: Vec<usize>,
}

fn append(layer: &mut Layer, case: &Case, n: usize, valid: Option<&[bool]>, seed: u64) {
    let k = numbers(case.batch * case.heads * n * case.key_dim, seed);
    let v = numbers(case.batch * case.heads * n * case.value_dim, seed + 1000);
    let k = View::of_slice(Slice::F32(&k), [case.batch, case.heads, n, case.key_dim]);
    let v = View::of_slice(Slice::F32(&v), [case.batch, case.heads, n, case.value_dim]);
    layer.check(&k, &v).unwrap();
    layer.append(&New { k: &k, v: &v, valid, queries: None, flush: false }).unwrap();
}

/// All keys and values, at their positions.
fn dense(layer: &Layer, case: &Case, kernels: &'static Kernels) -> (Vec<f32>, Vec<f32>) {
    let shape = |d| [case.batch, case.heads, layer.seen(), d];
    let mut k = vec![0.0f32; shape(case.key_dim).iter().product()];
    let mut v = vec![0.0f32; shape(case.value_dim).iter().product()];
    layer.write(Which::Keys, Some(0), ViewMut::of_slice(&mut k, shape(case.key_dim)), kernels);
    layer.write(Which::Values, Some(0), ViewMut::of_slice(&mut v, shape(case.value_dim)), kernels);
    (k, v)
}

/// The textbook, in f64. `visible(row, query, position)`.
fn reference(
    case: &Case,
    (k, v): &(Vec<f32>, Vec<f32>),
    q: &[f32],
    [queries, seen]: [usize; 2],
    softmax: Softmax,
    sink_logits: Option<&[f32]>,
    visible: &dyn Fn(usize, usize, usize) -> bool,
) -> Vec<f64> {
    let query_heads = case.heads * case.group;
    let mut out = vec![0.0; case.batch * queries * query_heads * case.value_dim];
    for b in 0..case.batch {
        for head in 0..query_heads {
            let kv = b * case.heads + head / case.group;
            for i in 0..queries {
                let q = &q[((b * query_heads + head) * queries + i) * case.key_dim..][..case.key_dim];
                let mut logits: Vec<(usize, f64)> = (0..seen)
                    .filter(|&p| visible(b, i, p))
                    .map(|p| {
                        let k = &k[(kv * seen + p) * case.key_dim..][..case.key_dim];
                        let s = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                        let s = s * f64::from(softmax.scaling);
                        (p, softmax.softcap.map_or(s, |c| f64::from(c) * (s / f64::from(c)).tanh()))
                    })
                    .collect();
                let max = logits.iter().map(|x| x.1).fold(f64::NEG_INFINITY, f64::max);
                let mut sum: f64 = logits.iter().map(|x| (x.1 - max).exp()).sum();
                sum += sink_logits.map_or(0.0, |s| (f64::from(s[head]) - max).exp());
                for (p, s) in logits.drain(..) {
                    let w = (s - max).exp() / sum;
                    for c in 0..case.value_dim {
                        out[((b * queries + i) * query_heads + head) * case.value_dim + c] +=
                            w * f64::from(v[(kv * seen + p) * case.value_dim + c]);
                    }
                }
            }
        }
    }
    out
}

#[allow(clippy::too_many_arguments)] // one a part of the equation
fn attend<'a>(
    layer: &Layer,
    case: &Case,
    q: &'a [f32],
    queries: usize,
    mask: Option<Mask<'a>>,
    softmax: Softmax,
    sink_logits: Option<&'a [f32]>,
    kernels: &'static Kernels,
) -> Vec<f32> {
    let query_heads = case.heads * case.group;
    let query = View::of_slice(Slice::F32(q), [case.batch, query_heads, queries, case.key_dim]);
    let shape = [case.batch, queries, query_heads, case.value_dim];
    let mut out = vec![f32::NAN; shape.iter().product()];
    let request = Request { query, mask, softmax, sink_logits, scores: false };
    layer.attend(&request, &mut ViewMut::of_slice(&mut out, shape), kernels).unwrap();
    out
}

fn assert_close(codec: &Codecs, got: &[f32], want: &[f64], what: &str) {
    // Packed codes are read with queries and weights that are rounded to integers.
    let bound = if format!("{:?}", codec.keys) == "Exact" { 2e-5 } else { 1e-4 };
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((f64::from(*g) - w).abs() < bound * w.abs().max(1.0), "{what}: out[{i}] is {g}, not {w}");
    }
}

fn cases() -> Vec<Case> {
    let kivi = |bits, group, window, sinks| Codecs::both(Kivi::new(bits, group, window, sinks).unwrap());
    let block = |bits| Codecs::both(Block::new(bits, 0, 0).unwrap());
    let rotated = |bits, group| Codecs::both(Rotated::new(bits, Spacing::Uniform, group, 16, 4, 7).unwrap());
    let graded = |bits, group, window| {
        Codecs::new(
            Arc::new(Graded::new(bits, group, window, 4).unwrap()),
            Arc::new(Rotated::new(2, Spacing::Uniform, 0, 100, 4, 7).unwrap()),
        )
        .unwrap()
    };
    let lloyd_max = |bits, group| Codecs::both(Rotated::new(bits, Spacing::LloydMax, group, 16, 4, 7).unwrap());
    let case = |codec, batch, heads, group, key_dim, value_dim, forwards: &[usize]| Case {
        codec,
        batch,
        heads,
        group,
        key_dim,
        value_dim,
        forwards: forwards.to_vec(),
    };
    vec![
        case(block(8), 1, 2, 3, 64, 64, &[300, 1, 1, 5, 1]),
        case(block(4), 2, 1, 1, 40, 72, &[131, 1, 90, 1]),
        case(rotated(2, 0), 1, 2, 9, 64, 64, &[300, 1, 1, 5, 1]),
        case(rotated(3, 16), 2, 1, 2, 40, 7, &[131, 1, 90, 1]),
        case(rotated(4, 64), 1, 1, 3, 96, 128, &[520, 1]),
        case(rotated(8, 0), 1, 1, 1, 7, 5, &[131, 1]),
        case(lloyd_max(2, 0), 1, 2, 3, 64, 64, &[300, 1, 1, 5, 1]),
        case(lloyd_max(3, 16), 2, 1, 2, 40, 7, &[131, 1, 90, 1]),
        case(lloyd_max(4, 64), 1, 1, 3, 96, 128, &[520, 1]),
        case(kvquant(3, 2, 64, 64, 0.02), 1, 2, 3, 64, 64, &[300, 1, 1, 5, 1]),
        case(kvquant(2, 1, 40, 30, 0.1), 2, 1, 2, 40, 7, &[131, 1, 90, 1]),
        case(kvquant(4, 1, 96, 0, 0.0), 1, 1, 3, 96, 128, &[520, 1]),
        case(graded(3.0, 128, 128), 1, 2, 3, 64, 64, &[300, 1, 1, 5, 1, 130, 1]),
        case(graded(2.25, 32, 64), 2, 1, 2, 40, 72, &[131, 1, 90, 1]),
        case(graded(5.0, 16, 32), 1, 1, 5, 128, 128, &[700, 1]),
        case(Codecs::exact(), 1, 1, 1, 8, 8, &[1]),
        case(Codecs::exact(), 2, 3, 3, 64, 64, &[131, 1, 1, 70, 1]),
        case(Codecs::exact(), 1, 2, 5, 40, 72, &[300, 1]),
        case(Codecs::exact(), 1, 1, 2, 7, 5, &[67, 3]),
        case(kivi(4, 32, 128, 4), 2, 3, 3, 64, 64, &[301, 1, 1, 1]),
        case(kivi(2, 32, 128, 4), 1, 2, 4, 128, 128, &[1, 420, 5, 1]),
        case(kivi(8, 8, 8, 0), 1, 1, 8, 40, 72, &[9, 9, 9, 1, 1, 1]),
        case(kivi(3, 16, 32, 1), 1, 2, 1, 80, 48, &[259, 33, 1]),
        case(kivi(4, 256, 256, 7), 1, 1, 6, 256, 256, &[531, 1]),
        case(kivi(2, 24, 48, 4), 1, 1, 2, 36, 100, &[333, 1]),
    ]
}

#[test]
fn attention_is_that_over_what_is_held() {
    std::thread::scope(|scope| {
        for (number, case) in cases().into_iter().enumerate() {
            scope.spawn(move || assert_attends_to_what_is_held(number, &case));
        }
    });
}

fn assert_attends_to_what_is_held(number: usize, case: &Case) {
    let mut layer = Layer::new(case.codec.clone());
    for (step, &n) in case.forwards.iter().enumerate() {
        append(&mut layer, case, n, None, step as u64);
        let q = numbers(case.batch * case.heads * case.group * n * case.key_dim, 99 + step as u64);
        let seen = layer.seen();
        let causal = |_: usize, i: usize, p: usize| p + n <= seen + i;
        let dense = dense(&layer, case, available()[0]);
        for (softcap, with_sinks) in [(None, false), (Some(3.0), false), (None, true)] {
            let softmax = Softmax { scaling: (case.key_dim as f32).powf(-0.5), softcap };
            let sinks = numbers(case.heads * case.group, 5);
            let sink_logits = with_sinks.then_some(&sinks[..]);
            let want = reference(case, &dense, &q, [n, seen], softmax, sink_logits, &causal);
            for kernels in available() {
                let got = attend(&layer, case, &q, n, None, softmax, sink_logits, kernels);
                assert_close(&case.codec, &got, &want, &format!("case {number}, step {step}, {}", kernels.name));
            }
        }
        layer.flush().unwrap();
    }
}

/// Enough work that threads are woken, one KV head among them so that its tokens are split.
#[test]
fn threads_agree() {
    let kivi = Codecs::both(Kivi::new(4, 32, 128, 4).unwrap());
    for (codec, heads, tokens, queries) in
        [(kivi.clone(), 1, 60_000, 1), (Codecs::exact(), 3, 20_000, 1), (kivi, 1, 3_000, 50)]
    {
        let case = Case { codec, batch: 1, heads, group: 3, key_dim: 64, value_dim: 64, forwards: vec![] };
        let mut layer = Layer::new(case.codec.clone());
        append(&mut layer, &case, tokens, None, 1);
        layer.flush().unwrap();
        let q = numbers(heads * 3 * queries * 64, 2);
        let mask = vec![1u8; queries * tokens];
        let shown = Mask(MaskData::Bool(ArrayView4::from_shape([1, 1, queries, tokens], &mask[..]).unwrap()));
        let softmax = Softmax { scaling: 0.125, softcap: None };
        let dense = dense(&layer, &case, available()[0]);
        let want = reference(&case, &dense, &q, [queries, tokens], softmax, None, &|_, _, _| true);
        for n in [1, 2, 3] {
            let _alone = threads(n);
            let got = attend(&layer, &case, &q, queries, Some(shown), softmax, None, available()[0]);
            assert_close(&case.codec, &got, &want, &format!("{n} threads"));
        }
    }
}

#[test]
fn masks_decide_and_pads_are_not_stored() {
    let kernels = available()[0];
    let case = Case {
        codec: Codecs::both(Kivi::new(4, 8, 16, 2).unwrap()),
        batch: 2,
        heads: 2,
        group: 2,
        key_dim: 16,
        value_dim: 16,
        forwards: vec![],
    };
    let n = 50;
    let mut valid = vec![true; 2 * n];
    valid[..7].fill(false);
    let mut layer = Layer::new(case.codec.clone());
    append(&mut layer, &case, n, Some(&valid), 3);
    layer.flush().unwrap();
    assert_eq!(layer.head(0, 0).unwrap().positions().runs().collect::<Vec<_>>(), [(7, 43)]);
    assert_eq!(layer.head(1, 1).unwrap().positions().len(), 50);
    let softmax = Softmax { scaling: 0.25, softcap: None };
    for queries in [1, 3] {
        append(&mut layer, &case, queries, None, 4);
        let seen = layer.seen();
        let q = numbers(2 * 4 * queries * 16, 8);
        // An odd mask of its own: every third token is hidden, causality or not.
        let shown: Vec<u8> = (0..2 * queries * seen)
            .map(|i| u8::from(!(i % seen).is_multiple_of(3) && (i / seen / queries == 1 || i % seen >= 7)))
            .collect();
        let mask = Mask(MaskData::Bool(ArrayView4::from_shape([2, 1, queries, seen], &shown[..]).unwrap()));
        let got = attend(&layer, &case, &q, queries, Some(mask), softmax, None, kernels);
        let bias: Vec<f32> = shown.iter().map(|&x| if x == 0 { f32::NEG_INFINITY } else { 0.0 }).collect();
        let additive = Mask(MaskData::Bias(View::of_slice(Slice::F32(&bias), [2, 1, queries, seen])));
        let visible = |b: usize, i: usize, p: usize| shown[(b * queries + i) * seen + p] != 0;
        let want = reference(&case, &dense(&layer, &case, kernels), &q, [queries, seen], softmax, None, &visible);
        assert_close(&case.codec, &got, &want, "boolean mask");
        assert_close(
            &case.codec,
            &attend(&layer, &case, &q, queries, Some(additive), softmax, None, kernels),
            &want,
            "additive mask",
        );
    }
}
