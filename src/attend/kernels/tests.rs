//! The scalar kernels against f64, and every other instruction set against the scalar one, at odd sizes.

use half::{bf16, f16};
use proptest::prelude::*;

use super::{Kernels, available, choose, scalar};
use super::{Ahead, Grid};
use crate::attend::codes::{Codes, LANES, block, packed_len, put_row};
use crate::attend::folded::Folded;
use crate::attend::mat::{Mat, MatMut};
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
    fn codes(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]),
        heads in 1usize..10,
        blocks in 1usize..20,
        lanes in 1usize..12,
        first in 0usize..4,
        seed: u64,
    ) {
        let (outer, lanes) = (blocks * block(bits), lanes * LANES);
        let words = random_codes(bits, outer, lanes, seed);
        let codes = Codes::new(bits, lanes, &words);
        let mut folded = Folded::default();
        folded.reset(heads, bits, outer);
        // As large as they may become, with all signs alike in the first row: sums must not overflow.
        let largest = Folded::largest_word(bits, outer);
        for (i, (word, x)) in folded.words.iter_mut().zip(numbers(heads * outer, seed ^ 1)).enumerate() {
            *word = if i < outer { largest as i16 } else { (x * largest) as i16 };
        }
        folded.step = numbers(heads, seed ^ 2);
        folded.offset = numbers(heads, seed ^ 3);
        let range = (first * LANES).min(lanes)..lanes;
        let stride = lanes + 8;
        let want: Vec<f64> = (0..heads * lanes)
            .map(|i| {
                let (g, l) = (i / lanes, i % lanes);
                let sum: i64 = (0..outer).map(|o| i64::from(folded.words[g * outer + o]) * i64::from(codes.get(o, l))).sum();
                let added = f64::from(folded.step[g]) * sum as f64 + f64::from(folded.offset[g]);
                1.0 + if range.contains(&l) { added } else { 0.0 }
            })
            .collect();
        each_isa(|k| {
            let mut acc = vec![1.0; heads * stride];
            (k.add_codes)(&folded, codes, range.clone(), MatMut::new(&mut acc, heads, stride));
            let got: Vec<f32> = (0..heads * lanes).map(|i| acc[i / lanes * stride + i % lanes]).collect();
            close(k.name, &got, &want, 1);
            let mut out = vec![0.0; outer * stride];
            (k.unpack)(codes, MatMut::new(&mut out, outer, stride));
            assert!((0..outer * lanes).all(|i| out[i / lanes * stride + i % lanes] == f32::from(codes.get(i / lanes, i % lanes))));
        });
    }

    #[test]
    fn fold(n in 0usize..80, heads in 1usize..10, lead in 0usize..9, bits in prop::sample::select(vec![2u8, 3, 4, 8]), seed: u64) {
        let stride = n + 3;
        let x = numbers(heads * stride, seed);
        let half = |seed| numbers(n, seed).iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>();
        let (scale, zero) = (half(seed ^ 1), half(seed ^ 2));
        let exact = |g: usize, i: usize, y: &[f16]| f64::from(x[g * stride + i]) * y[i].to_f64();
        let largest = Folded::largest_word(bits, lead + n);
        each_isa(|k| {
            let mut out = Folded::default();
            out.reset(heads, bits, lead + n);
            (k.fold)(Mat::new(&x, heads, stride), Grid { scale: &scale, zero: &zero }, largest, lead, &mut out);
            for g in 0..heads {
                let row = &out.words[g * out.stride..(g + 1) * out.stride];
                let step = f64::from(out.step[g]);
                for i in 0..n {
                    let error = f64::from(row[lead + i]) * step - exact(g, i, &scale);
                    // Half a step, and the rounding of a float of that size.
                    assert!(error.abs() <= 0.505 * step, "{}: off by {error} with step {step}", k.name);
                }
                assert!(row[..lead].iter().chain(&row[lead + n..]).all(|&word| word == 0));
                let max = (0..n).map(|i| exact(g, i, &scale).abs()).fold(0.0, f64::max);
                close(k.name, &[out.step[g] * largest], &[max], 1);
                close(k.name, &[out.offset[g]], &[(0..n).map(|i| exact(g, i, &zero)).sum()], n + 1);
            }
        });
    }

    #[test]
    fn wide_fold_and_codes_agree_with_scalar_ones(
        bits in prop::sample::select(vec![2u8, 3, 4, 8]), n in 1usize..70, lanes in 1usize..9, heads in 1usize..6, seed: u64,
    ) {
        let lanes = lanes * LANES;
        let words = random_codes(bits, n.next_multiple_of(block(bits)), lanes, seed);
        let codes = Codes::new(bits, lanes, &words);
        let x = numbers(heads * n, seed ^ 4);
        let scale: Vec<f16> = numbers(n, seed ^ 5).iter().map(|&x| f16::from_f32(x)).collect();
        let grid = Grid { scale: &scale, zero: &scale };
        let run = |k: &Kernels| {
            let mut folded = Folded::default();
            folded.reset(heads, bits, n);
            (k.fold)(Mat::new(&x, heads, n), grid, Folded::largest_word(bits, n), 0, &mut folded);
            let mut acc = vec![0.0; heads * lanes];
            (k.add_codes)(&folded, codes, 0..lanes, MatMut::new(&mut acc, heads, lanes));
            acc
        };
        let want: Vec<f64> = run(&scalar::KERNELS).into_iter().map(f64::from).collect();
        each_isa(|k| close(k.name, &run(k), &want, n << (bits / 2)));
    }

    #[test]
    fn softmax(n in 0usize..40, spread in 0f32..200.0, before in -300f32..300.0, seed: u64) {
        let x: Vec<f32> = numbers(n, seed).iter().map(|x| x * spread).collect();
        let max = x.iter().copied().fold(before, f32::max);
        let want: Vec<f64> = x.iter().map(|&x| (f64::from(x) - f64::from(max)).exp()).collect();
        each_isa(|k| {
            let mut got = x.clone();
            let (m, sum) = (k.softmax)(&mut got, before);
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

#[test]
fn masked_logits_weigh_nothing() {
    each_isa(|k| {
        let mut x = vec![0.0; 19];
        x[3] = f32::NEG_INFINITY;
        x[18] = f32::NEG_INFINITY;
        assert_eq!((k.softmax)(&mut x, f32::NEG_INFINITY), (0.0, 17.0), "{}", k.name);
        assert_eq!((x[3], x[18], x[0]), (0.0, 0.0, 1.0));
        let mut none = vec![f32::NEG_INFINITY; 11];
        assert_eq!((k.softmax)(&mut none, f32::NEG_INFINITY), (f32::NEG_INFINITY, 0.0));
        assert_eq!(none, [0.0; 11]);
        for at in [0, 8, 10] {
            let mut one = vec![0.5; 11];
            one[at] = f32::NAN;
            assert!((k.softmax)(&mut one, 0.0).1.is_nan(), "{}: a NaN stays one", k.name);
            assert!((k.softmax)(&mut [f32::NAN; 11], f32::NEG_INFINITY).1.is_nan());
        }
    });
}

#[test]
fn the_environment_chooses() {
    assert_eq!(choose(Some("scalar")).unwrap().name, scalar::KERNELS.name);
    assert_eq!(choose(None).unwrap().name, available()[0].name);
    let refused = choose(Some("mmx")).err().expect("no such instruction set").to_string();
    assert!(refused.contains("KVPACK_ISA=mmx") && refused.contains("scalar"), "{refused}");
}
