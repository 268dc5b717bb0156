use half::f16;

use super::block::Blocks;
use super::grid::{Asymmetric, SMALL, stored_scale};
use super::rotated::Symmetric;
use super::tokens::TokenCoding;
use super::*;

/// Numbers of magnitudes from those of denormals to the largest half.
fn magnitudes() -> impl Iterator<Item = f32> {
    (-140..=15).map(|e| (e as f32).exp2() * 1.37).chain([1e-45, 6e-8, 65504.0])
}

fn wave(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * i) as f32 * 0.37).sin()).collect()
}

fn square(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// That what is stored of `x` errs no more than zeros would.
fn no_worse_than_zeros(what: &str, x: &[f32], stored: &[f32]) {
    assert!(stored.iter().all(|x| x.abs() <= f16::MAX.to_f32()), "{what}: {stored:?}");
    let error: Vec<f32> = x.iter().zip(stored).map(|(x, stored)| x - stored).collect();
    assert!(square(&error) <= square(x) * (1.0 + 1e-6), "{what} of {x:?}: {stored:?}");
}

#[test]
fn scales_of_any_size() {
    for scale in magnitudes().chain([0.0]).flat_map(|m| [m, -m]) {
        for largest in [8.0, 127.0] {
            let stored = stored_scale(scale, largest).to_f32();
            assert!(stored.abs() * largest <= f16::MAX.to_f32() && stored * scale >= 0.0);
            assert!(scale.abs() >= SMALL || stored.abs() >= scale.abs(), "{scale}: {stored}");
            assert!(scale.abs() < SMALL || scale.abs() * largest > 65e3 || (stored / scale - 1.0).abs() < 1e-2);
        }
    }
}

#[test]
fn groups_of_any_size() {
    let mut codes = [0; 32];
    for magnitude in magnitudes() {
        let x: Vec<f32> = wave(32).iter().map(|x| (x * magnitude).clamp(-65504.0, 65504.0)).collect();
        for bits in [2, 3, 4, 8] {
            let (scale, zero) = Asymmetric { bits, group: 32 }.encode(&x, &mut codes);
            let stored: Vec<f32> = codes.iter().map(|&c| zero.to_f32() + scale.to_f32() * f32::from(c)).collect();
            no_worse_than_zeros("kivi", &x, &stored);
        }
        for bits in [4, 8] {
            let block = Blocks { bits };
            let (scale, _) = block.encode(&x, &mut codes);
            let stored: Vec<f32> = codes.iter().map(|&c| scale.to_f32() * (f32::from(c) - block.middle())).collect();
            no_worse_than_zeros("block", &x, &stored);
        }
    }
}

#[test]
fn rotated_numbers_of_any_size() {
    let mut codes = [0; 32];
    for (bits, spacing) in [2, 3, 4]
        .into_iter()
        .flat_map(|bits| [(bits, Spacing::Uniform), (bits, Spacing::LloydMax)])
        .chain([(8, Spacing::Uniform)])
    {
        let rotated = Symmetric::new(bits, spacing, 0).unwrap();
        for magnitude in magnitudes().filter(|&m| m < 2e3) {
            let y: Vec<f32> = wave(32).iter().map(|y| y * magnitude).collect();
            let scale = rotated.encode(&y, &mut codes).0.to_f32();
            let stored: Vec<f32> = codes.iter().map(|&code| rotated.decode(code, scale)).collect();
            no_worse_than_zeros("rotated", &y, &stored);
        }
        // As long as can be, with all of it in one number, in some, or in all.
        for n in 1..=32 {
            let length = rotated.longest() / (n as f32).sqrt();
            let y: Vec<f32> = (0..32).map(|i| if i < n { length * 0.999 } else { 0.0 }).collect();
            let (scale, _) = rotated.encode(&y, &mut codes);
            assert!(scale < f16::MAX, "{bits} bits, {n} numbers of {length}");
        }
    }
}
