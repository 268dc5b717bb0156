//! The scalar kernels against f64, and every other instruction set against the scalar one, at odd sizes.

mod codes;
mod rows;

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

#[test]
fn the_environment_chooses() {
    assert_eq!(choose(Some("scalar")).unwrap().name, scalar::KERNELS.name);
    assert_eq!(choose(None).unwrap().name, available()[0].name);
    let refused = choose(Some("mmx")).err().expect("no such instruction set").to_string();
    assert!(refused.contains("KVPACK_ISA=mmx") && refused.contains("scalar"), "{refused}");
}
