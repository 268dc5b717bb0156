//! Decode attention of one layer: nanoseconds a cached token, by codec, head shape and context.
//!
//! `cargo bench --bench decode -- "kivi4/9-3-64"` runs a part of it. Several layers take turns, so that a layer's bytes
//! come from memory as they do in a model.

use std::cell::LazyCell;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvpack::attend::Softmax;
use kvpack::cache::{Layer, New, Request};
use kvpack::kernels;
use kvpack::quantize::{Block, Codecs, Graded, Kivi, Rotated, Spacing};
use kvpack::tensor::{Slice, View, ViewMut};
use kvquant::kvquant;

#[path = "../src/tests/kvquant.rs"]
mod kvquant;

/// Bytes that all layers together read, at least: beyond the last cache level.
const WORKING_SET: usize = 96 << 20;

fn numbers(n: usize) -> Vec<f32> {
    let mut state = 88_172_645_463_325_252u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn filled(codec: &Codecs, heads: usize, dim: usize, tokens: usize) -> Layer {
    let mut layer = Layer::new(codec.clone());
    let step = 2048.min(tokens);
    let x = numbers(heads * step * dim);
    for _ in 0..tokens / step {
        let view = View::of_slice(Slice::F32(&x), [1, heads, step, dim]);
        layer.append(&New { k: &view, v: &view, valid: None, queries: None, flush: true }).expect("tokens fit");
    }
    layer
}

fn decode(c: &mut Criterion) {
    let kivi = |bits| Codecs::both(Kivi::new(bits, 32, 128, 4).expect("KIVI's own defaults"));
    let block = |bits| Codecs::both(Block::new(bits, 0, 0).expect("its defaults"));
    let spaced = |bits, spacing| Rotated::new(bits, spacing, 0, 128, 4, 0).expect("its defaults");
    let rotated = |bits| spaced(bits, Spacing::Uniform);
    let graded = |bits| {
        Codecs::new(Arc::new(Graded::new(bits, 128, 128, 4).expect("its defaults")), Arc::new(rotated(2))).unwrap()
    };
    let codecs = [
        ("exact", Codecs::exact()),
        ("kivi8", kivi(8)),
        ("kivi4", kivi(4)),
        ("kivi3", kivi(3)),
        ("kivi2", kivi(2)),
        ("q8", block(8)),
        ("q4", block(4)),
        ("rotated4", Codecs::both(rotated(4))),
        ("rotated2", Codecs::both(rotated(2))),
        ("lloyd-max4", Codecs::both(spaced(4, Spacing::LloydMax))),
        ("lloyd-max2", Codecs::both(spaced(2, Spacing::LloydMax))),
        ("graded3", graded(3.0)),
    ];
    let kernels = kernels::chosen().expect("KVPACK_ISA");
    let shapes = [(9, 3, 64), (32, 8, 128), (16, 16, 128), (4, 1, 256)];
    let of_model = |(_, heads, dim): (_, usize, usize)| kvquant(4, heads, dim, dim as u16, 0.01);
    let calibrated = shapes.map(|shape| ("kvquant4", of_model(shape), vec![shape]));
    let all = codecs.into_iter().map(|(name, codec)| (name, codec, shapes.to_vec())).chain(calibrated);
    for (name, codec, shapes) in all {
        for (query_heads, heads, dim) in shapes {
            let mut group = c.benchmark_group(format!("{name}/{query_heads}-{heads}-{dim}"));
            for tokens in [2048, 8192, 32768] {
                // Made when the filter of the command line lets them through.
                let layers = LazyCell::new(|| {
                    let layer = filled(&codec, heads, dim, tokens);
                    let copies = (WORKING_SET / layer.memory().total()).clamp(1, 64);
                    (0..copies).map(|_| filled(&codec, heads, dim, tokens)).chain([layer]).collect::<Vec<_>>()
                });
                let q = numbers(query_heads * dim);
                let mut out = vec![0.0; query_heads * dim];
                let mut turn = 0;
                group.throughput(Throughput::Elements(tokens as u64));
                group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
                    let layers: &[Layer] = &layers;
                    b.iter(|| {
                        turn = (turn + 1) % layers.len();
                        let request = Request {
                            query: View::of_slice(Slice::F32(&q), [1, query_heads, 1, dim]),
                            mask: None,
                            softmax: Softmax { scaling: 0.1, softcap: None },
                            sink_logits: None,
                            scores: false,
                        };
                        let mut out = ViewMut::of_slice(&mut out, [1, 1, query_heads, dim]);
                        layers[turn].attend(&request, &mut out, kernels).expect("shapes fit");
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(15).warm_up_time(std::time::Duration::from_millis(300))
        .measurement_time(std::time::Duration::from_millis(1500));
    targets = decode
}
criterion_main!(benches);
