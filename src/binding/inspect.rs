//! What a KV head stores packed, laid out plainly, for tests and for the curious.

use crate::cache::KvHead;
use crate::quantize::{KeyPage, PackedKeys, PackedValues, ValuePage};

/// Exact tokens before the packed ones, codes `[tokens, dim]`, scales and zero-points in the order of their groups.
pub(super) type Packed = (usize, Vec<u8>, Vec<f32>, Vec<f32>);

pub(super) fn keys(head: &KvHead) -> Packed {
    let mut out = Packed::default();
    for segment in head.pages().0 {
        match &*segment.page {
            KeyPage::Exact(_) => out.0 += segment.len,
            KeyPage::Kivi(page) => add_keys(page, segment.len, &mut out),
        }
    }
    out
}

fn add_keys(page: &PackedKeys, tokens: usize, (_, codes, scales, zeros): &mut Packed) {
    for t in 0..tokens {
        codes.extend((0..page.dim()).map(|c| page.code(t, c)));
        if t % page.group() == 0 {
            for c in 0..page.dim() {
                let (scale, zero) = page.grid(t, c);
                scales.push(scale);
                zeros.push(zero);
            }
        }
    }
}

pub(super) fn values(head: &KvHead) -> Packed {
    let mut out = Packed::default();
    for segment in head.pages().1 {
        match &*segment.page {
            ValuePage::Exact(_) => out.0 += segment.len,
            ValuePage::Kivi(page) => add_values(page, segment.len, &mut out),
        }
    }
    out
}

fn add_values(page: &PackedValues, tokens: usize, (_, codes, scales, zeros): &mut Packed) {
    for t in 0..tokens {
        codes.extend((0..page.dim()).map(|c| page.code(t, c)));
        for j in 0..page.groups() {
            let (scale, zero) = page.grid(t, j);
            scales.push(scale);
            zeros.push(zero);
        }
    }
}
