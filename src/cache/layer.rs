//! One attention layer's cache: the sequences of a batch.

use std::sync::Arc;

use super::head::KvHead;
use super::memory::{ARC_HEADER, Counter, Memory};
use crate::compact::Compactor;
use crate::error::{Error, Result};
use crate::evict::Eviction;
use crate::kernels::{self, Kernels};
use crate::prune::Prune;
use crate::quantize::Codecs;
use crate::select::Selector;
use crate::tensor::{Dtype, View};

/// Multiply-adds that take as long as copying a number.
pub(super) const COPYING: usize = 8;

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

/// What is done to a layer's tokens, a method a family.
#[derive(Clone, Debug)]
pub struct Methods {
    /// How they are stored.
    pub codecs: Codecs,
    /// Which of them stay; `None`: all.
    pub eviction: Option<Arc<Eviction>>,
    /// What becomes of those that leave; `None`: nothing.
    pub compactor: Option<Arc<dyn Compactor>>,
    /// Which of them one query reads; `None`: all.
    pub selector: Option<Arc<dyn Selector>>,
    /// What is held of each head; `None`: all.
    pub prune: Option<Arc<dyn Prune>>,
}

impl From<Codecs> for Methods {
    fn from(codecs: Codecs) -> Self {
        Self { codecs, eviction: None, compactor: None, selector: None, prune: None }
    }
}

/// The KV heads of one sequence.
pub(super) type Sequence = Vec<KvHead>;

/// Keys and values of one layer for a batch of sequences. A clone shares everything and copies what changes.
#[derive(Clone)]
pub struct Layer {
    pub(super) methods: Arc<Methods>,
    /// Whether it belongs to layers of which one query reads only some pages, be it one that is read whole.
    selects: bool,
    /// Whether keys are held less the mean of the first ones.
    centers: bool,
    /// How many of the newest positions, its own among them, a query of the model sees; `None`: all.
    pub(super) window: Option<usize>,
    pub(super) shape: Option<Shape>,
    pub(super) rows: Vec<Arc<Sequence>>,
    /// Positions seen, pads included: the logical length.
    pub(super) seen: usize,
    /// Positions up to which tokens were chosen: what went does not come back.
    pub(super) final_to: usize,
}

impl Layer {
    /// An empty layer.
    pub fn new(methods: impl Into<Methods>) -> Self {
        let methods = methods.into();
        Self {
            selects: methods.selector.is_some(),
            methods: Arc::new(methods),
            centers: false,
            window: None,
            shape: None,
            rows: Vec::new(),
            seen: 0,
            final_to: 0,
        }
    }

    /// The layer, one of several of which one query reads only some pages, while this one may be read whole.
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

    /// The layer, of which a query sees the `window` newest positions only, its own among them.
    #[must_use]
    pub fn with_window(self, window: Option<usize>) -> Self {
        Self { window: window.map(|window| window.max(1)), ..self }
    }

    /// What is done to its tokens.
    pub fn methods(&self) -> &Methods {
        &self.methods
    }

    /// How tokens are stored.
    pub fn codecs(&self) -> &Codecs {
        &self.methods.codecs
    }

    /// What chooses tokens, if anything does.
    pub fn eviction(&self) -> Option<&Eviction> {
        self.methods.eviction.as_deref()
    }

    /// Whether `append` wants to see the queries that come with new tokens.
    pub fn wants_queries(&self) -> bool {
        let wants = |codecs: &Codecs| codecs.keys.wants().squares.is_some() || codecs.keys.wants().moment;
        self.methods.all_codecs().any(wants) || self.eviction().is_some_and(Eviction::wants_queries)
    }

    /// Whether nothing can be decided without them.
    pub fn needs_queries(&self) -> bool {
        let needed = |codecs: &Codecs| codecs.keys.wants().needed;
        self.methods.all_codecs().any(needed) || self.eviction().is_some_and(Eviction::wants_queries)
    }

    /// Whether the tokens' attention scores from each query of decoding are wanted.
    pub fn wants_attention(&self) -> bool {
        self.eviction().is_some_and(Eviction::wants_attention)
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

    /// All heads, row by row.
    pub(super) fn heads(&self) -> impl Iterator<Item = &KvHead> {
        self.rows.iter().flat_map(|row| row.iter())
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
        self.methods.all_codecs().try_for_each(|codecs| {
            k.check_magnitude("keys", codecs.keys.limit())?;
            v.check_magnitude("values", codecs.values.limit())
        })
    }

    /// Checks that keys and values of such dims can be stored, of `heads` KV heads if it is known how many there are.
    ///
    /// # Errors
    /// Those of the codecs.
    pub fn check_dims(&self, heads: Option<usize>, key_dim: usize, value_dim: usize) -> Result<()> {
        self.methods.all_codecs().try_for_each(|codecs| codecs.check(heads, key_dim, value_dim))
    }

    pub(super) fn shape_of(&self, k: &View<'_>, v: &View<'_>) -> Result<Shape> {
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
        if let Some(prune) = &self.methods.prune {
            prune.check(heads)?;
        }
        self.check_dims(Some(heads), key_dim, value_dim)?;
        Ok(Shape { dtype: k.dtype(), heads, key_dim, value_dim })
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
