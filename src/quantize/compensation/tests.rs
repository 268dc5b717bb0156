use super::*;

/// A metric with much off its diagonal.
fn metric(dim: usize) -> Vec<f32> {
    let at = |i: usize, j: usize| (0..3 * dim).map(|t| wave(i, t) * wave(j, t)).sum::<f32>();
    (0..dim * dim).map(|n| at(n / dim, n % dim)).collect()
}

fn wave(i: usize, t: usize) -> f32 {
    ((i * t) as f32 * 0.37).sin() + (t as f32 * 0.11).cos() + 0.1 * ((i * 7 + t * 13) as f32).sin()
}

fn cost(metric: &[f32], error: &[f32]) -> f32 {
    let dim = error.len();
    (0..dim * dim).map(|n| metric[n] * error[n / dim] * error[n % dim]).sum()
}

#[test]
fn compensation_is_gptqs_and_lessens_the_cost() {
    let (dim, n) = (24, 10);
    let h = metric(dim);
    let gptq = Gptq::new(0.01, 0.0, true, Some(vec![h.clone()])).unwrap();
    let factor = gptq.factor(0, &[], None, true).unwrap();
    assert!(factor.gain > 1.5, "{}", factor.gain);
    let x: Vec<f32> = (0..dim * n).map(|i| ((i * i) as f32 * 0.173).sin() * 3.0).collect();
    let mut columns = x.clone();
    factor.correct(&mut columns, n, |_, column| column.iter_mut().for_each(|x| *x = x.round()));
    let error = |columns: &[f32], t: usize| -> Vec<f32> {
        (0..dim).map(|c| x[c * n + t] - columns[c * n + t].round()).collect()
    };
    let total = |columns: &[f32]| (0..n).map(|t| cost(&h, &error(columns, t))).sum::<f32>();
    assert!(total(&columns) < 0.7 * total(&x), "{} {}", total(&columns), total(&x));
    // Given what came before, every number is rounded to where the rest could make up for it best: no single step of
    // the last number is better.
    let last = factor.order().last().unwrap();
    for t in 0..n {
        let own = error(&columns, t);
        for step in [-1.0, 1.0] {
            let mut other = own.clone();
            other[last] += step;
            let damped = |e: &[f32]| {
                cost(&h, e)
                    + 0.01 * (0..dim).map(|i| h[i * dim + i]).sum::<f32>() / dim as f32
                        * e.iter().map(|e| e * e).sum::<f32>()
            };
            assert!(damped(&own) <= damped(&other) * (1.0 + 1e-4));
        }
    }
}

#[test]
fn a_diagonal_metric_changes_nothing() {
    let h: Vec<f32> = (0..64).map(|n| if n % 9 == 0 { 1.0 + n as f32 } else { 0.0 }).collect();
    let factor = Gptq::new(0.1, 0.0, true, Some(vec![h])).unwrap().factor(0, &[], None, true).unwrap();
    let x: Vec<f32> = (0..16).map(|i| i as f32 * 0.3).collect();
    let mut columns = x.clone();
    factor.correct(&mut columns, 2, |_, column| column.iter_mut().for_each(|x| *x = x.round()));
    assert_eq!(columns, x);
    assert!(factor.gain > 1.0);
}

#[test]
fn a_singular_metric_gives_finite_factors() {
    let q: Vec<f32> = (0..32).map(|i| 1e3 * wave(i, 5)).collect();
    let h: Vec<f32> = (0..32 * 32).map(|n| q[n / 32] * q[n % 32]).collect();
    for damping in [LEAST_DAMPING, 1e-2, 0.1] {
        let factor = Gptq::new(damping, 0.0, true, Some(vec![h.clone()])).unwrap().factor(0, &[], None, true).unwrap();
        assert!(factor.gain > 1.0 && factor.gain.is_finite(), "{damping}: {}", factor.gain);
        assert!(factor.rows.iter().all(|t| t.abs() < 1e3), "{damping}");
    }
    for damping in [0.0, LEAST_DAMPING / 2.0, f32::NAN, f32::INFINITY] {
        assert!(Gptq::new(damping, 0.0, true, None).is_err(), "{damping}");
    }
}

#[test]
fn a_rotation_keeps_the_spectrum() {
    let h = metric(16);
    let gptq = Gptq::new(0.1, 0.0, false, Some(vec![h])).unwrap();
    let map = Arc::new(Map::hadamard(16, 1));
    let [plain, mapped] = [None, Some(&map)].map(|map| gptq.factor(0, &[], map, false).unwrap().gain);
    assert!((plain / mapped - 1.0).abs() < 1e-4, "{plain} {mapped}");
}
