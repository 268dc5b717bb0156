//! Attention received so far, older queries' fading: `A <- alpha A + sum over the readers of softmax(q . k)`, query by query.
//!
//! | `alpha` | method |
//! |---|---|
//! | 1 | H2O (Zhang et al. 2023, arXiv 2306.14048): heavy hitters |
//! | between | A2SF (Jo and Shin 2024, arXiv 2407.20485), the forgetting factor |
//! | 0, one decision for all heads | TOVA (Oren et al. 2024, arXiv 2401.06104): the last query alone |

use super::{Queries, refuse};
use crate::error::Result;

/// Queries of less weight change no choice.
const FORGOTTEN: f32 = 1e-6;

/// The parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// What a query counts once there is a newer one.
    pub alpha: f32,
    /// Whether all heads of a layer keep the same tokens.
    pub shared: bool,
}

impl Attention {
    pub(super) fn check(self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.alpha) {
            return refuse("alpha", self.alpha, "0 to 1");
        }
        Ok(())
    }

    /// The queries of a prompt that still count at its end.
    pub(super) fn queries(self) -> Queries {
        if self.alpha >= 1.0 {
            return Queries::All;
        }
        let newest = if self.alpha <= 0.0 { 1.0 } else { (FORGOTTEN.ln() / self.alpha.ln()).ceil().max(1.0) };
        Queries::Newest(newest as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgetting_bounds_the_queries() {
        let queries = |alpha| Attention { alpha, shared: false }.queries();
        assert_eq!(queries(0.0), Queries::Newest(1));
        assert_eq!(queries(0.95), Queries::Newest(270));
        assert_eq!(queries(1.0), Queries::All);
    }
}
