//! KVQuant's codecs of keys and of values.

use std::sync::Arc;

use super::{KvQuant, StaticKeys, check_dim};
use crate::error::{Result, refuse};
use crate::linalg::Rope;
use crate::options::Options;
use crate::quantize::pages::{HeadGrids, KeyPage, PreRopeKeys, TokenValues, ValuePage};
use crate::quantize::tokens::Format;
use crate::quantize::{Codec, Made, Method, Plan};
use crate::tensor::{Limit, Rows};

/// KVQuant's codec of keys.
#[derive(Clone, Debug, PartialEq)]
pub struct KvQuantKeys {
    method: Arc<KvQuant>,
    keys: Arc<StaticKeys>,
}

/// KVQuant's codec of values.
#[derive(Clone, Debug, PartialEq)]
pub struct KvQuantValues(pub Arc<KvQuant>);

impl KvQuantKeys {
    /// Keys by `method`, on the grids that were found for them.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when the grids are none.
    pub fn new(method: KvQuant, keys: StaticKeys) -> Result<Self> {
        keys.check()?;
        Ok(Self { method: Arc::new(method), keys: Arc::new(keys) })
    }
}

/// Keys, where there are ranges for them; else values.
pub(in crate::quantize) fn from_options(options: &mut Options) -> Result<Made> {
    let (bits, window, sinks) = (options.whole("bits")?, options.whole("window")?, options.whole("sinks")?);
    let norm = [options.number("factor")?, options.number("offset")?];
    let method = KvQuant::new(bits, &options.numbers("levels")?, norm, options.number("outliers")?, window, sinks)?;
    let boxed = |ends: Vec<Vec<f32>>| ends.into_iter().map(Into::into).collect();
    let (low, high) = (options.table("low")?, options.table("high")?);
    let rope = Rope::of(&mut options.options("rotation")?.unwrap_or_default())?;
    Ok(match low.zip(high) {
        Some((low, high)) => {
            Made::keys(KvQuantKeys::new(method, StaticKeys { low: boxed(low), high: boxed(high), rope })?)
        }
        None => Made::values(KvQuantValues(Arc::new(method))),
    })
}

impl Method for KvQuantValues {
    fn sinks(&self) -> usize {
        self.0.sinks
    }

    fn window(&self) -> usize {
        self.0.window
    }

    fn limit(&self) -> Limit {
        self.0.limit()
    }
}

impl Codec<ValuePage> for KvQuantValues {
    fn check(&self, _: Option<usize>, dim: usize) -> Result<()> {
        check_dim(dim)
    }

    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.0.window)
    }

    fn seal(&self, _: &mut Plan, rows: &Rows, n: usize) -> Result<(ValuePage, usize)> {
        Ok(TokenValues::seal(Format::new(self.0.clone(), None, rows.dim()), None, rows, n))
    }
}

impl Method for KvQuantKeys {
    fn sinks(&self) -> usize {
        self.method.sinks
    }

    fn window(&self) -> usize {
        self.method.window
    }

    fn limit(&self) -> Limit {
        self.method.limit()
    }

    fn table_bytes(&self) -> usize {
        self.keys.bytes()
    }

    fn shared_table(&self) -> Option<(usize, usize)> {
        Some((Arc::as_ptr(&self.keys.rope) as usize, self.keys.rope.bytes()))
    }
}

impl Codec<KeyPage> for KvQuantKeys {
    /// The grids are those of keys of `dim` numbers, and if it is known how many `heads` there are, of all.
    fn check(&self, heads: Option<usize>, dim: usize) -> Result<()> {
        check_dim(dim)?;
        let calibrated = [self.keys.low.len(), self.keys.low[0].len()];
        let given = [heads.unwrap_or(calibrated[0]), dim];
        let channels = self.keys.rope.channels();
        if given == calibrated && channels <= dim {
            return Ok(());
        }
        refuse(
            "quantize",
            format!("a calibration of {calibrated:?} KV heads and numbers, {channels} of them rotated"),
            format!("one of {given:?}, as this model has"),
        )
    }

    fn due(&self, n: usize) -> usize {
        n.saturating_sub(self.method.window)
    }

    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(KeyPage, usize)> {
        let grids = plan.head_grids(|head| HeadGrids::new(&self.method, &self.keys, head));
        Ok(PreRopeKeys::seal(grids, plan.first, rows, n))
    }
}
