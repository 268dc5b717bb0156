//! A codec of KVQuant with made-up tables.

use std::sync::Arc;

use kvpack::linalg::Rope;
use kvpack::quantize::{Codecs, KvQuant, KvQuantKeys, KvQuantValues, StaticKeys};

/// Keys of `dim` numbers, the first `rotated` of which are rotated in pairs.
pub fn kvquant(bits: u8, heads: usize, dim: usize, rotated: u16, outliers: f32) -> Codecs {
    let half = 1 << (bits - 1);
    let levels: Vec<f32> = (-half..half).map(|i| (i as f32 + 0.4) / half as f32).collect();
    let pairs: Vec<(u16, u16)> = (0..rotated / 2).map(|i| (i, i + rotated / 2)).collect();
    let frequencies: Vec<f32> = (0..pairs.len()).map(|i| 0.8f32.powi(i as i32)).collect();
    let ends = |sign: f32| {
        let of_head = |h: usize| (0..dim).map(|c| sign * (0.5 + ((c + h) % 7) as f32 / 10.0)).collect();
        (0..heads).map(of_head).collect()
    };
    let keys = StaticKeys { low: ends(-0.9), high: ends(1.0), rope: Rope::shared(&pairs, &frequencies) };
    let method = KvQuant::new(bits, &levels, [1.05, 0.01], outliers, 3, 4).unwrap();
    let values = KvQuantValues(Arc::new(method.clone()));
    Codecs::new(Arc::new(KvQuantKeys::new(method, keys).unwrap()), Arc::new(values)).unwrap()
}
