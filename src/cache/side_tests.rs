//! A side keeps its tokens through whatever order of changes.

use proptest::prelude::*;

use super::side::Side;
use crate::attend::Scratch;
use crate::kernels;
use crate::linalg::MatMut;
use crate::quantize::{Block, Codec, Exact, KeyPage, Kivi, Kvarn, Page, ValuePage};
use crate::tensor::{Dtype, Rows};

const DIM: usize = 32;

/// The numbers of token `id`.
fn token(id: usize) -> Vec<f32> {
    (0..DIM).map(|c| ((id * 37 + c * 11) % 101) as f32 / 50.0 - 1.0).collect()
}

/// A change of a side.
#[derive(Clone, Debug)]
enum Change {
    /// New tokens.
    Append(usize),
    /// What is due becomes pages.
    Seal,
    /// Some granules go; of which kind says a number.
    Retain(u64),
    /// The newest tokens go.
    Cut(usize),
    /// The oldest tokens go.
    Slide(usize),
    /// The tail is lent to copies.
    Lend,
    /// Tokens come and pages are sealed, and all of it is rolled back.
    RollBack(usize),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let change = prop_oneof![
        4 => (1usize..200).prop_map(Change::Append),
        4 => Just(Change::Seal),
        1 => any::<u64>().prop_map(Change::Retain),
        1 => (1usize..90).prop_map(Change::Cut),
        1 => (1usize..150).prop_map(Change::Slide),
        1 => Just(Change::Lend),
        1 => (1usize..150).prop_map(Change::RollBack),
    ];
    prop::collection::vec(change, 1..24)
}

/// How a kind of side is read back.
trait Readable: Page {
    fn read(segment: &Self::Segment, n: usize, scratch: &mut Scratch) -> Vec<Vec<f32>>;
}

impl Readable for ValuePage {
    fn read(segment: &Self::Segment, n: usize, scratch: &mut Scratch) -> Vec<Vec<f32>> {
        let mut tile = vec![0.0; n * DIM];
        segment.tile(0, n, MatMut::new(&mut tile, n, DIM), scratch);
        let unmapped = |row: &[f32]| match segment.map() {
            Some(map) => {
                let mut x = vec![0.0; DIM];
                map.undo(row, &mut x);
                x
            }
            None => row.to_vec(),
        };
        tile.chunks_exact(DIM).map(unmapped).collect()
    }
}

impl Readable for KeyPage {
    fn read(segment: &Self::Segment, n: usize, scratch: &mut Scratch) -> Vec<Vec<f32>> {
        let stride = n.next_multiple_of(256);
        let mut tile = vec![0.0; DIM * stride];
        segment.tile(0, n, MatMut::new(&mut tile, DIM, stride), scratch);
        let row = |t: usize| -> Vec<f32> { (0..DIM).map(|c| tile[c * stride + t]).collect() };
        let unmapped = |row: Vec<f32>| match segment.map() {
            Some(map) => {
                let mut x = vec![0.0; DIM];
                map.undo(&row, &mut x);
                x
            }
            None => row,
        };
        (0..n).map(row).map(unmapped).collect()
    }
}

fn append<P: Page>(side: &mut Side<P>, ids: impl Iterator<Item = usize>) {
    ids.for_each(|id| side.tail.push(&token(id)));
}

fn check<P: Readable>(codec: &P::Codec, changes: &[Change], tolerance: f32) {
    let mut side: Side<P> = Side::new(0, Rows::new(Dtype::F32, DIM));
    let (mut held, mut next) = (Vec::new(), 0);
    for change in changes {
        match *change {
            Change::Append(n) => {
                append(&mut side, next..next + n);
                held.extend(next..next + n);
                next += n;
            }
            Change::Seal => side.seal(codec).unwrap(),
            Change::Retain(seed) => {
                let granules = side.granules();
                let keeps = granules
                    .iter()
                    .enumerate()
                    .map(|(i, &n)| (!crate::linalg::random(seed, i as u64).is_multiple_of(4), n));
                let keep: Vec<bool> = keeps.flat_map(|(keep, n)| vec![keep; n]).collect();
                assert_eq!(keep.len(), held.len());
                side.retain(&keep);
                let mut kept = keep.iter();
                held.retain(|_| kept.next() == Some(&true));
            }
            Change::Cut(n) => {
                held.truncate(held.len().saturating_sub(n));
                side.truncate(held.len());
            }
            Change::Slide(n) => {
                let n = side.whole(n.min(held.len()));
                side.drop_oldest(n);
                held.drain(..n);
            }
            Change::Lend => side.lend(),
            Change::RollBack(n) => {
                let before = side.clone();
                if side.lends() {
                    continue; // whose copies are kept whole
                }
                let mark = side.mark();
                append(&mut side, next..next + n);
                side.seal(codec).unwrap();
                side.restore(&mark);
                side.release();
                assert_eq!(side.tail.len(), before.tail.len());
                assert_eq!(side.sealed().len(), before.sealed().len());
            }
        }
        let mut read = Vec::new();
        let mut scratch = Scratch::new(kernels::chosen().unwrap());
        for part in side.parts().iter().filter(|part| part.tokens > 0) {
            read.extend(P::read(part.segment, part.tokens, &mut scratch));
        }
        assert_eq!(read.len(), held.len(), "{change:?}");
        for (read, &id) in read.iter().zip(&held) {
            let worst = read.iter().zip(token(id)).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            assert!(worst <= tolerance, "token {id} is {worst} away after {change:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn tokens_stay_what_and_where_they_are(changes in changes()) {
        let kivi = Kivi::new(8, 32, 64, 3).unwrap();
        let block = Block::new(8, 5, 2).unwrap();
        let kvarn = Kvarn::new(8, 4, 0).unwrap();
        for (keys, values, tolerance) in [
            (&Exact as &dyn Codec<KeyPage>, &Exact as &dyn Codec<ValuePage>, 0.0),
            (&kivi, &kivi, 0.01),
            (&block, &block, 0.01),
            (&kvarn, &kvarn, 0.05),
        ] {
            check::<KeyPage>(keys, &changes, tolerance);
            check::<ValuePage>(values, &changes, tolerance);
        }
    }
}
