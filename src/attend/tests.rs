//! The sockets, each with a dummy: biases, maps, summaries.

use std::sync::Arc;

use ndarray::Array2;

use super::{
    Head, KeySegment, Part, Partial, Positions, Queries, ScoringQueries, Scratch, Seen, SinkLogits, Softmax, Summary,
    SummaryQueries, ValueSegment, Visibility, Weights, add_scores, attend_many, attend_one, key_chunks,
};
use crate::kernels::{self, Ahead};
use crate::linalg::{Map, Mat, MatMut, Matrix, random};
use crate::tensor::{Dtype, Rows};

const DIM: usize = 24;

fn numbers(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (random(seed, i) >> 40) as f32 / (1u32 << 23) as f32 - 1.0).collect()
}

/// Exact rows, in the coordinates of a map if there is one, with a bias a token if there is one.
struct Dummy {
    rows: Rows,
    map: Option<Arc<Map>>,
    bias: Option<Vec<f32>>,
}

impl Dummy {
    fn new(x: &[f32], map: Option<&Arc<Map>>, bias: Option<Vec<f32>>) -> Self {
        let stored = map.map_or_else(|| x.to_vec(), |map| map.apply_rows(x, DIM));
        let dim = map.map_or(DIM, |map| map.dim(DIM));
        let mut rows = Rows::new(Dtype::F32, dim);
        stored.chunks_exact(dim).for_each(|row| rows.push(row));
        Self { rows, map: map.cloned(), bias }
    }
}

impl KeySegment for Dummy {
    fn granularity(&self) -> usize {
        1
    }

    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        KeySegment::bytes(&self.rows, first, n)
    }

    fn map(&self) -> Option<&Arc<Map>> {
        self.map.as_ref()
    }

    fn bias(&self, first: usize, n: usize) -> Option<&[f32]> {
        self.bias.as_ref().map(|bias| &bias[first..first + n])
    }

    fn scores(&self, q: Mat<'_>, first: usize, n: usize, out: MatMut<'_>, s: &mut Scratch, ahead: &mut Ahead<'_>) {
        self.rows.scores(q, first, n, out, s, ahead);
    }

    fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch) {
        KeySegment::tile(&self.rows, first, n, out, scratch);
    }
}

impl ValueSegment for Dummy {
    fn bytes(&self, first: usize, n: usize) -> &[u8] {
        ValueSegment::bytes(&self.rows, first, n)
    }

    fn map(&self) -> Option<&Arc<Map>> {
        self.map.as_ref()
    }

    fn accumulate(
        &self,
        weights: Weights<'_>,
        first: usize,
        n: usize,
        acc: MatMut<'_>,
        scratch: &mut Scratch,
        ahead: &mut Ahead<'_>,
    ) {
        self.rows.accumulate(weights, first, n, acc, scratch, ahead);
    }

    fn tile(&self, first: usize, n: usize, out: MatMut<'_>, scratch: &mut Scratch) {
        ValueSegment::tile(&self.rows, first, n, out, scratch);
    }
}

/// Slots of weights: what stands for several equal tokens.
struct Slots {
    keys: Vec<f32>,
    values: Vec<f32>,
    bias: Vec<f32>,
}

impl Summary for Slots {
    fn add_to(&self, queries: &SummaryQueries<'_>, partial: &mut Partial) {
        for row in 0..partial.rows() {
            let slots = self.keys.chunks_exact(DIM).zip(self.values.chunks_exact(DIM)).zip(&self.bias);
            for ((key, value), bias) in slots {
                let mut logit = [queries.q.row(row).iter().zip(key).map(|(q, k)| q * k).sum::<f32>()];
                super::cap(queries.softmax.softcap, &mut logit);
                partial.add(row, logit[0] + bias, value);
            }
        }
    }

    fn bytes(&self) -> usize {
        4 * (self.keys.len() + self.values.len() + self.bias.len())
    }
}

