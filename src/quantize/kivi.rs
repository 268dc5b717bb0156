//! KIVI: asymmetric 2 to 8 bits, tuning-free (Liu et al. 2024, arXiv 2402.02750).
//!
//! Keys have channels that are large for all tokens, values have not. So keys are quantised per channel, over
//! groups of `group` tokens, and values per token, over groups of `group` channels:
//!
//! ```text
//! zero = min(x)    scale = (max(x) - min(x)) / (2^bits - 1)    code = round((x - zero) / scale)
//! x' = scale * code + zero
//! ```
//!
//! scale and zero are stored as f16, and codes are computed from the stored ones. The flush rule of the paper: keys
//! wait until `window` of them can be packed together (a group needs all its tokens), values leave one by one as
//! soon as `window` newer ones are held. The first `sinks` tokens stay exact (not in the paper; 0 gives it).
//!
//! The scales never meet the codes: `q . k'_t = sum_c (q_c scale_c) code_tc + sum_c q_c zero_c` folds a channel's scale
//! into the query, `sum_t w_t v'_t = sum_t (w_t scale_t) code_t + sum_t w_t zero_t` a token's into its weight. What is
//! folded becomes integers ([`crate::format::folded`]).

#![forbid(unsafe_code)]

use std::sync::Arc;

use super::grid::Asymmetric;
use super::pages::{Band, ChannelKeys, Channels, KeyPage, TokenValues, ValuePage};
use super::tokens::Format;
use super::{Codec, Gptq, Method, Plan, check_groups, f16_limit, whole_windows};
use crate::error::{Result, refuse};
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// KIVI's parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct Kivi {
    /// The paper's residual length R: keys are packed in blocks of it, the newest values stay exact.
    pub window: usize,
    /// Exact tokens at the beginning of a sequence.
    pub sinks: usize,
    /// Whether at least the newest `window` keys stay exact; else fewer than `window` do.
    pub full_window: bool,
    /// How roundings are made up for, if they are.
    pub compensation: Option<Arc<Gptq>>,
    /// Bits of a code, and numbers that share a scale and a zero-point.
    grids: Arc<Asymmetric>,
}

impl Kivi {
    /// Checks the parameters: bits of a code are 2, 3, 4 or 8, `group` numbers share a scale and a zero-point.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) for the first that does not fit.
    pub fn new(bits: u8, group: usize, window: usize, sinks: usize) -> Result<Self> {
        if !matches!(bits, 2 | 3 | 4 | 8) {
            return refuse("bits", bits, "2, 3, 4, 8");
        }
        check_groups(group, window)?;
        let grids = Arc::new(Asymmetric { bits, group });
        Ok(Self { window, sinks, full_window: false, compensation: None, grids })
    }

    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let sizes = [options.whole("group")?, options.whole("window")?, options.whole("sinks")?];
        let kivi = Self::new(options.whole("bits")?, sizes[0], sizes[1], sizes[2])?;
        Ok(Self { full_window: options.flag("full_window")?, compensation: Gptq::of(options)?, ..kivi })
    }
}

impl Method for Kivi {
    fn sinks(&self) -> usize {
        self.sinks
    }

    fn window(&self) -> usize {
        self.window
    }

    fn limit(&self) -> Limit {
        Limit::of_numbers(f16_limit())
    }

    fn compensation(&self) -> Option<&Arc<Gptq>> {
        self.compensation.as_ref()
    }
}

impl Codec<KeyPage> for Kivi {
    /// A group needs all its tokens.
    fn due(&self, n: usize) -> usize {
        whole_windows(n, self.window, self.full_window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, _: usize) -> Result<(KeyPage, usize)> {
        let bands = plan.bands(|| vec![Band { bits: self.grids.bits, channels: rows.dim() }]);
        let form = Channels { group: self.grids.group, bands, compensation: self.compensation(), factors: None };
        Ok(ChannelKeys::seal(plan, form, rows.to_f32(0..self.window), rows.dim()))
    }
}

impl Codec<ValuePage> for Kivi {
    fn check(&self, heads: Option<usize>, dim: usize) -> Result<()> {
        if self.grids.group > dim {
            return refuse("group", self.grids.group, format!("multiples of 8 up to this model's head_dim, {dim}"));
        }
        self.compensation().map_or(Ok(()), |gptq| gptq.check_dims(heads, dim))
    }

    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(ValuePage, usize)> {
        let format = Format::new(self.grids.clone(), None, rows.dim());
        Ok(TokenValues::seal(format, plan.compensation(self.compensation()).as_deref(), rows, n))
    }
}
