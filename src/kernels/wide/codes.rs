//! Packed codes: opened in registers and used at once by a tile of query heads.

use std::ops::Range;

use half::f16;

use super::super::vector::Vector;
use super::super::{Ahead, Folded};
use super::tiles_of_heads;
use crate::format::codes::{Codes, block, block_words};
use crate::linalg::MatMut;

/// Runs `$body` with the constant `$J` for every pair of outer rows in a block.
macro_rules! each_pair {
    ($bits:expr, $J:ident => $body:expr) => {{
        each_pair!(@ $J, $body, 0 1);
        if $bits <= 4 {
            each_pair!(@ $J, $body, 2 3);
        }
        if $bits <= 3 {
            each_pair!(@ $J, $body, 4 5 6 7);
        }
    }};
    (@ $J:ident, $body:expr, $($j:literal)*) => { $({ const $J: u32 = $j; $body })* };
}

/// Words of `V` lanes of a block: pairs, and for 3 bits what is beside them.
#[derive(Clone, Copy)]
struct Block<V: Vector> {
    pairs: V::I,
    third: V::I,
}

impl<V: Vector> Block<V> {
    /// The block at `words`, which is at its first wanted lane; the block has `lanes` of them, of which `skipped` before.
    #[inline(always)]
    unsafe fn load<const BITS: u8>(words: *const u16, lanes: usize, skipped: usize) -> Self {
        // SAFETY: by the caller's contract.
        unsafe {
            let third =
                if BITS == 3 { V::load_bytes(words.add(2 * (lanes - skipped) + skipped)) } else { V::integer_zero() };
            Self { pairs: V::load_pairs(words), third }
        }
    }

    /// What the codes of pair `j` stand for, as words: with `TABLE` their levels, else themselves.
    #[inline(always)]
    unsafe fn levels<const BITS: u8, const TABLE: bool>(self, j: u32, table: V::I) -> V::I {
        // SAFETY: by the caller's contract.
        unsafe {
            let codes = self.codes::<BITS>(j);
            if TABLE { V::look_up(table, codes) } else { codes }
        }
    }

    /// The codes of pair `j` as words.
    #[inline(always)]
    unsafe fn codes<const BITS: u8>(self, j: u32) -> V::I {
        // SAFETY: by the caller's contract.
        unsafe {
            let width = if BITS == 3 { 2 } else { u32::from(BITS) };
            let shifted = if j == 0 { self.pairs } else { V::shift_right(self.pairs, width * j) };
            let last = width * (j + 1) == 16;
            let low = if last { shifted } else { V::and(shifted, V::splat_word((1 << width) - 1)) };
            if BITS != 3 {
                return low;
            }
            let high = if j < 2 { V::shift_left(self.third, 2 - j) } else { V::shift_right(self.third, j - 2) };
            V::or(low, V::and(high, V::splat_word(4)))
        }
    }
}

/// The codes' levels, or nothing.
#[inline(always)]
unsafe fn table<V: Vector>(codes: Codes<'_>) -> V::I {
    // SAFETY: levels are sixteen bytes; else by the caller's contract.
    unsafe { codes.levels().map_or(V::integer_zero(), |levels| V::load_table(levels.bytes().as_ptr())) }
}

/// `acc[g, l] += scales[l] (step_r sum_o words[r, o] codes[o, first lane + l] + offset_r)` for rows `r = first + g` of `w`;
/// without `scales` they are 1. With `TABLE` codes stand for their levels.
#[inline(always)]
pub(super) unsafe fn add_codes<V: Vector, const BITS: u8, const TABLE: bool>(
    w: &Folded,
    first: usize,
    codes: Codes<'_>,
    lanes: Range<usize>,
    scales: Option<&[f16]>,
    acc: &mut MatMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    let scales = scales.map(<[f16]>::as_ptr);
    tiles_of_heads!(acc.rows, g, G => {
        let (w, mut acc) = (Rows { folded: w, first: first + g, scales }, acc.part(g, G));
        let mut lane = lanes.start;
        let many = V::REGISTERS > 16 || G < 4;
        // SAFETY: by the caller's contract.
        unsafe {
            while many && lane + 4 * V::LANES <= lanes.end {
                add_tile::<V, BITS, TABLE, G, 4>(w.beside(lane - lanes.start), codes, lane, acc.from_column(lane - lanes.start), ahead);
                lane += 4 * V::LANES;
            }
            while lane + 2 * V::LANES <= lanes.end {
                add_tile::<V, BITS, TABLE, G, 2>(w.beside(lane - lanes.start), codes, lane, acc.from_column(lane - lanes.start), ahead);
                lane += 2 * V::LANES;
            }
            while lane + V::LANES <= lanes.end {
                add_tile::<V, BITS, TABLE, G, 1>(w.beside(lane - lanes.start), codes, lane, acc.from_column(lane - lanes.start), ahead);
                lane += V::LANES;
            }
            if lane < lanes.end {
                add_tile::<V::Half, BITS, TABLE, G, 1>(w.beside(lane - lanes.start), codes, lane, acc.from_column(lane - lanes.start), ahead);
            }
        }
    });
}

/// Cache lines that are asked for beside `vectors` of a block: as many as these are, what is read next being about as long.
const fn lines(bytes: usize) -> usize {
    let lines = bytes.div_ceil(Ahead::LINE);
    if lines < 2 { 2 } else { lines }
}

/// Rows of integers from `first` on, and the factors of the lanes.
#[derive(Clone, Copy)]
struct Rows<'a> {
    folded: &'a Folded,
    first: usize,
    scales: Option<*const f16>,
}

