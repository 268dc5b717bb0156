//! A layer of which queries see the newest positions only, against one that holds all, with a mask that says the same.

use kvpack::attend::{Mask, MaskData, Softmax};
use kvpack::cache::{Layer, New, Request};
use kvpack::kernels;
use kvpack::linalg::random;
use kvpack::quantize::{Block, Codecs, Kivi, Kvarn};
use kvpack::tensor::{Slice, View, ViewMut};
use ndarray::Array4;

use super::threads;

const HEADS: usize = 2;
const GROUP: usize = 2;
const DIM: usize = 32;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (random(seed, i) >> 40) as f32 / (1u32 << 23) as f32 - 1.0).collect()
}

fn append(layer: &mut Layer, n: usize, valid: Option<&[bool]>) {
    let seed = layer.seen() as u64;
    let [k, v] = [seed, seed + 5000].map(|seed| numbers(HEADS * n * DIM, seed));
    let [k, v] = [&k, &v].map(|x| View::of_slice(Slice::F32(x), [1, HEADS, n, DIM]));
    layer.check(&k, &v).unwrap();
    layer.append(&New { k: &k, v: &v, valid, queries: None, flush: layer.seen() == 0 }).unwrap();
}

/// Attention of the newest positions' queries; with a window as a mask over the newest `columns` positions, if they are given.
fn attend(layer: &Layer, queries: usize, window: usize, columns: Option<usize>) -> Vec<f32> {
    let (heads, seen) = (HEADS * GROUP, layer.seen());
    let q = numbers(heads * queries * DIM, 9);
    let query = View::of_slice(Slice::F32(&q), [1, heads, queries, DIM]);
    let mask = Array4::from_shape_fn((1, 1, queries, columns.unwrap_or(seen)), |(_, _, i, column)| {
        let (position, at) = (seen - columns.unwrap_or(seen) + column, seen - queries + i);
        u8::from(position <= at && at < position + window)
    });
    let mask = columns.map(|_| Mask(MaskData::Bool(mask.view())));
    let softmax = Softmax { scaling: 0.5, softcap: None };
    let request = Request { query, mask, softmax, sink_logits: None, scores: false };
    let mut out = vec![0.0; heads * queries * DIM];
    let mut view = ViewMut::of_slice(&mut out, [1, queries, heads, DIM]);
    layer.attend(&request, &mut view, kernels::chosen().unwrap()).unwrap();
    out
}

fn codecs() -> [(Codecs, f32); 4] {
    [
        (Codecs::exact(), 1e-5),
        (Codecs::both(Kivi::new(8, 8, 16, 2).unwrap()), 0.03),
        (Codecs::both(Kvarn::new(8, 4, 0).unwrap()), 0.06),
        (Codecs::both(Block::new(8, 5, 2).unwrap()), 0.05),
    ]
}

#[test]
fn a_window_is_what_a_mask_would_say() {
    let _guard = threads(2);
    for window in [1, 5, 40, 170, 1000] {
        for (codecs, tolerance) in codecs() {
            let mut sliding = Layer::new(codecs).with_window(Some(window));
            let mut full = Layer::new(Codecs::exact());
            for n in [150, 1, 1, 90, 7, 1, 300, 1] {
                append(&mut full, n, None);
                append(&mut sliding, n, None);
                let expected = attend(&full, n, window, Some(full.seen()));
                let least = sliding.seen().min(window - 1 + n);
                if n < window {
                    // Of a first prompt only what later queries see is held.
                    for columns in [None, Some(least), Some(sliding.seen())] {
                        let got = attend(&sliding, n, window, columns);
                        let worst = got.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                        assert!(worst <= tolerance, "window {window}, {n} new, {columns:?} columns: {worst}");
                    }
                }
                sliding.flush().unwrap();
                full.flush().unwrap();
                let held = sliding.head(0, 0).unwrap().positions().len();
                assert!(held >= sliding.seen().min(window - 1), "window {window}: {held} of {}", sliding.seen());
                assert!(held < window + 32 + 128, "window {window}: {held}");
            }
        }
    }
}

#[test]
fn what_has_left_cannot_be_cropped_into_view() {
    let mut layer = Layer::new(Codecs::exact()).with_window(Some(40));
    append(&mut layer, 39, None);
    assert!(layer.check_crop(39, false).is_ok());
    append(&mut layer, 61, None);
    layer.flush().unwrap();
    let first = layer.head(0, 0).unwrap().positions().first().unwrap() as usize;
    let reachable = 100 - 39 - first;
    assert!(layer.check_crop(reachable, true).is_ok());
    assert!(layer.check_crop(reachable + 1, true).is_err());
    layer.crop(reachable, true).unwrap();
    assert_eq!(layer.seen(), 100 - reachable);
}

#[test]
fn pads_and_windows() {
    let _guard = threads(1);
    let valid: Vec<bool> = (0..100).map(|t| t >= 80).collect();
    let mut layer = Layer::new(Codecs::exact()).with_window(Some(40));
    append(&mut layer, 100, Some(&valid));
    assert_eq!(layer.head(0, 0).unwrap().positions().all(), (80..100).collect::<Vec<u32>>());
    for _ in 0..120 {
        append(&mut layer, 1, None);
        layer.flush().unwrap();
    }
    let held = layer.head(0, 0).unwrap().positions();
    assert!(held.first().unwrap() <= 220 - 39);
    assert!(held.len() < 40 + 32);
}
