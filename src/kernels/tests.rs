//! The scalar kernels against f64, and every other instruction set against the scalar one, at odd sizes.

use half::{bf16, f16};
use proptest::prelude::*;

use super::{Ahead, Kernels, Rotate, Weighed, available, choose, scalar};
use crate::format::codes::{Codes, LANES, Levels, block, packed_len, padded_outer, put_row};
use crate::format::folded::{Folded, largest_word, middle};
use crate::format::packed::{Grids, Packed};
use crate::linalg::{Mat, MatMut};
use crate::tensor::Slice;

/// Reproducible numbers in about -1 .. 1.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

fn random_codes(bits: u8, outer: usize, lanes: usize, seed: u64) -> Vec<u16> {
    let codes: Vec<u8> =
        numbers(outer * lanes, seed).iter().map(|x| ((x + 1.0) * 1e6) as u8 & (u8::MAX >> (8 - bits))).collect();
    let mut words = vec![0; packed_len(bits, outer, lanes)];
    for (o, row) in codes.chunks_exact(lanes).enumerate() {
        put_row(bits, row, o, &mut words);
    }
    words
}

fn random_grid(n: usize, seed: u64) -> Vec<u16> {
    numbers(n, seed).iter().map(|&x| f16::from_f32(x).to_bits()).collect()
}

/// The scalar kernel against the equation in f64 and what rounding may do to it, all others against the scalar one.
fn check_packed(heads: usize, seed: u64, packed: &Packed<'_>) {
    check_packed_with(heads, seed, &Packed { tolerance: f32::INFINITY, ..*packed });
    check_packed_with(heads, seed, packed);
    if packed.bits <= 4 {
        let levels = random_levels(packed.bits, seed);
        check_packed_with(heads, seed, &Packed { levels: Some(&levels), tolerance: f32::INFINITY, ..*packed });
        check_packed_with(heads, seed, &Packed { levels: Some(&levels), ..*packed });
    }
}

/// How much larger the terms of sums of codes are than numbers near 1: codes may all be far from the middle that they are
/// counted from.
fn spread(packed: &Packed<'_>) -> f64 {
    2.0 * f64::from(packed.largest())
}

fn random_levels(bits: u8, seed: u64) -> Levels {
    let mut levels: Vec<u8> = numbers(1 << bits, seed ^ 3).iter().map(|x| ((x + 1.0) * 127.0) as u8).collect();
    levels[0] = 0;
    levels.sort_unstable();
    Levels::new(&levels)
}

fn check_packed_with(heads: usize, seed: u64, packed: &Packed<'_>) {
    let (n, columns) = (packed.outer, packed.columns());
    let (w, stride) = (numbers(heads * n, seed ^ 7), columns + 3);
    let run = |k: &Kernels| {
        let mut acc = vec![1.0; heads * stride];
        let (mut folded, mut ahead) = (Folded::default(), Ahead::new(&[1; 999]));
        // Used before for something else.
        folded.words = vec![7; 3];
        (k.add_packed)(Mat::new(&w, heads, n), packed, MatMut::new(&mut acc, heads, stride), &mut folded, &mut ahead);
        assert!((0..heads * stride).all(|i| i % stride < columns || acc[i] == 1.0), "{} wrote beyond", k.name);
        acc
    };
    let scalar = run(&scalar::KERNELS);
    for i in 0..packed.parts {
        let (grid, (codes, lanes)) = (packed.grid(i), packed.codes(i));
        for g in 0..heads {
            let w: Vec<f64> = w[g * n..(g + 1) * n].iter().map(|&x| x.into()).collect();
            let scaled = |o: usize| w[o] * f64::from(grid.scale(o));
            let lane_scales = packed.lane_scales(i, lanes.len());
            let step =
                (0..n).map(|o| scaled(o).abs()).fold(0.0, f64::max) / f64::from(largest_word(packed.largest(), n));
            for ((at, l), got) in lanes.clone().enumerate().zip(&scalar[g * stride + i * packed.width..]) {
                let code = |o: usize| f64::from(codes.level(packed.lead + o, l));
                let factor = lane_scales.map_or(1.0, |scales| scales[at].to_f64());
                let sum = (0..n).map(|o| scaled(o) * code(o) + w[o] * f64::from(grid.zero(o))).sum::<f64>();
                let want = 1.0 + factor * sum;
                // Half a step a code off the middle, and the roundings of f32.
                let center = f64::from(packed.center());
                let bound = if packed.tolerance > 0.0 { 0.505 } else { 0.0 }
                    * (step * factor).abs()
                    * (0..n).map(|o| (code(o) - center).abs()).sum::<f64>()
                    + 2e-6 * (n as f64 * spread(packed)).max(want.abs());
                assert!((f64::from(*got) - want).abs() <= bound, "{got} is not {want}, bound {bound}");
            }
        }
    }
    let want: Vec<f64> = scalar.into_iter().map(f64::from).collect();
    each_isa(|k| close(k.name, &run(k), &want, n * spread(packed) as usize));
}

