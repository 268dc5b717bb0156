//! A codec of KVQuant with made-up tables.

use std::sync::Arc;

use kvpack::attend::Rope;
use kvpack::quantize::{Codec, KvQuant, Method, StaticKeys};

/// Keys of `dim` numbers, the first `turned` of which are rotated in pairs.
pub fn kvquant(bits: u8, heads: usize, dim: usize, turned: u16, outliers: f32) -> Codec {
    let half = 1 << (bits - 1);
    let levels: Vec<f32> = (-half..half).map(|i| (i as f32 + 0.4) / half as f32).collect();
    let pairs: Vec<(u16, u16)> = (0..turned / 2).map(|i| (i, i + turned / 2)).collect();
    let frequencies: Vec<f32> = (0..pairs.len()).map(|i| 0.8f32.powi(i as i32)).collect();
    let ends = |sign: f32| {
        let of_head = |h: usize| (0..dim).map(|c| sign * (0.5 + ((c + h) % 7) as f32 / 10.0)).collect();
        (0..heads).map(of_head).collect()
    };
    let keys = StaticKeys { low: ends(-0.9), high: ends(1.0), rope: Rope::shared(&pairs, &frequencies) };
    let method =
        |keys| Method::KvQuant(Arc::new(KvQuant::new(bits, &levels, [1.05, 0.01], outliers, 3, 4, keys).unwrap()));
    Codec { keys: method(Some(keys)), values: method(None) }
}
