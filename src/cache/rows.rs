//! The rows of a batch: those that share a sequence, and changes of batch and length.

use std::sync::Arc;

use super::head::KvHead;
use super::layer::{Layer, Sequence};
use crate::error::{Error, Result};

impl Layer {
    /// Calls `change` with all sequences for which `wanted` says true; rows that share a sequence still
    /// share it afterwards, even if `change` panics.
    pub(super) fn each_unique(&mut self, wanted: impl Fn(&Sequence) -> bool, change: impl FnOnce(Vec<&mut Sequence>)) {
        /// Rows, and which of them share the sequence of an earlier one.
        struct Shared<'a> {
            rows: &'a mut [Arc<Sequence>],
            later: Vec<(usize, usize)>,
        }
        impl Drop for Shared<'_> {
            fn drop(&mut self) {
                for &(row, first) in &self.later {
                    self.rows[row] = Arc::clone(&self.rows[first]);
                }
            }
        }
        let first = |row: usize| (0..row).find(|&first| Arc::ptr_eq(&self.rows[first], &self.rows[row]));
        let later: Vec<_> = (1..self.rows.len()).filter_map(|row| Some((row, first(row)?))).collect();
        // Else a sequence would be copied for its own other rows.
        let nothing = Arc::new(Sequence::new());
        for &(row, _) in &later {
            self.rows[row] = Arc::clone(&nothing);
        }
        let shared = Shared { rows: &mut self.rows, later };
        change(shared.rows.iter_mut().filter(|row| wanted(row)).map(Arc::make_mut).collect());
    }

    /// Gives back the room for tokens to come.
    pub(super) fn fit(&mut self) {
        let fit = |head: &mut KvHead| {
            head.keys.fit();
            head.values.fit();
        };
        self.each_unique(|_| true, |rows| rows.into_iter().flatten().for_each(fit));
    }

    /// Checks that [`Self::crop`] can be done.
    ///
    /// # Errors
    /// [`Error::Crop`] when it can not.
    pub fn check_crop(&self, n: usize, lossy: bool) -> Result<()> {
        let reachable = if n > self.seen {
            self.seen
        } else if lossy {
            n
        } else {
            self.heads().map(|head| head.exactly_removable(n, self.seen)).min().unwrap_or(n)
        };
        let reachable = reachable.min(self.seen - self.final_to);
        if reachable < n { Err(Error::Crop { asked: n, reachable, seen: self.seen }) } else { Ok(()) }
    }

    /// Removes the `n` newest positions. Without `lossy` only tokens that are held exactly are cut; with it a packed
    /// page keeps its codes and a shorter length.
    ///
    /// # Errors
    /// [`Error::Crop`] when that is not possible; nothing has changed then.
    pub fn crop(&mut self, n: usize, lossy: bool) -> Result<()> {
        self.check_crop(n, lossy)?;
        if n > 0 {
            self.seen -= n;
            let seen = self.seen;
            self.each_unique(|_| true, |rows| rows.into_iter().flatten().for_each(|head| head.truncate(seen)));
        }
        Ok(())
    }

    /// Makes the batch out of the rows at `indices`, which may repeat; rows are shared, not copied.
    ///
    /// # Errors
    /// [`Error::Shape`] when an index is not below the batch size.
    pub fn select(&mut self, indices: &[usize]) -> Result<()> {
        if self.shape.is_none() {
            return Ok(());
        }
        if let Some(&bad) = indices.iter().find(|&&i| i >= self.batch()) {
            return Err(Error::Shape {
                what: "batch index",
                given: bad.to_string(),
                expected: format!("less than the batch size {}", self.batch()),
            });
        }
        if indices.is_empty() {
            return Err(Error::Shape { what: "batch indices", given: "none".into(), expected: "at least one".into() });
        }
        for (i, row) in self.rows.iter_mut().enumerate() {
            let several = indices.iter().filter(|&&index| index == i).count() > 1;
            if several && row.iter().any(KvHead::can_lend) {
                Arc::make_mut(row).iter_mut().for_each(KvHead::lend);
            }
        }
        self.rows = indices.iter().map(|&i| Arc::clone(&self.rows[i])).collect();
        Ok(())
    }
}
