//! What an instruction set must offer for the loops in `wide`.

use half::{bf16, f16};

/// Vectors of `LANES` floats, or of `LANES` 32-bit integers that are also pairs of 16-bit words.
///
/// # Safety
/// All functions need a CPU that has the instruction set, pointers must be valid for what is read or written there (no
/// alignment is needed). They are always inlined, since only inside a function that enables the instruction set do they
/// become instructions.
pub(super) trait Vector: Copy {
    /// Floats in a vector.
    const LANES: usize;
    /// Registers for vectors.
    const REGISTERS: usize;
    /// Whether [`Self::dot`] is one instruction, whose sum then has its whole latency.
    const FUSED_DOT: bool;
    /// Floats.
    type F: Copy;
    /// Integers.
    type I: Copy;
    /// Vectors of half the lanes for what is left at an end, or these again where there are no smaller ones.
    type Half: Vector;

    unsafe fn zero() -> Self::F;
    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn load_f16(p: *const f16) -> Self::F;
    unsafe fn load_bf16(p: *const bf16) -> Self::F;
    /// 16-bit integers.
    unsafe fn load_words(p: *const i16) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    /// Rounds both, half to even, and stores them one after the other as 16-bit integers; returns their sum.
    unsafe fn store_rounded(p: *mut i16, a: Self::F, b: Self::F) -> Self::I;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `b` where one is NaN.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `max(a, |b|)`, for `a` that is not negative.
    unsafe fn max_magnitude(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn round(x: Self::F) -> Self::F;
    /// `x 2^n` for whole `n` from -200 to 127; 0, or nearly so, where `n < -126`.
    unsafe fn times_power_of_two(x: Self::F, n: Self::F) -> Self::F;
    unsafe fn sum(x: Self::F) -> f32;
    unsafe fn sum4(x: [Self::F; 4]) -> [f32; 4];
    unsafe fn largest4(x: [Self::F; 4]) -> [f32; 4];

    unsafe fn integer_zero() -> Self::I;
    /// The same word everywhere.
    unsafe fn splat_word(x: i16) -> Self::I;
    /// A pair of words a lane.
    unsafe fn load_pairs(p: *const u16) -> Self::I;
    /// A word a lane, its bytes widened to a pair of words.
    unsafe fn load_bytes(p: *const u16) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Every word shifted to the right by a constant.
    unsafe fn shift_right(x: Self::I, n: u32) -> Self::I;
    /// Every word shifted to the left by a constant.
    unsafe fn shift_left(x: Self::I, n: u32) -> Self::I;
    /// `sums[v] += a0 b0 + a1 b1`, of the pairs `a` of signed words in every lane of `words[v]`, and the pair `b` that is
    /// number `J` at `pairs`.
    unsafe fn dot<const J: usize, const N: usize>(sums: &mut [Self::I; N], words: &[Self::I; N], pairs: *const i16);
    /// Sixteen bytes, for [`Self::look_up`].
    unsafe fn load_table(p: *const u8) -> Self::I;
    /// The byte of the table at each byte of `x`, which are all below 16.
    unsafe fn look_up(table: Self::I, x: Self::I) -> Self::I;
    unsafe fn add_integers(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn to_float(x: Self::I) -> Self::F;
    /// The two words of the pairs, which are not negative, as floats.
    unsafe fn pairs_to_float(x: Self::I) -> [Self::F; 2];
}
