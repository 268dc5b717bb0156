//! The `quantize` family: fewer bits a number.
//!
//! A codec of keys and one of values ([`Codec`]) seal tokens into pages and say when: how many of the oldest unsealed tokens are
//! due. A page holds the keys or the values of consecutive tokens of one KV head; it is shared behind an `Arc` and copied before
//! a change. To add a method: one file with a [`Method`] and its [`Codec`]s, a row in [`make`], and if no page fits a page type.

#![forbid(unsafe_code)]

mod block;
mod compensation;
mod exact;
mod graded;
mod grid;
mod kivi;
mod kvarn;
mod kvquant;
mod levels;
mod pages;
mod plan;
mod rotated;
mod sliced;
#[cfg(test)]
mod tests;
mod think;
mod tokens;

pub use block::Block;
pub(crate) use compensation::SAMPLES;
pub use compensation::{Factor, Gptq};
pub use exact::Exact;
pub use graded::Graded;
pub use kivi::Kivi;
pub use kvarn::Kvarn;
pub use kvquant::{KvQuant, KvQuantKeys, KvQuantValues, StaticKeys};
pub use pages::{
    Band, ChannelKeys, KeyPage, Page, PageBytes, PreRopeKeys, Shifted, SlicedRows, TokenKeys, TokenValues, ValuePage,
};
pub use plan::Plan;
pub(crate) use plan::SHORT;
pub use rotated::{Rotated, Spacing};
pub use sliced::Sliced;
pub use think::Think;

use std::fmt::Debug;
use std::sync::Arc;

use crate::error::{Result, refuse};
use crate::options::Options;
use crate::tensor::{Limit, Rows};

/// Multiply-adds that take as long as packing a number.
const PACKING: usize = 64;

/// What a method says of itself, whether it stores keys or values.
pub trait Method: Debug + Send + Sync {
    /// Tokens at the beginning of a sequence that stay exact.
    fn sinks(&self) -> usize;

    /// Tokens of one forward up to which packing may wait for the next one.
    fn window(&self) -> usize;

    /// The largest numbers and vectors that can be stored.
    fn limit(&self) -> Limit;

    /// Multiply-adds that take as long as packing a number; 0 where it has to be done on the caller's thread, as code of the caller's
    /// does it.
    fn work(&self) -> usize {
        PACKING
    }

    /// How roundings are made up for, if they are.
    fn compensation(&self) -> Option<&Arc<Gptq>> {
        None
    }

    /// Bytes of what a calibration found.
    fn table_bytes(&self) -> usize {
        self.compensation().map_or(0, |gptq| gptq.bytes())
    }

    /// A number and bytes of what all layers share, if there is such.
    fn shared_table(&self) -> Option<(usize, usize)> {
        None
    }
}

/// What a codec wants to know of the queries that meet its tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wants {
    /// Their mean squares, channel by channel: of so many at the end of each prompt, and of all others.
    pub squares: Option<usize>,
    /// The mean squares of a prompt's keys.
    pub keys: bool,
    /// The second moment of a prompt's.
    pub moment: bool,
    /// Whether nothing can be decided without them.
    pub needed: bool,
}

/// A way of storing keys (`P` is [`KeyPage`]), or values ([`ValuePage`]).
pub trait Codec<P>: Method {
    /// Checks that vectors of `dim` numbers, of `heads` KV heads if it is known how many there are, can be stored.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when they cannot.
    fn check(&self, heads: Option<usize>, dim: usize) -> Result<()> {
        self.compensation().map_or(Ok(()), |gptq| gptq.check_dims(heads, dim))
    }

    /// What decides something of the queries.
    fn wants(&self) -> Wants {
        let moment = self.compensation().is_some_and(|gptq| gptq.wants_queries());
        Wants { moment, ..Wants::default() }
    }

    /// How many of `n` unsealed tokens are due to be sealed, oldest first.
    fn due(&self, n: usize) -> usize;

    /// Seals at least one and at most all of the `n` oldest of `rows`; returns the page and how many it took.
    ///
    /// # Errors
    /// What code of the caller's raises, where a codec calls some.
    fn seal(&self, plan: &mut Plan, rows: &Rows, n: usize) -> Result<(P, usize)>;
}

/// A codec of keys.
pub type KeyCodec = dyn Codec<KeyPage>;

/// A codec of values.
pub type ValueCodec = dyn Codec<ValuePage>;

/// How keys and values that have left the exact window are stored.
#[derive(Clone, Debug)]
pub struct Codecs {
    /// Keys.
    pub keys: Arc<KeyCodec>,
    /// Values.
    pub values: Arc<ValueCodec>,
}

