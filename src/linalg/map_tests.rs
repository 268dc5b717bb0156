use ndarray::Array2;
use proptest::prelude::*;

use super::{Map, Matrix, random};

/// An orthogonal map of `dim` numbers.
fn orthogonal(kind: usize, dim: usize, seed: u64) -> Map {
    match kind {
        0 => Map::Order((0..dim as u16).rev().collect()),
        1 => Map::hadamard(dim, seed),
        2 => Map::Then(orthogonal(1, dim, seed).into(), orthogonal(0, dim, seed).into()),
        3 => {
            let pairs: Vec<(u16, u16)> = (0..dim as u16 / 2).map(|i| (i, i + dim as u16 / 2)).collect();
            let frequencies: Vec<f32> = pairs.iter().map(|&(i, _)| 0.9f32.powi(i.into())).collect();
            Map::clone(&super::Rope::shared(&pairs, &frequencies).map(seed as usize % 4000))
        }
        _ => {
            let hadamard = Map::hadamard(dim, seed);
            let unit = |i: usize| (0..dim).map(|j| f32::from(u8::from(i == j))).collect::<Vec<_>>();
            let columns: Vec<f32> = (0..dim).flat_map(|i| hadamard.apply_rows(&unit(i), dim)).collect();
            let up = Array2::from_shape_vec((dim, dim), columns).unwrap();
            Map::Matrix(Matrix::new(up.t().to_owned(), up).unwrap())
        }
    }
}

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (random(seed, i) >> 40) as f32 / 1e7 - 0.8).collect()
}

fn dot(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum()
}

proptest! {
    #[test]
    fn orthogonal_maps_keep_lengths_and_are_undone(dim in 1usize..130, seed: u64, kind in 0usize..5) {
        let map = orthogonal(kind, dim, seed);
        let x = numbers(dim, seed);
        let y = map.apply_rows(&x, dim);
        prop_assert!((dot(&x, &x) / dot(&y, &y) - 1.0).abs() < 1e-5);
        let mut back = vec![0.0; dim];
        map.undo(&y, &mut back);
        for i in 0..dim {
            prop_assert!((x[i] - back[i]).abs() < 1e-5);
        }
    }

    #[test]
    fn a_query_meets_what_is_stored_as_it_meets_what_that_stands_for(dim in 2usize..70, seed: u64, kind in 0usize..6) {
        let r = dim / 2;
        let map = if kind == 5 {
            let [down, up] = [[r, dim], [dim, r]].map(|[n, m]| Array2::from_shape_vec((n, m), numbers(n * m, seed)).unwrap());
            let slice = Map::Matrix(Matrix::new(down, up).unwrap());
            Map::Then(orthogonal(1, dim, seed).into(), slice.into())
        } else {
            orthogonal(kind, dim, seed)
        };
        let (q, k) = (numbers(dim, seed ^ 1), numbers(dim, seed ^ 2));
        let (stored, mut stands_for) = (map.apply_rows(&k, dim), vec![0.0; dim]);
        map.undo(&stored, &mut stands_for);
        let there = dot(&map.query_rows(&q, dim), &stored);
        let here = dot(&q, &stands_for);
        prop_assert!((there - here).abs() < 1e-3 * (1.0 + here.abs()), "{there} {here}");
    }
}

#[test]
fn hadamard_of_four_is_the_known_one() {
    let map = Map::Hadamard { signs: [0.5; 4].into(), block: 4 };
    assert_eq!(map.apply_rows(&[1.0, 0.0, 0.0, 0.0], 4), [0.5; 4]);
    assert_eq!(map.apply_rows(&[0.0, 1.0, 0.0, 0.0], 4), [0.5, -0.5, 0.5, -0.5]);
}

#[test]
fn matrices_that_are_no_pair_are_refused() {
    let matrix = |n, m| Array2::zeros((n, m));
    for (down, up) in [((3, 2), (2, 3)), ((2, 3), (2, 3)), ((0, 3), (3, 0))] {
        assert!(Matrix::new(matrix(down.0, down.1), matrix(up.0, up.1)).is_err());
    }
}