/// Outputs of one query and of two for each of `GROUP` query heads, and the attention scores from two.
fn read(keys: &Dummy, values: &Dummy, summary: Option<&dyn Summary>, softcap: Option<f32>) -> [Vec<f32>; 3] {
    const GROUP: usize = 3;
    let tokens = keys.rows.len();
    let mut positions = Positions::default();
    positions.push(0, tokens);
    let head = Head {
        keys: vec![Part { segment: keys, tokens }],
        values: vec![Part { segment: values, tokens }],
        positions: &positions,
        key_dim: DIM,
        value_dim: DIM,
        summary,
    };
    let softmax = Softmax { scaling: 1.0, softcap };
    let outputs = |queries: usize| {
        let q = numbers(GROUP * queries * DIM, 7);
        let seen = Seen { mask: None, positions: tokens.max(1), window: None };
        let visible = Visibility::new(seen, 0, 1, &positions);
        // Queries of the same, last position: so all see all.
        let given = Queries { q: q.clone(), range: 0..queries, first_head: 0, softmax, visible, scores: false };
        let mut scratch = Scratch::new(kernels::chosen().unwrap());
        let mut partial = if queries == 1 {
            attend_one(&head, &given, &key_chunks(&head.keys), false, &mut scratch)
        } else {
            attend_many(&head, &given, 0..tokens, &mut scratch)
        };
        if let Some(summary) = summary {
            let q = Mat::new(&q, GROUP * queries, DIM);
            let queries = SummaryQueries { q, softmax, each: queries, first_head: 0, kernels: scratch.kernels };
            summary.add_to(&queries, &mut partial);
        }
        let mut out = vec![0.0; GROUP * queries * DIM];
        out.chunks_exact_mut(DIM).enumerate().for_each(|(row, out)| partial.output(row, out));
        out
    };
    let q = numbers(2 * GROUP * DIM, 7);
    let queries = ScoringQueries {
        q: Mat::new(&q, 2 * GROUP, DIM),
        positions: &[tokens as u32; 2 * GROUP],
        weights: &[1.0; 2 * GROUP],
        softcap,
        heads: GROUP,
    };
    let mut scores = vec![0.0; tokens];
    add_scores(&head, None, &queries, &mut scores, &mut Scratch::new(kernels::chosen().unwrap()));
    [outputs(1), outputs(2), scores]
}

fn close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() < 2e-5 * (1.0 + want.abs()), "{got} {want}");
    }
}

/// Tokens of which each stands for so many: as they are with a bias, and repeated.
fn weighted(n: usize) -> (Vec<f32>, Vec<f32>, Vec<usize>) {
    (numbers(n * DIM, 1), numbers(n * DIM, 2), (0..n).map(|i| 1 + i % 4).collect())
}

fn repeated(x: &[f32], counts: &[usize]) -> Vec<f32> {
    x.chunks_exact(DIM).zip(counts).flat_map(|(row, &n)| row.repeat(n)).collect()
}

#[test]
fn a_weighted_token_is_the_same_token_so_many_times() {
    for n in [1, 5, 300] {
        let (k, v, counts) = weighted(n);
        let bias: Vec<f32> = counts.iter().map(|&n| (n as f32).ln()).collect();
        for softcap in [None, Some(2.0)] {
            let got = read(&Dummy::new(&k, None, Some(bias.clone())), &Dummy::new(&v, None, None), None, softcap);
            let (k, v) = (repeated(&k, &counts), repeated(&v, &counts));
            let want = read(&Dummy::new(&k, None, None), &Dummy::new(&v, None, None), None, softcap);
            close(&got[0], &want[0]);
            close(&got[1], &want[1]);
            // Its attention score is that of all that it stands for.
            let mut sums = Vec::new();
            let mut scores = &want[2][..];
            for &n in &counts {
                sums.push(scores[..n].iter().sum());
                scores = &scores[n..];
            }
            close(&got[2], &sums);
        }
    }
}

