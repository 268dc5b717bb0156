//! One attention layer's cache: the sequences of a batch.

use std::sync::Arc;

use super::head::KvHead;
use super::memory::{ARC_HEADER, Counter, Memory};
use crate::attend::kernels::{self, Kernels};
use crate::attend::{Quest, Softmax};
use crate::error::{Error, Result};
use crate::evict::Eviction;
use crate::pool;
use crate::quantize::Codec;
use crate::tensor::{Dtype, View};

/// Multiply-adds that take as long as copying a number.
pub(super) const COPYING: usize = 8;

/// Multiply-adds that take as long as packing a number.
fn packing(codec: &Codec) -> usize {
    if *codec == Codec::EXACT { COPYING } else { 64 }
}

/// The kernels in use.
pub(super) fn chosen() -> &'static Kernels {
    kernels::chosen().expect("the name was checked when the layer was made")
}

/// What the first keys and values fix for all that follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The model's dtype.
    pub dtype: Dtype,
    /// KV heads.
    pub heads: usize,
    /// Numbers of a key.
    pub key_dim: usize,
    /// Numbers of a value.
    pub value_dim: usize,
}

/// Tokens to append.
#[derive(Clone, Copy)]
pub struct New<'a> {
    /// Keys `[B, H, n, Dk]`.
    pub k: &'a View<'a>,
    /// Values `[B, H, n, Dv]`.
    pub v: &'a View<'a>,
    /// Which are not pads `[B, n]`; pads are not stored. Without it none is one.
    pub valid: Option<&'a [bool]>,
    /// What attends to them, for methods that want to know it.
    pub readers: Option<Readers<'a>>,
    /// Whether what is due is packed too, as [`Layer::settle`] does.
    pub settle: bool,
}

/// The queries that come with new tokens.
#[derive(Clone, Copy)]
pub struct Readers<'a> {
    /// `[B, Hq, n, Dk]`, rotated.
    pub query: &'a View<'a>,
    /// Scaling and cap of the logits.
    pub softmax: Softmax,
    /// Learned logits, one a query head, that take weight and add nothing.
    pub sinks: Option<&'a [f32]>,
}

/// The KV heads of one sequence.
pub(super) type Sequence = Vec<KvHead>;

/// Keys and values of one layer for a batch of sequences. A clone shares everything and copies what changes.
#[derive(Clone)]
pub struct Layer {
    codec: Codec,
    pub(super) eviction: Option<Arc<Eviction>>,
    /// How much one query reads, if not all.
    pub(super) quest: Option<Quest>,
    /// Whether it belongs to layers of which one query reads only some pages, be it one that is read whole.
    selects: bool,
    /// Whether keys are held less the mean of the first ones.
    centers: bool,
    pub(super) shape: Option<Shape>,
    pub(super) rows: Vec<Arc<Sequence>>,
    /// Positions seen, pads included: the logical length.
    pub(super) seen: usize,
    /// Positions up to which tokens were chosen: what went does not come back.
    pub(super) final_to: usize,
}

impl Layer {
    /// An empty layer that keeps all tokens.
    pub fn new(codec: Codec) -> Self {
        let rows = Vec::new();
        Self {
            codec,
            eviction: None,
            quest: None,
            selects: false,
            centers: false,
            shape: None,
            rows,
            seen: 0,
            final_to: 0,
        }
    }

    /// The layer, with an eviction that chooses tokens.
    #[must_use]
    pub fn with_eviction(self, eviction: Option<Arc<Eviction>>) -> Self {
        Self { eviction, ..self }
    }

    /// The layer, of which one query reads only some pages.
    #[must_use]
    pub fn with_quest(self, quest: Option<Quest>) -> Self {
        Self { selects: quest.is_some(), quest, ..self }
    }

    /// The layer, one of several of which one query reads only some pages, while this one is read whole.
    #[must_use]
    pub fn among_selected(self) -> Self {
        Self { selects: true, ..self }
    }

    /// Whether only our attention may read it, which chooses pages of it or of other layers.
    pub fn selects(&self) -> bool {
        self.selects
    }

    /// The layer, whose keys are held less the mean of the first ones.
    #[must_use]
    pub fn with_centers(self, centers: bool) -> Self {
        Self { centers, ..self }
    }

    /// Whether attention changes nothing when all keys move, and keys are held so.
    pub fn centers(&self) -> bool {
        self.centers
    }

    /// What chooses tokens, if anything does.
    pub fn eviction(&self) -> Option<&Eviction> {
        self.eviction.as_deref()
    }

    /// Whether `append` wants to see the readers of new tokens.
    pub fn wants_queries(&self) -> bool {
        self.codec.keys.wants_queries() || self.eviction().is_some_and(Eviction::wants_queries)
    }

    /// Whether what tokens receive from each query of decoding is wanted.
    pub fn wants_attention(&self) -> bool {
        self.eviction().is_some_and(Eviction::wants_attention)
    }

