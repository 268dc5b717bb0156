//! Loops over packed codes, against f64.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn parts_of_tokens(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        heads in 1usize..10, parts in 1usize..5, dim in 1usize..150, width in 1usize..10, seed: u64,
    ) {
        let width = width * LANES;
        let code_words = packed_len(bits, dim, width);
        let mut words = Vec::new();
        for i in 0..parts as u64 {
            words.extend(random_codes(bits, padded_outer(bits, dim), width, seed ^ i));
            words.extend(random_grid(2 * dim, seed ^ (i + 9)));
        }
        check_packed(heads, seed, &Packed {
            words: &words, bits, levels: None, outer: dim, lead: 0, parts, width, lanes: width, codes_step: code_words + 2 * dim,
            grids: Grids::Affine { scales_at: code_words, zeros_at: code_words + dim, step: code_words + 2 * dim },
            lane_scales_at: None, tolerance: 0.0,
        });
    }

    /// A part with a factor a lane, with and without factors of outer rows, as rotated keys and two-sided scales have it.
    #[test]
    fn factors_of_lanes(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        heads in 1usize..10, dim in 1usize..150, lanes in 1usize..20, shift in 0u8..2, scaled: bool, seed: u64,
    ) {
        let lanes = lanes * LANES;
        let mut words = random_codes(bits, padded_outer(bits, dim), lanes, seed);
        let codes = words.len();
        words.extend(random_grid(dim + lanes, seed ^ 9));
        let origin = middle(u8::MAX >> (8 - bits)) + f32::from(shift) / 2.0;
        let grids = if scaled { Grids::Scaled { scales_at: codes, origin, step: 0 } } else { Grids::Plain { origin } };
        check_packed(heads, seed, &Packed {
            words: &words, bits, levels: None, outer: dim, lead: 0, parts: 1, width: lanes, lanes, codes_step: 0,
            grids, lane_scales_at: Some(codes + dim), tolerance: 0.0,
        });
    }

    /// Parts side by side, as groups of channels of a value page are; not all its tokens are read.
    #[test]
    fn parts_of_channels(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        heads in 1usize..10, tokens in 1usize..150, lead in 0usize..16, width in 1usize..6, lanes in 1usize..20, seed: u64,
    ) {
        let (lead, width, lanes) = (lead % block(bits), width * LANES, lanes * LANES);
        let parts = lanes.div_ceil(width);
        let mut words = random_codes(bits, padded_outer(bits, lead + tokens), lanes, seed);
        let scales_at = words.len();
        words.extend(random_grid(2 * parts * tokens, seed ^ 9));
        check_packed(heads, seed, &Packed {
            words: &words, bits, levels: None, outer: tokens, lead, parts, width, lanes, codes_step: 0,
            grids: Grids::Affine { scales_at, zeros_at: scales_at + tokens, step: 2 * tokens },
            lane_scales_at: None, tolerance: 0.0,
        });
    }
}

#[test]
fn sums_of_the_largest_products_do_not_overflow() {
    for (bits, outer) in [(8, 128), (8, 256), (8, 520), (4, 1024), (3, 128), (2, 4096)] {
        let mut words = vec![0; packed_len(bits, outer, LANES)];
        for o in 0..outer {
            put_row(bits, &[u8::MAX >> (8 - bits); LANES], o, &mut words);
        }
        let codes = words.len();
        words.extend([f16::ONE.to_bits()].repeat(outer));
        words.extend([0].repeat(outer));
        let packed = Packed {
            words: &words,
            bits,
            levels: None,
            outer,
            lead: 0,
            parts: 1,
            width: LANES,
            lanes: LANES,
            codes_step: 0,
            grids: Grids::Affine { scales_at: codes, zeros_at: codes + outer, step: 0 },
            lane_scales_at: None,
            tolerance: f32::INFINITY,
        };
        let want = (outer * usize::from(u8::MAX >> (8 - bits))) as f32;
        each_isa(|k| {
            let mut acc = [0.0; LANES];
            let (w, acc_mat) = (vec![-1.0; outer], MatMut::new(&mut acc, 1, LANES));
            (k.add_packed)(Mat::new(&w, 1, outer), &packed, acc_mat, &mut Folded::default(), &mut Ahead::new(&[]));
            assert!(acc.iter().all(|x| (x / -want - 1.0).abs() < 1e-4), "{}, {bits} bits: {acc:?}", k.name);
        });
    }
}