impl Rows<'_> {
    /// With the factors from lane `lane` on.
    #[inline(always)]
    unsafe fn beside(self, lane: usize) -> Self {
        // SAFETY: there is a factor for each lane, by the caller's contract.
        Self { scales: self.scales.map(|scales| unsafe { scales.add(lane) }), ..self }
    }
}

/// `G` rows, `N` vectors of lanes from `lane` on.
#[inline(always)]
unsafe fn add_tile<V: Vector, const BITS: u8, const TABLE: bool, const G: usize, const N: usize>(
    Rows { folded: w, first, scales }: Rows<'_>,
    codes: Codes<'_>,
    lane: usize,
    acc: MatMut<'_>,
    ahead: &mut Ahead<'_>,
) {
    // SAFETY: blocks and lanes are within `codes`, rows within `w` and `acc`, by the caller's contract.
    unsafe {
        let (lanes, in_block, table) = (codes.lanes(), block(BITS), table::<V>(codes));
        let mut sum = [[[V::integer_zero(); N]; G]; 2];
        // Few sums that wait for their own latency: even and odd pairs get sums of their own.
        let apart = usize::from(V::FUSED_DOT && G * N <= 8);
        let mut words = codes.words().as_ptr().add(2 * lane);
        let mut w_block = w.words.as_ptr().add(first * w.stride);
        for _ in 0..codes.outer() / in_block {
            ahead.fetch(const { lines(N * V::LANES * size_of::<f32>()) });
            let mut blocks = [Block::<V> { pairs: V::integer_zero(), third: V::integer_zero() }; N];
            for v in 0..N {
                blocks[v] = Block::load::<BITS>(words.add(2 * v * V::LANES), lanes, lane + v * V::LANES);
            }
            each_pair!(BITS, J => {
                let mut codes = [V::integer_zero(); N];
                for v in 0..N {
                    codes[v] = blocks[v].levels::<BITS, TABLE>(J, table);
                }
                for g in 0..G {
                    V::dot::<{ J as usize }, N>(&mut sum[J as usize & apart][g], &codes, w_block.add(g * w.stride));
                }
            });
            words = words.add(block_words(BITS, lanes));
            w_block = w_block.add(in_block);
        }
        for g in 0..G {
            let step = V::splat(*w.step.get_unchecked(first + g));
            let offset = V::splat(*w.offset.get_unchecked(first + g));
            for v in 0..N {
                let p = acc.data.as_mut_ptr().add(g * acc.stride + v * V::LANES);
                let total = if apart == 1 { V::add_integers(sum[0][g][v], sum[1][g][v]) } else { sum[0][g][v] };
                let sum = match scales {
                    None => V::fma(V::to_float(total), step, V::add(V::load(p), offset)),
                    Some(scales) => {
                        let sum = V::fma(V::to_float(total), step, offset);
                        V::fma(sum, V::load_f16(scales.add(v * V::LANES)), V::load(p))
                    }
                };
                V::store(p, sum);
            }
        }
    }
}

/// As `Kernels::unpack` says.
#[inline(always)]
pub(in super::super) unsafe fn unpack<V: Vector>(codes: Codes<'_>, lanes: Range<usize>, mut out: MatMut<'_>) {
    // SAFETY: by the caller's contract.
    unsafe {
        match (codes.bits(), codes.levels().is_some()) {
            (8, _) => unpack_of::<V, 8, false>(codes, lanes, &mut out),
            (4, false) => unpack_of::<V, 4, false>(codes, lanes, &mut out),
            (3, false) => unpack_of::<V, 3, false>(codes, lanes, &mut out),
            (_, false) => unpack_of::<V, 2, false>(codes, lanes, &mut out),
            (4, true) => unpack_of::<V, 4, true>(codes, lanes, &mut out),
            (3, true) => unpack_of::<V, 3, true>(codes, lanes, &mut out),
            (_, true) => unpack_of::<V, 2, true>(codes, lanes, &mut out),
        }
    }
}

#[inline(always)]
unsafe fn unpack_of<V: Vector, const BITS: u8, const TABLE: bool>(
    codes: Codes<'_>,
    lanes: Range<usize>,
    out: &mut MatMut<'_>,
) {
    for b in 0..codes.outer() / block(BITS) {
        let mut lane = lanes.start;
        // SAFETY: by the caller's contract.
        unsafe {
            while lane + V::LANES <= lanes.end {
                unpack_vector::<V, BITS, TABLE>(codes, b, lane, out.from_column(lane - lanes.start));
                lane += V::LANES;
            }
            if lane < lanes.end {
                unpack_vector::<V::Half, BITS, TABLE>(codes, b, lane, out.from_column(lane - lanes.start));
            }
        }
    }
}

#[inline(always)]
unsafe fn unpack_vector<V: Vector, const BITS: u8, const TABLE: bool>(
    codes: Codes<'_>,
    b: usize,
    lane: usize,
    out: MatMut<'_>,
) {
    // SAFETY: block and lanes are within `codes` and `out`, by the caller's contract.
    unsafe {
        let words = codes.words().as_ptr().add(b * block_words(BITS, codes.lanes()) + 2 * lane);
        let table = table::<V>(codes);
        let opened = Block::<V>::load::<BITS>(words, codes.lanes(), lane);
        let out_row = |o: usize| (b * block(BITS) + o) * out.stride;
        each_pair!(BITS, J => {
            let [even, odd] = V::pairs_to_float(opened.levels::<BITS, TABLE>(J, table));
            V::store(out.data.as_mut_ptr().add(out_row(2 * J as usize)), even);
            V::store(out.data.as_mut_ptr().add(out_row(2 * J as usize + 1)), odd);
        });
    }
}
