//! The distribution of a prompt's queries before RoPE.

#![forbid(unsafe_code)]

use super::NewQueries;
use crate::kernels::Kernels;
use crate::linalg::{Mat, MatMut, Rope};
use crate::memory;

/// Queries that are added at once.
const BLOCK: usize = 256;

/// What is known of the queries of a KV head's query heads, before RoPE.
#[derive(Clone, Debug, Default)]
pub(super) struct Moments {
    queries: usize,
    /// Sums `[heads, dim]`.
    sums: Vec<f32>,
    /// Sums of outer products `[heads, dim, dim]`.
    products: Vec<f32>,
}

impl Moments {
    /// Bytes allocated.
    pub(super) fn bytes(&self) -> usize {
        (self.sums.capacity() + self.products.capacity()) * size_of::<f32>()
    }

    /// Takes new queries into account, from position `first` on; with `covariance` their products too.
    pub(super) fn add(&mut self, new: &NewQueries<'_>, first: u32, rope: &Rope, covariance: bool, kernels: &Kernels) {
        let from = new.positions.partition_point(|&p| p < first);
        let dim = new.dim();
        memory::resize(&mut self.sums, new.heads * dim);
        memory::resize(&mut self.products, if covariance { new.heads * dim * dim } else { 0 });
        self.queries += new.positions.len() - from;
        for block in (from..new.positions.len()).step_by(BLOCK) {
            let positions = &new.positions[block..new.positions.len().min(block + BLOCK)];
            for head in 0..new.heads {
                let row = |t: usize| ((block + t) * new.heads + head) * dim;
                let mut rows: Vec<f32> =
                    (0..positions.len()).flat_map(|t| &new.q[row(t)..row(t) + dim]).copied().collect();
                for (q, &p) in rows.chunks_exact_mut(dim).zip(positions) {
                    rope.undo_position(p, q);
                    self.sums[head * dim..][..dim].iter_mut().zip(&*q).for_each(|(sum, q)| *sum += q);
                }
                if covariance {
                    let products = &mut self.products[head * dim * dim..][..dim * dim];
                    add_products(&rows, dim, products, kernels);
                }
            }
        }
    }

    /// Query heads.
    pub(super) fn heads(&self, dim: usize) -> usize {
        self.sums.len() / dim
    }

    /// Mean and covariance of query head `head`; the covariance is empty where it is not known.
    pub(super) fn of(&self, head: usize, dim: usize) -> (Vec<f32>, Vec<f32>) {
        let n = self.queries.max(1) as f32;
        let mean: Vec<f32> = self.sums[head * dim..][..dim].iter().map(|sum| sum / n).collect();
        let products = self.products.get(head * dim * dim..(head + 1) * dim * dim).unwrap_or_default();
        let covariance = products.iter().enumerate().map(|(i, sum)| sum / n - mean[i / dim] * mean[i % dim]).collect();
        (mean, covariance)
    }
}

/// `products += rows^T rows` of rows of `dim` numbers.
fn add_products(rows: &[f32], dim: usize, products: &mut [f32], kernels: &Kernels) {
    let n = rows.len() / dim;
    let mut transposed = memory::zeros(rows.len());
    for (t, row) in rows.chunks_exact(dim).enumerate() {
        row.iter().enumerate().for_each(|(c, x)| transposed[c * n + t] = *x);
    }
    (kernels.matmul)(Mat::new(&transposed, dim, n), Mat::new(rows, n, dim), dim, MatMut::new(products, dim, dim));
}
