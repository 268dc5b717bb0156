//! What a KV head stores packed, laid out plainly, for tests and for the curious.

use crate::cache::{KvHead, Segment};
use crate::quantize::{KeyPage, ValuePage};

/// Exact tokens before the packed ones, codes `[tokens, dim]`, scales and zero-points in the order of their groups, and how
/// many of them there are a token, or a group of tokens.
pub(super) type Packed = (usize, Vec<u8>, Vec<f32>, Vec<f32>, usize);

pub(super) fn keys(head: &KvHead) -> Packed {
    let mut out = Packed::default();
    for segment in head.pages().0 {
        let page = match &*segment.page {
            KeyPage::Moved(moved) => moved.page(),
            page => page,
        };
        match page {
            KeyPage::Exact(_) | KeyPage::Moved(_) => out.0 += segment.len,
            KeyPage::Tokens(page) => {
                let grid = |t, j| page.grid(t, j);
                add(&mut out, segment.len, page.dim(), |t, c| page.code(t, c), page.groups(), grid);
            }
            KeyPage::Unrotated(page) => {
                let all = 0..page.dim();
                add(&mut out, segment.len, page.dim(), |t, c| page.code(t, c), 0, |_, _| (0.0, 0.0));
                if out.2.is_empty() {
                    (out.2, out.3) = all.map(|c| page.grid(c)).unzip();
                }
                out.4 = page.dim();
            }
            KeyPage::Channels(page) => {
                for t in 0..segment.len {
                    let (codes, scales, zeros) = page.token(t);
                    out.1.extend(codes);
                    if t % page.group() == 0 {
                        out.2.extend(scales);
                        out.3.extend(zeros);
                    }
                }
                out.4 = page.dim();
            }
        }
    }
    out
}

/// Packed token, channel, and what the code lacks.
pub(super) type Outliers = Vec<(usize, usize, f32)>;

/// What is kept beside the codes of keys, and of values.
pub(super) fn outliers(head: &KvHead) -> (Outliers, Outliers) {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for (first, segment) in packed_segments(head.pages().0, |page| matches!(page, KeyPage::Exact(_))) {
        if let KeyPage::Unrotated(page) = &*segment.page {
            add_outliers(&mut keys, first, segment.len, page.outliers_of(segment.len));
        }
    }
    for (first, segment) in packed_segments(head.pages().1, |page| matches!(page, ValuePage::Exact(_))) {
        if let ValuePage::Tokens(page) = &*segment.page {
            add_outliers(&mut values, first, segment.len, page.outliers_of(segment.len));
        }
    }
    for outliers in [&mut keys, &mut values] {
        outliers.retain(|&(_, _, rest)| rest != 0.0);
    }
    (keys, values)
}

/// Segments that are not exact, each with how many packed tokens are before it.
fn packed_segments<P>(
    segments: &[Segment<P>],
    exact: impl Fn(&P) -> bool,
) -> impl Iterator<Item = (usize, &Segment<P>)> {
    let packed = segments.iter().filter(move |segment| !exact(&segment.page));
    packed.scan(0, |first, segment| {
        let here = *first;
        *first += segment.len;
        Some((here, segment))
    })
}

fn add_outliers(out: &mut Outliers, first: usize, tokens: usize, found: Vec<(usize, f32)>) {
    let each = found.len() / tokens.max(1);
    out.extend(found.into_iter().enumerate().map(|(i, (c, rest))| (first + i / each, c, rest)));
}

/// Bits of every channel in every page with a grid a channel.
pub(super) fn key_bits(head: &KvHead) -> Vec<Vec<u8>> {
    let bits = |page: &KeyPage| if let KeyPage::Channels(page) = page { Some(page.bits()) } else { None };
    head.pages().0.iter().filter_map(|segment| bits(&segment.page)).collect()
}

pub(super) fn values(head: &KvHead) -> Packed {
    let mut out = Packed::default();
    for segment in head.pages().1 {
        match &*segment.page {
            ValuePage::Exact(_) => out.0 += segment.len,
            ValuePage::Tokens(page) => {
                let grid = |t, j| page.grid(t, j);
                add(&mut out, segment.len, page.dim(), |t, c| page.code(t, c), page.groups(), grid);
            }
        }
    }
    out
}

/// Adds a page's `tokens`: `dim` codes and `columns` grids each.
fn add(
    (_, codes, scales, zeros, width): &mut Packed,
    tokens: usize,
    dim: usize,
    code: impl Fn(usize, usize) -> u8,
    columns: usize,
    grid: impl Fn(usize, usize) -> (f32, f32),
) {
    *width = columns;
    for t in 0..tokens {
        codes.extend((0..dim).map(|c| code(t, c)));
        for j in 0..columns {
            let (scale, zero) = grid(t, j);
            scales.push(scale);
            zeros.push(zero);
        }
    }
}
