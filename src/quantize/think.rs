//! `ThinK` (arXiv 2407.18021): the channels of keys to which a prompt's last queries give the least weight are left out.
//!
//! ```text
//! importance_c = mean over the last queries of q_c^2  *  mean over the prompt's keys of k_c^2
//! ```
//!
//! Chosen for each KV head when a prompt was read, and anew for tokens to come when they have doubled; the newest tokens keep all
//! channels.

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::exact::PAGE;
use super::pages::{KeyPage, SlicedRows};
use super::sliced::whole_pages;
use super::{Codec, Method, Plan, Wants};
use crate::error::{Result, refuse};
use crate::linalg::Map;
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// The parameters of `ThinK`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Think {
    /// The share of the channels that is left out.
    ratio: f32,
    /// The newest tokens, which stay whole.
    window: usize,
    /// Queries of a prompt that decide, its last ones.
    queries: usize,
}

impl Think {
    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(ratio: f32, window: usize, queries: usize) -> Result<Self> {
        if !(0.0..1.0).contains(&ratio) {
            return refuse("ratio", ratio, "0 to below 1");
        }
        if queries == 0 {
            return refuse("queries", 0, "whole numbers from 1");
        }
        Ok(Self { ratio, window, queries })
    }

    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        Self::new(options.number("ratio")?, options.whole("window")?, options.whole("queries")?)
    }

    /// What leads to the channels that stay, chosen anew when it is time.
    fn map(&self, plan: &mut Plan, dim: usize) -> Arc<Map> {
        if let Some(map) = plan.map.as_ref().filter(|_| plan.sealed < plan.renewal) {
            return Arc::clone(map);
        }
        plan.renewal = 2 * plan.sealed.max(PAGE);
        let chosen = self.choose(&plan.importance(dim));
        match &plan.map {
            Some(map) if **map == chosen => Arc::clone(map),
            _ => Arc::clone(plan.map.insert(Arc::new(chosen))),
        }
    }

    /// The channels that stay, ascending.
    fn choose(&self, importance: &[f32]) -> Map {
        let kept = (importance.len() - (self.ratio * importance.len() as f32) as usize).max(1);
        let mut order: Vec<u16> = (0..importance.len() as u16).collect();
        order.sort_by(|&a, &b| importance[usize::from(b)].total_cmp(&importance[usize::from(a)]));
        order.truncate(kept);
        order.sort_unstable();
        Map::Order(order.into())
    }
}

impl Method for Think {
    fn sinks(&self) -> usize {
        0
    }

    fn window(&self) -> usize {
        self.window
    }

    fn limit(&self) -> Limit {
        Limit::of_numbers(f32::MAX)
    }
}

impl Codec<KeyPage> for Think {
    fn wants(&self) -> Wants {
        Wants { squares: Some(self.queries), keys: true, needed: true, ..Wants::default() }
    }

    fn due(&self, n: usize) -> usize {
        whole_pages(n, self.window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(KeyPage, usize)> {
        let (n, dim) = (n.min(PAGE), rows.dim());
        let map = self.map(plan, dim);
        plan.sealed += n;
        Ok((KeyPage::Sliced(SlicedRows::seal(map, rows, n)), n))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_important_channels_stay() {
        let think = Think::new(0.4, 32, 32).unwrap();
        let importance = [3.0, 0.0, 5.0, 1.0, 2.0, 9.0, 0.5, 4.0, 8.0, 7.0];
        assert_eq!(think.choose(&importance), Map::Order([0, 2, 5, 7, 8, 9].into()));
        assert_eq!(Think::new(0.0, 32, 32).unwrap().choose(&importance), Map::Order((0..10).collect()));
        assert!(Think::new(1.0, 32, 32).is_err());
    }
}
