//! `Layer::memory` against what the allocator really gave, and what sharing saves.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use kvpack::cache::{Layer, New};
use kvpack::quantize::{Block, Codecs, Graded, Kivi, Rotated, Spacing};
use kvpack::tensor::{Slice, View};

use super::{kvquant, threads};

struct Counting;

thread_local! {
    /// Bytes that this thread holds; other tests run beside it.
    static HELD: Cell<isize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's contract is the system allocator's.
        let ptr = unsafe { System.alloc(layout) };
        if !ptr.is_null() {
            HELD.set(HELD.get() + layout.size() as isize);
        }
        ptr
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn held() -> isize {
    HELD.get()
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 7919) % 1000) as f32 / 500.0 - 1.0).collect()
}

fn append(layer: &mut Layer, [batch, heads, n, d]: [usize; 4], x: &[f32]) {
    let view = View::of_slice(Slice::F32(&x[..batch * heads * n * d]), [batch, heads, n, d]);
    layer.append(&New { k: &view, v: &view, valid: None, queries: None, flush: true }).unwrap();
}

fn codecs() -> Vec<Codecs> {
    let kivi = |bits| Codecs::both(Kivi::new(bits, 32, 128, 4).unwrap());
    let block = Block::new(4, 0, 0).unwrap();
    let rotated = Rotated::new(2, Spacing::LloydMax, 0, 128, 4, 0).unwrap();
    let graded = Graded::new(2.5, 128, 128, 4).unwrap();
    vec![
        Codecs::exact(),
        kivi(8),
        kivi(4),
        kivi(3),
        kivi(2),
        Codecs::both(block),
        Codecs::new(Arc::new(graded), Arc::new(rotated)).unwrap(),
    ]
}

#[test]
fn memory_is_what_was_allocated() {
    let _alone = threads(1);
    for codec in codecs() {
        for [heads, d] in [[3, 64], [8, 128], [1, 256]] {
            let x = numbers(heads * 16384 * d);
            for prompt in [1000, 4096, 16384] {
                let before = held();
                let mut layer = Layer::new(codec.clone());
                append(&mut layer, [1, heads, prompt, d], &x);
                for _ in 0..70 {
                    append(&mut layer, [1, heads, 1, d], &x);
                }
                let (counted, real) = (layer.memory().total() as f64, (held() - before) as f64);
                assert!(
                    (counted / real - 1.0).abs() < 0.02,
                    "{codec:?} {heads}x{d} {prompt}: {counted} of {real} bytes"
                );
                drop(layer);
                assert_eq!(held(), before, "a dropped layer holds nothing");
            }
        }
    }
}

/// Its tables are the codec's, and none of the layer's bytes.
#[test]
fn memory_with_calibrated_tables() {
    let _alone = threads(1);
    for [heads, d] in [[3, 64], [8, 128], [1, 256]] {
        let codec = kvquant::kvquant(3, heads, d, d as u16, 0.01);
        let x = numbers(heads * 4096 * d);
        let fill = || {
            let mut layer = Layer::new(codec.clone());
            for n in [4096, 1, 1, 70] {
                append(&mut layer, [1, heads, n, d], &x);
            }
            layer
        };
        drop(fill()); // angles of pages' first positions are made once
        let before = held();
        let layer = fill();
        let (counted, real) = (layer.memory().total() as f64, (held() - before) as f64);
        assert!((counted / real - 1.0).abs() < 0.02, "{heads}x{d}: {counted} of {real} bytes");
        drop(layer);
        assert_eq!(held(), before, "a dropped layer holds nothing");
    }
}

#[test]
fn a_long_decode_grows_as_its_tokens_do() {
    let _alone = threads(1);
    let kivi = Codecs::both(Kivi::new(4, 32, 128, 4).unwrap());
    let x = numbers(3 * 64);
    let mut layer = Layer::new(kivi);
    let mut at = Vec::new();
    for _ in 0..3 {
        for _ in 0..1280 {
            append(&mut layer, [1, 3, 1, 64], &x);
        }
        at.push(layer.memory().total() as f64);
    }
    // 10 pages of keys and of values a stretch, 5 bits a number; the tail keeps its size.
    let per_token = (at[2] - at[1]) / 1280.0;
    let packed = 3.0 * 2.0 * 64.0 * 5.0 / 8.0;
    assert!(per_token / packed < 1.06, "{per_token} bytes a token, packed {packed}");
    assert!(at[0] - 1280.0 * per_token < 2.0 * 3.0 * 2.0 * 64.0 * 4.0 * 200.0);
}

#[test]
fn copies_of_a_prompt_cost_one_prompt() {
    let _alone = threads(1);
    let x = numbers(4 * 3 * 4096 * 64);
    for codec in codecs() {
        let mut single = Layer::new(codec.clone());
        append(&mut single, [1, 3, 4096, 64], &x);
        let one = single.memory().total() as f64;

        // Beams that arrive as four equal rows.
        let before = held();
        let mut beams = Layer::new(codec.clone());
        let rows: Vec<f32> = (0..4).flat_map(|_| x[..3 * 4096 * 64].to_vec()).collect();
        append(&mut beams, [4, 3, 4096, 64], &rows);
        drop(rows);
        let real = (held() - before) as f64;
        assert!(beams.memory().total() as f64 / one < 1.01 && real / one < 1.01, "{codec:?}: {real} for {one}");

        // After a decoded token each, every beam has its own tail, and no more.
        append(&mut beams, [4, 3, 1, 64], &x);
        let tail = 2.0 * 3.0 * 64.0 * 4.0 * 300.0;
        let extra = beams.memory().total() as f64 - one;
        assert!(extra < 3.0 * tail + 20e3, "{codec:?}: {extra} bytes more after a step");

        let mut repeated = single.clone();
        repeated.select(&[0, 0, 0, 0]).unwrap();
        assert!(repeated.memory().total() as f64 / one < 1.01);
    }
}
