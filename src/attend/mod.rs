//! Reading: attention of some queries over the tokens that one KV head holds, in whatever form.
//!
//! The one idea is the segment: keys of consecutive tokens that can give their logits, and values of
//! consecutive tokens that can add their weighted sum. Results over parts of the tokens are [`Partial`]s and
//! merge by log-sum-exp, so that heads, ranges of tokens and threads split freely (flash-decoding,
//! Dao et al. 2023, with the online softmax of Milakov and Gimelshein 2018). What takes weight without being tokens is a
//! [`Summary`], and merges so as well.

mod chunks;
mod decode;
mod many;
mod partial;
mod positions;
mod scores;
mod segment;
mod softmax;
mod summary;
#[cfg(test)]
mod tests;
mod visibility;
mod weights;

pub use chunks::{CHUNK, KeyChunk, chunks_in, key_chunks};
pub use decode::attend_one;
pub use many::attend_many;
pub use partial::Partial;
pub use positions::Positions;
pub use scores::{ScoringQueries, add_scores};
pub use segment::{Head, KeySegment, Part, Scratch, ValueSegment, Weights};
pub use softmax::{Softmax, add_bias, cap};
pub use summary::{SinkLogits, Summary, SummaryQueries};
pub use visibility::{Mask, MaskData, Seen, Visibility};
pub use weights::{Attention, TokenWeights};

/// What rounding queries to integers may add to a logit (root mean square). It changes weights by as much, and outputs, which
/// are averages, by less: below 1e-4 of the largest.
pub const KEY_TOLERANCE: f32 = 4e-5;

/// Queries of one KV head's query heads.
pub struct Queries<'a> {
    /// `[G, queries, key_dim]`, scaled.
    pub q: Vec<f32>,
    /// Which of the forward's queries these are.
    pub range: std::ops::Range<usize>,
    /// The first of the `G` query heads.
    pub first_head: usize,
    /// How logits become weights.
    pub softmax: Softmax,
    /// Which positions they see.
    pub visible: Visibility<'a>,
    /// Whether one query's attention score of every token is wanted too.
    pub scores: bool,
}