    /// How tokens are stored.
    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Heads, dims and dtype, once the first tokens came.
    pub fn shape(&self) -> Option<Shape> {
        self.shape
    }

    /// Positions seen.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Sequences of the batch.
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// A KV head of a sequence.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is none of that number.
    pub fn head(&self, row: usize, head: usize) -> Result<&KvHead> {
        self.rows.get(row).and_then(|heads| heads.get(head)).ok_or_else(|| Error::Shape {
            what: "row and head",
            given: format!("row {row}, head {head}"),
            expected: format!("a row below {} and a head below {}", self.batch(), self.shape.map_or(0, |s| s.heads)),
        })
    }

    /// Checks that keys `[B, H, n, Dk]` and values `[B, H, n, Dv]` can be appended.
    ///
    /// # Errors
    /// The first thing that does not fit; nothing has changed then.
    pub fn check(&self, k: &View<'_>, v: &View<'_>) -> Result<()> {
        let shape = self.shape_of(k, v)?;
        if let Some(held) = self.shape {
            expect("keys: KV heads", shape.heads, held.heads)?;
            expect("keys: head dim", shape.key_dim, held.key_dim)?;
            expect("values: head dim", shape.value_dim, held.value_dim)?;
            if shape.dtype != held.dtype {
                return Err(Error::Dtype {
                    what: "keys and values",
                    given: shape.dtype.name().into(),
                    expected: format!("{}, as this cache holds", held.dtype.name()),
                });
            }
            expect("keys: batch size", k.shape()[0], self.batch())?;
        }
        let n = self.seen + k.shape()[2];
        if u32::try_from(n).is_err() {
            return Err(Error::Shape {
                what: "sequence length",
                given: n.to_string(),
                expected: "less than 2^32".into(),
            });
        }
        k.check_magnitude("keys", self.codec.keys.limit())?;
        v.check_magnitude("values", self.codec.values.limit())
    }

    fn shape_of(&self, k: &View<'_>, v: &View<'_>) -> Result<Shape> {
        let ([b, heads, n, key_dim], [vb, vh, vn, value_dim]) = (k.shape(), v.shape());
        if [b, heads, n, key_dim, value_dim].contains(&0) {
            return Err(Error::Shape {
                what: "keys and values",
                given: format!("{:?} and {:?}", k.shape(), v.shape()),
                expected: "at least one row, head, token and dim".into(),
            });
        }
        if [vb, vh, vn] != [b, heads, n] {
            return Err(Error::Shape {
                what: "values",
                given: format!("{:?}", v.shape()),
                expected: format!("[{b}, {heads}, {n}, dim], as the keys have"),
            });
        }
        if k.dtype() != v.dtype() {
            return Err(Error::Dtype {
                what: "values",
                given: v.dtype().name().into(),
                expected: k.dtype().name().into(),
            });
        }
        self.codec.check_dims(Some(heads), key_dim, value_dim)?;
        Ok(Shape { dtype: k.dtype(), heads, key_dim, value_dim })
    }

    /// Appends tokens that were [checked](Self::check).
    ///
    /// # Errors
    /// As `check`, apart from the numbers' magnitude, which is not looked at again; [`Error::Shape`] when the queries'
    /// shape does not fit; [`Error::Option`] when an eviction wants to see queries and there are none.
    pub fn append(&mut self, new: &New<'_>) -> Result<()> {
        let New { k, v, valid, readers, settle } = *new;
        let shape = self.shape_of(k, v)?;
        self.check_seen(readers)?;
        let query = readers.map(|readers| readers.query).filter(|_| self.wants_queries());
        if let Some(query) = query {
            let [batch, heads, n, dim] = query.shape();
            expect("query: batch size", batch, k.shape()[0])?;
            expect("query: tokens", n, k.shape()[2])?;
            expect("query: head dim", dim, shape.key_dim)?;
            expect("query: heads beyond a multiple of the KV heads", heads % shape.heads, 0)?;
        }
        let [batch, heads, n, _] = k.shape();
        if let Some(valid) = valid {
            expect("valid: length", valid.len(), batch * n)?;
        }
        let row_valid = |b: usize| valid.map(|valid| &valid[b * n..(b + 1) * n]);
        // Rows of an expanded prompt (beams, returned sequences) arrive as copies: hold them once.
        let source: Vec<usize> = (0..batch)
            .map(|b| {
                let same = |a: usize| row_valid(a) == row_valid(b) && k.same_rows(a, b) && v.same_rows(a, b);
                if self.seen == 0 && b > 0 && same(b - 1) { b - 1 } else { b }
            })
            .collect();
        if self.shape.is_none() {
            self.shape = Some(shape);
            let empty = |h| KvHead::new(h, shape.dtype, shape.key_dim, shape.value_dim);
            self.rows = (0..batch).map(|_| Arc::new((0..heads).map(empty).collect())).collect();
        }
        // With an eviction nothing is packed before it was chosen.
        let (seen, eviction, centers) = (self.seen, self.eviction.clone(), self.centers);
        let codec = (settle && eviction.is_none()).then_some(&self.codec);
        let keys = &self.codec.keys;
        let (squares, moment) = (query.filter(|_| keys.wants_squares()), query.filter(|_| keys.wants_moment()));
        let mut work = Vec::with_capacity(batch * heads);
        for (b, row) in self.rows.iter_mut().enumerate().filter(|&(b, _)| source[b] == b) {
            work.extend(Arc::make_mut(row).iter_mut().enumerate().map(|(h, head)| (b, h, head)));
        }
        let numbers = batch * heads * n * (shape.key_dim + shape.value_dim);
        pool::map(numbers * codec.map_or(COPYING, packing), work, |(b, h, head)| {
            if let Some(query) = squares {
                head.observe(query, [b, h], shape.heads, row_valid(b));
            }
            if let Some(query) = moment {
                head.observe_moment(query, [b, h], shape.heads, row_valid(b));
            }
            head.append(k, v, [b, h], row_valid(b), seen, codec, centers);
            if let Some(eviction) = &eviction {
                head.witness(eviction, new, [b, h], row_valid(b), seen);
            }
        });
        for (b, &source) in source.iter().enumerate() {
            if source != b {
                self.rows[b] = Arc::clone(&self.rows[source]);
            }
        }
        self.seen += n;
        if settle && eviction.is_some() {
            self.settle();
        }
        self.cover();
        Ok(())
    }