impl Codecs {
    /// Keys by one method, values by another.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when the one for values wants to see queries.
    pub fn new(keys: Arc<KeyCodec>, values: Arc<ValueCodec>) -> Result<Self> {
        if values.wants() != Wants::default() {
            return refuse("compensation", "GPTQ without metrics", "GPTQ with metrics, for values");
        }
        Ok(Self { keys, values })
    }

    /// Everything in the model's own dtype.
    pub fn exact() -> Self {
        Self::both(Exact)
    }

    /// Keys and values by the same method.
    pub fn both(method: impl Codec<KeyPage> + Codec<ValuePage> + 'static) -> Self {
        let method = Arc::new(method);
        Self { keys: method.clone(), values: method }
    }

    /// Tokens of one forward up to which packing waits for the next forward, so that they can be cropped.
    pub fn window(&self) -> usize {
        match self.keys.window().max(self.values.window()) {
            0 => exact::PAGE,
            window => window,
        }
    }

    /// Multiply-adds that take as long as packing a number; 0 as in [`Method::work`].
    pub fn work(&self) -> usize {
        match [self.keys.work(), self.values.work()] {
            [0, _] | [_, 0] => 0,
            [keys, values] => keys.max(values),
        }
    }

    /// Bytes of what a calibration found; and a number and bytes of what all layers share.
    pub fn tables(&self) -> (usize, Option<(usize, usize)>) {
        (self.keys.table_bytes() + self.values.table_bytes(), self.keys.shared_table())
    }

    /// Checks that keys of `key_dim` numbers and values of `value_dim` can be stored, of `heads` KV heads if it is known how many
    /// there are.
    ///
    /// # Errors
    /// [`Error::Option`](crate::error::Error::Option) when they cannot.
    pub fn check(&self, heads: Option<usize>, key_dim: usize, value_dim: usize) -> Result<()> {
        self.keys.check(heads, key_dim)?;
        self.values.check(heads, value_dim)
    }
}

/// What a name and options stand for: a codec of keys, of values, or of both.
#[derive(Clone, Debug, Default)]
pub struct Made {
    /// Of keys.
    pub keys: Option<Arc<KeyCodec>>,
    /// Of values.
    pub values: Option<Arc<ValueCodec>>,
}

impl Made {
    fn both(method: impl Codec<KeyPage> + Codec<ValuePage> + 'static) -> Self {
        let Codecs { keys, values } = Codecs::both(method);
        Self { keys: Some(keys), values: Some(values) }
    }

    fn keys(method: impl Codec<KeyPage> + 'static) -> Self {
        Self { keys: Some(Arc::new(method)), values: None }
    }

    fn values(method: impl Codec<ValuePage> + 'static) -> Self {
        Self { keys: None, values: Some(Arc::new(method)) }
    }
}

/// Makes the codecs of a method from its options.
type Maker = fn(&mut Options) -> Result<Made>;

/// The methods by name.
const METHODS: &[(&str, Maker)] = &[
    ("exact", |_| Ok(Made::both(Exact))),
    ("kivi", |options| Kivi::from_options(options).map(Made::both)),
    ("block", |options| Block::from_options(options).map(Made::both)),
    ("rotated", |options| Rotated::from_options(options).map(Made::both)),
    ("graded", |options| Graded::from_options(options).map(Made::keys)),
    ("kvarn", |options| Kvarn::from_options(options).map(Made::both)),
    ("kvquant", kvquant::from_options),
    ("sliced", |options| Sliced::from_options(options).map(Made::both)),
    ("think", |options| Think::from_options(options).map(Made::keys)),
];

/// The codecs of that name.
///
/// # Errors
/// [`Error::Option`](crate::error::Error::Option) when there is none, or an option is not accepted.
pub fn make(name: &str, options: &mut Options) -> Result<Made> {
    match METHODS.iter().find(|(known, _)| *known == name) {
        Some((_, make)) => make(options),
        None => refuse("quantize", name, METHODS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")),
    }
}

/// Checks a group of tokens that share a grid, and the window that is packed at a time.
fn check_groups(group: usize, window: usize) -> Result<()> {
    use crate::attend::CHUNK;
    use crate::format::codes::LANES;
    if group == 0 || !group.is_multiple_of(LANES) || group > CHUNK {
        return refuse("group", group, "multiples of 8 from 8 to 256");
    }
    if window == 0 || !window.is_multiple_of(group) {
        return refuse("window", window, format!("positive multiples of group={group}"));
    }
    Ok(())
}

/// How many of `n` tokens are packed when whole windows of them are packed at a time: the published rule leaves fewer than a window
/// exact, a full window leaves at least that.
fn whole_windows(n: usize, window: usize, full: bool) -> usize {
    n.saturating_sub(if full { window } else { 0 }) / window * window
}

/// The largest number of which float16 holds the scale.
fn f16_limit() -> f32 {
    half::f16::MAX.to_f32()
}
