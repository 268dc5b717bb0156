//! Loops over exact numbers, against f64.

use super::*;

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