    fn check_seen(&self, readers: Option<Readers<'_>>) -> Result<()> {
        match &self.eviction {
            Some(eviction) if eviction.wants_queries() && readers.is_none() => Err(Error::Option {
                name: "evict",
                given: "a method that scores tokens by the queries that attend to them".into(),
                accepted: "KeyDiff, L2Norm, StreamingLLM, Longformer, Random, which look at keys or positions alone; or, where \
                           the model's kind supports it, attn_implementation='kvpack': this layer's attention is not kvpack's"
                    .into(),
            }),
            _ => Ok(()),
        }
    }

    /// Lets tokens go and packs others, as far as eviction and codec say that it is due.
    pub fn settle(&mut self) {
        self.evict();
        let codec = self.codec.clone();
        self.each_unique(
            |row| row.iter().any(|head| head.numbers_due(&codec) > 0),
            |rows| {
                let heads: Vec<_> = rows.into_iter().flatten().collect();
                let due: usize = heads.iter().map(|head| head.numbers_due(&codec)).sum();
                pool::map(due * packing(&codec), heads, |head| head.settle(&codec));
            },
        );
        self.cover();
    }

    /// Makes new pages known to those who choose among them.
    fn cover(&mut self) {
        let Some(quest) = self.quest else { return };
        let dim = self.shape.map_or(0, |shape| shape.key_dim);
        self.each_unique(
            |row| row.iter().any(|head| head.uncovered() > 0),
            |rows| {
                let heads: Vec<_> = rows.into_iter().flatten().collect();
                let tokens: usize = heads.iter().map(|head| head.uncovered()).sum();
                pool::map(tokens * dim * COPYING, heads, |head| head.cover(quest));
            },
        );
    }

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

    /// All heads, row by row.
    pub(super) fn heads(&self) -> impl Iterator<Item = &KvHead> {
        self.rows.iter().flat_map(|row| row.iter())
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
        if reachable < n { Err(Error::Crop { asked: n, reachable }) } else { Ok(()) }
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

    /// Forgets everything but the methods.
    pub fn reset(&mut self) {
        (self.shape, self.rows, self.seen, self.final_to) = (None, Vec::new(), 0, 0);
    }

    /// How many of the numbers of all tokens, the newest `new` positions aside, are not what the model made, or gone; and how
    /// many there are.
    pub fn lossy(&self, new: usize) -> (usize, usize) {
        let (mut lossy, mut held) = (0, 0);
        for head in self.heads() {
            let (key_dim, value_dim) = (head.keys.tail.dim(), head.values.tail.dim());
            lossy += head.keys.lossy() * key_dim + head.values.lossy() * value_dim;
            let here = head.positions.count_below(self.seen().saturating_sub(new));
            let gone = head.gone(self.seen(), new);
            lossy += gone * (key_dim + value_dim);
            held += (here + gone) * (key_dim + value_dim);
        }
        (lossy.min(held), held)
    }

    /// Bytes allocated for this layer; what its sequences share is counted once.
    pub fn memory(&self) -> Memory {
        let mut counter = Counter::default();
        for row in &self.rows {
            if counter.first(row) {
                counter.memory.index += ARC_HEADER + size_of::<Sequence>();
                row.iter().for_each(|head| head.count(None, &mut counter));
            }
        }
        counter.memory.index += self.rows.capacity() * size_of::<Arc<Sequence>>();
        counter.memory
    }
}

pub(super) fn expect(what: &'static str, given: usize, expected: usize) -> Result<()> {
    if given == expected {
        return Ok(());
    }
    Err(Error::Shape { what, given: given.to_string(), expected: expected.to_string() })
}
