//! Many queries times a tile of tokens.

use super::super::vector::Vector;
use super::tiles_of_heads;
use crate::linalg::{Mat, MatMut};

/// As `Kernels::matmul` says.
#[inline(always)]
pub(in super::super) unsafe fn matmul<V: Vector>(a: Mat<'_>, b: Mat<'_>, n: usize, mut c: MatMut<'_>) {
    let wide = if V::REGISTERS > 16 { 4 } else { 2 };
    tiles_of_heads!(a.rows, i, M => {
        let (a, mut c) = (a.part(i, M), c.part(i, M));
        let mut j = 0;
        // SAFETY: by the caller's contract.
        unsafe {
            while wide == 4 && j + 4 * V::LANES <= n {
                matmul_tile::<V, M, 4>(a, b, j, &mut c);
                j += 4 * V::LANES;
            }
            while j + 2 * V::LANES <= n {
                matmul_tile::<V, M, 2>(a, b, j, &mut c);
                j += 2 * V::LANES;
            }
            while j + V::LANES <= n {
                matmul_tile::<V, M, 1>(a, b, j, &mut c);
                j += V::LANES;
            }
        }
        for j in j..n {
            for i in 0..M {
                c.row(i)[j] += (0..b.rows).map(|p| a.row(i)[p] * b.row(p)[j]).sum::<f32>();
            }
        }
    });
}

/// Columns `j .. j + N LANES` of `M` rows.
#[inline(always)]
unsafe fn matmul_tile<V: Vector, const M: usize, const N: usize>(a: Mat<'_>, b: Mat<'_>, j: usize, c: &mut MatMut<'_>) {
    // SAFETY: rows of `a` reach `b.rows`, rows of `b` and `c` column `j + N LANES`, by the caller's contract.
    unsafe {
        let mut sum = [[V::zero(); N]; M];
        for p in 0..b.rows {
            let mut x = [V::zero(); N];
            for v in 0..N {
                x[v] = V::load(b.data.as_ptr().add(p * b.stride + j + v * V::LANES));
            }
            for i in 0..M {
                let a = V::splat(*a.data.as_ptr().add(i * a.stride + p));
                for v in 0..N {
                    sum[i][v] = V::fma(a, x[v], sum[i][v]);
                }
            }
        }
        for i in 0..M {
            for v in 0..N {
                let c = c.data.as_mut_ptr().add(i * c.stride + j + v * V::LANES);
                V::store(c, V::add(V::load(c), sum[i][v]));
            }
        }
    }
}