fn close(what: &str, got: &[f32], want: &[f64], terms: usize) {
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let bound = 1e-6 * (terms as f64).sqrt() * w.abs().max(1.0) * 8.0;
        assert!((f64::from(*g) - w).abs() <= bound, "{what}[{i}]: {g} is not {w}");
    }
}

/// Calls `test` with the rows in each dtype and as f64.
fn each_dtype(rows: &[f32], mut test: impl FnMut(Slice<'_>, &[f64])) {
    test(Slice::F32(rows), &rows.iter().map(|&x| x.into()).collect::<Vec<_>>());
    let half: Vec<f16> = rows.iter().map(|&x| f16::from_f32(x)).collect();
    test(Slice::F16(&half), &half.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
    let brain: Vec<bf16> = rows.iter().map(|&x| bf16::from_f32(x)).collect();
    test(Slice::Bf16(&brain), &brain.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
}

fn each_isa(mut test: impl FnMut(&'static Kernels)) {
    for kernels in available() {
        test(kernels);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn dot_rows(heads in 1usize..10, n in 0usize..20, d in 1usize..70, seed: u64) {
        let (q, rows, stride) = (numbers(heads * d, seed), numbers(n * d, seed ^ 1), n + 3);
        each_dtype(&rows, |rows, exact| {
            let want: Vec<f64> = (0..heads * n)
                .map(|i| (0..d).map(|c| f64::from(q[i / n * d + c]) * exact[i % n * d + c]).sum())
                .collect();
            each_isa(|k| {
                let mut out = vec![7.0; heads * stride];
                (k.dot_rows)(Mat::new(&q, heads, d), rows, d, MatMut::new(&mut out, heads, stride), &mut Ahead::new(&[1; 999]));
                let got: Vec<f32> = (0..heads * n).map(|i| out[i / n * stride + i % n]).collect();
                close(k.name, &got, &want, d);
                assert!((0..heads).all(|g| out[g * stride + n..(g + 1) * stride].iter().all(|&x| x == 7.0)));
            });
        });
    }

    #[test]
    fn add_rows(heads in 1usize..10, n in 0usize..20, d in 1usize..70, seed: u64) {
        let (w_stride, acc_stride) = (n + 2, d.next_multiple_of(8));
        let (w, rows) = (numbers(heads * w_stride, seed), numbers(n * d, seed ^ 1));
        each_dtype(&rows, |rows, exact| {
            let want: Vec<f64> = (0..heads * d)
                .map(|i| 1.0 + (0..n).map(|t| f64::from(w[i / d * w_stride + t]) * exact[t * d + i % d]).sum::<f64>())
                .collect();
            each_isa(|k| {
                let mut acc = vec![1.0; heads * acc_stride];
                (k.add_rows)(Mat::new(&w, heads, w_stride), rows, d, MatMut::new(&mut acc, heads, acc_stride), &mut Ahead::new(&[1; 999]));
                let got: Vec<f32> = (0..heads * d).map(|i| acc[i / d * acc_stride + i % d]).collect();
                close(k.name, &got, &want, n + 1);
            });
        });
    }

    #[test]
    fn unpack(bits in prop::sample::select(vec![2u8, 3, 4, 8]), blocks in 1usize..9, lanes in 1usize..12, skip in 0usize..12, seed: u64) {
        let (outer, first, lanes) = (blocks * block(bits), skip.min(lanes - 1) * LANES, lanes * LANES);
        let n = lanes - first;
        let words = random_codes(bits, outer, lanes, seed);
        let levels = random_levels(bits.min(4), seed);
        for levels in [None, (bits <= 4).then_some(&levels)] {
            let codes = Codes::new(bits, lanes, blocks, &words).with_levels(levels);
            each_isa(|k| {
                let stride = n + 8;
                let mut out = vec![0.0; outer * stride];
                (k.unpack)(codes, first..lanes, MatMut::new(&mut out, outer, stride));
                let level = |i: usize| f32::from(codes.level(i / n, first + i % n));
                assert!((0..outer * n).all(|i| out[i / n * stride + i % n] == level(i)));
            });
        }
    }

    #[test]
    fn rotate(rows in 1usize..70, columns in 1usize..8, used in 0usize..100, half: bool, seed: u64) {
        let (n, pairs) = (columns * LANES, used * (rows / 2) / 100);
        let pair = |i: usize| if half { (i, i + rows / 2) } else { (2 * i, 2 * i + 1) };
        let pairs: Vec<(u16, u16)> = (0..pairs).map(|i| (pair(i).0 as u16, pair(i).1 as u16)).collect();
        let (x, scale, zero) = (numbers(rows * n, seed), numbers(rows, seed ^ 1), numbers(rows, seed ^ 2));
        let angles = numbers(pairs.len() * n, seed ^ 3);
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|x| ((9.0 * x).cos(), (9.0 * x).sin())).unzip();
        let at = |c: usize, t: usize| f64::from(scale[c]) * f64::from(x[c * n + t]) + f64::from(zero[c]);
        let mut want: Vec<f64> = (0..rows * n).map(|i| at(i / n, i % n)).collect();
        for (i, &(a, b)) in pairs.iter().enumerate() {
            for t in 0..n {
                let (a, b, angle) = (usize::from(a), usize::from(b), 9.0 * f64::from(angles[i * n + t]));
                want[a * n + t] = at(a, t) * angle.cos() - at(b, t) * angle.sin();
                want[b * n + t] = at(a, t) * angle.sin() + at(b, t) * angle.cos();
            }
        }
        let mat = |x| Mat::new(x, pairs.len(), n);
        let rotate = Rotate { scale: &scale, zero: &zero, pairs: &pairs, cos: mat(&cos), sin: mat(&sin) };
        each_isa(|k| {
            let mut got = x.clone();
            (k.rotate)(MatMut::new(&mut got, rows, n), &rotate, n);
            close(k.name, &got, &want, 2);
        });
    }

    /// Parts one behind the other, as groups of tokens of a key page are.
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

    #[test]
    fn softmax(n in 0usize..40, spread in 0f32..200.0, before in -300f32..300.0, seed: u64) {
        let x: Vec<f32> = numbers(n, seed).iter().map(|x| x * spread).collect();
        let max = x.iter().copied().fold(before, f32::max);
        let want: Vec<f64> = x.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).collect();
        each_isa(|k| {
            let mut got = x.clone();
            let Weighed { max: m, sum, heaviest } = softmax_of(k, &mut got, before);
            close(k.name, &[heaviest], &[want.iter().copied().fold(0.0, f64::max)], 1);
            assert_eq!(m, max);
            for (g, w) in got.iter().zip(&want) {
                // Far below the maximum the argument itself is rounded: allow for its last place.
                assert!((f64::from(*g) - w).abs() <= w * 4e-5 + 2e-38, "{}: {g} is not {w}", k.name);
            }
            close(k.name, &[sum], &[want.iter().sum()], n + 1);
        });
    }

    #[test]
    fn matmul(m in 0usize..10, k in 1usize..20, n in 0usize..40, pad in 0usize..3, seed: u64) {
        let (lda, ldb, ldc) = (k + pad, n + pad, n + pad);
        let (a, b) = (numbers(m * lda, seed), numbers(k * ldb, seed ^ 1));
        let want: Vec<f64> = (0..m * n)
            .map(|i| 1.0 + (0..k).map(|p| f64::from(a[i / n * lda + p]) * f64::from(b[p * ldb + i % n])).sum::<f64>())
            .collect();
        each_isa(|isa| {
            let mut c = vec![1.0; m * ldc];
            (isa.matmul)(Mat::new(&a, m, lda), Mat::new(&b, k, ldb), n, MatMut::new(&mut c, m, ldc));
            let got: Vec<f32> = (0..m * n).map(|i| c[i / n * ldc + i % n]).collect();
            close(isa.name, &got, &want, k + 1);
        });
    }
}

/// The softmax of one row, which must not depend on the rows beside it.
fn softmax_of(k: &Kernels, x: &mut [f32], before: f32) -> Weighed {
    let n = x.len();
    let mut one = Weighed::before(before);
    (k.softmax)(MatMut::new(x, 1, n), n, std::slice::from_mut(&mut one));
    one
}

#[test]
fn rows_of_a_softmax_are_apart() {
    let (rows, n, stride) = (7, 37, 40);
    let x = numbers(rows * stride, 5);
    each_isa(|k| {
        let (mut all, mut weighed) = (x.clone(), vec![Weighed::before(f32::NEG_INFINITY); rows]);
        weighed[3].max = 9.0;
        let before = weighed.clone();
        (k.softmax)(MatMut::new(&mut all, rows, stride), n, &mut weighed);
        for g in 0..rows {
            let mut one = x[g * stride..][..n].to_vec();
            assert_eq!(softmax_of(k, &mut one, before[g].max), weighed[g], "{}, row {g}", k.name);
            assert_eq!(one, all[g * stride..][..n]);
            assert_eq!(x[g * stride + n..(g + 1) * stride], all[g * stride + n..(g + 1) * stride]);
        }
    });
}

#[test]
fn masked_logits_weigh_nothing() {
    each_isa(|k| {
        let mut x = vec![0.0; 19];
        x[3] = f32::NEG_INFINITY;
        x[18] = f32::NEG_INFINITY;
        assert_eq!(
            softmax_of(k, &mut x, f32::NEG_INFINITY),
            Weighed { max: 0.0, sum: 17.0, heaviest: 1.0 },
            "{}",
            k.name
        );
        assert_eq!((x[3], x[18], x[0]), (0.0, 0.0, 1.0));
        let mut none = vec![f32::NEG_INFINITY; 11];
        let nothing = Weighed { max: f32::NEG_INFINITY, sum: 0.0, heaviest: 0.0 };
        assert_eq!(softmax_of(k, &mut none, f32::NEG_INFINITY), nothing);
        assert_eq!(none, [0.0; 11]);
        for at in [0, 8, 10] {
            let mut one = vec![0.5; 11];
            one[at] = f32::NAN;
            assert!(softmax_of(k, &mut one, 0.0).sum.is_nan(), "{}: a NaN stays one", k.name);
            assert!(softmax_of(k, &mut [f32::NAN; 11], f32::NEG_INFINITY).sum.is_nan());
        }
    });
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

#[test]
fn the_environment_chooses() {
    assert_eq!(choose(Some("scalar")).unwrap().name, scalar::KERNELS.name);
    assert_eq!(choose(None).unwrap().name, available()[0].name);
    let refused = choose(Some("mmx")).err().expect("no such instruction set").to_string();
    assert!(refused.contains("KVPACK_ISA=mmx") && refused.contains("scalar"), "{refused}");
}