#[test]
fn a_map_of_full_rank_changes_nothing() {
    let (k, v, _) = weighted(300);
    let want = read(&Dummy::new(&k, None, None), &Dummy::new(&v, None, None), None, None);
    let hadamard = Map::hadamard(DIM, 3);
    let unit = |i: usize| (0..DIM).map(|j| f32::from(u8::from(i == j))).collect::<Vec<_>>();
    let up: Vec<f32> = (0..DIM).flat_map(|i| hadamard.apply_rows(&unit(i), DIM)).collect();
    let up = Array2::from_shape_vec((DIM, DIM), up).unwrap();
    let matrix = Map::Matrix(Matrix::new(up.t().to_owned(), up.clone()).unwrap());
    // y = 2 x, x' = y / 2: a query must be divided too.
    let twice = Map::Matrix(Matrix::new(Array2::eye(DIM) * 2.0f32, Array2::eye(DIM) * 0.5f32).unwrap());
    for map in [hadamard.clone(), matrix, twice.clone(), Map::Then(hadamard.into(), twice.into())] {
        let map = Arc::new(map);
        let got = read(&Dummy::new(&k, Some(&map), None), &Dummy::new(&v, Some(&map), None), None, None);
        for (got, want) in got.iter().zip(&want) {
            close(got, want);
        }
    }
}

#[test]
fn a_map_to_fewer_numbers_reads_what_it_stands_for() {
    const R: usize = 9;
    let (k, v, _) = weighted(300);
    let down = Array2::from_shape_vec((R, DIM), numbers(R * DIM, 11)).unwrap();
    let up = Array2::from_shape_vec((DIM, R), numbers(R * DIM, 12)).unwrap();
    let map = Arc::new(Map::Matrix(Matrix::new(down, up).unwrap()));
    let read_as = |x: &[f32]| {
        let stored = map.apply_rows(x, DIM);
        let mut out = vec![0.0; x.len()];
        stored.chunks_exact(R).zip(out.chunks_exact_mut(DIM)).for_each(|(y, x)| map.undo(y, x));
        out
    };
    let got = read(&Dummy::new(&k, Some(&map), None), &Dummy::new(&v, Some(&map), None), None, None);
    let (k, v) = (read_as(&k), read_as(&v));
    let want = read(&Dummy::new(&k, None, None), &Dummy::new(&v, None, None), None, None);
    for (got, want) in got.iter().zip(&want) {
        close(got, want);
    }
}

#[test]
fn a_summary_of_equal_tokens_equals_them() {
    let (k, v, _) = weighted(20);
    let (key, value) = (numbers(DIM, 5), numbers(DIM, 6));
    for (n, softcap) in [(1, None), (40, None), (40, Some(1.5))] {
        let slots = Slots { keys: key.clone(), values: value.clone(), bias: vec![(n as f32).ln()] };
        let got = read(&Dummy::new(&k, None, None), &Dummy::new(&v, None, None), Some(&slots), softcap);
        let all_keys = [key.repeat(n), k.clone()].concat();
        let all_values = [value.repeat(n), v.clone()].concat();
        let want = read(&Dummy::new(&all_keys, None, None), &Dummy::new(&all_values, None, None), None, softcap);
        close(&got[0], &want[0]);
        close(&got[1], &want[1]);
        close(&got[2], &want[2][n..]);
    }
}

#[test]
fn sink_logits_are_a_summary() {
    let (k, v, _) = weighted(20);
    let logits = [0.3, -1.0, 2.0];
    let sinks = SinkLogits(&logits);
    let got = read(&Dummy::new(&k, None, None), &Dummy::new(&v, None, None), Some(&sinks), None);
    let without = read(&Dummy::new(&k, None, None), &Dummy::new(&v, None, None), None, None);
    // A token whose value is 0 and whose logit is the sink's, for the query head alone.
    let q = numbers(3 * DIM, 7);
    for (head, logit) in logits.iter().enumerate() {
        let own = &q[head * DIM..][..DIM];
        let weights: Vec<f32> =
            k.chunks_exact(DIM).map(|k| k.iter().zip(own).map(|(k, q)| k * q).sum::<f32>().exp()).collect();
        let sum: f32 = weights.iter().sum();
        let factor = sum / (sum + logit.exp());
        let want: Vec<f32> = without[0][head * DIM..][..DIM].iter().map(|x| x * factor).collect();
        close(&got[0][head * DIM..][..DIM], &want);
    }
}

#[test]
fn a_head_of_nothing_gives_nothing() {
    let none = Dummy::new(&[], None, None);
    let [one, ..] = read(&none, &Dummy::new(&[], None, None), None, None);
    assert!(one.iter().all(|&x| x == 0.0));
}
