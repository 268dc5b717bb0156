//! The cache of a model: all its layers, and the forward that is under way.
//!
//! A forward is a transaction. It begins with the first layer that is given tokens and ends with the attention of the last
//! one; whatever fails in between takes every layer back to what it was before. One that never ended, as its thread was
//! interrupted between two layers, is rolled back when the next one begins. Who only looks sees what was there before.

use std::any::Any;
use std::sync::Arc;

use super::Layer;
use super::append::New;
use super::forward::Forward;
use super::layer::expect;
use super::packed::{Packed, State};
use super::recording::Recording;
use crate::error::{self, Error, Result};
use crate::share::Share;
use crate::tensor::View;

/// Something of the caller's that is handed back when a forward is rolled back.
pub type Foreign = Arc<dyn Any + Send + Sync>;

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Keys.
    Keys,
    /// Values.
    Values,
}

/// Attention calls by path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Over the model's own tensors, while the cache was empty.
    pub prefill: usize,
    /// On the packed form.
    pub fused: usize,
    /// Keys that were dequantised for other attention than ours.
    pub materialised: usize,
}

/// What a layer answers to new tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// Names this state of the layer: what is read later must be of the same.
    pub version: u64,
    /// Whether these are its first tokens.
    pub first: bool,
    /// Tokens that attention reads: all that were seen, or where tokens were let go under the model's own attention those that
    /// are held.
    pub tokens: usize,
}

/// All layers of a model; some may be held elsewhere, and only take part in forwards.
pub struct Cache {
    pub(super) layers: Vec<Option<Box<Packed>>>,
    /// The layers that hold the tokens of each, where some share theirs.
    pub(super) sources: Vec<usize>,
    pub(super) forward: Option<Forward>,
    pub(super) recording: Option<Recording>,
    /// The last layer that forwards come to.
    pub(super) last: usize,
    /// Whether attention reads it.
    pub(super) last_is_read: bool,
    /// The last version given to a layer.
    pub(super) version: u64,
    pub(super) undone: Vec<Foreign>,
    /// The layer that a forward came to which was begun and never ended, and so rolled back.
    pub(super) abandoned: Option<usize>,
}

impl Cache {
    /// Empty layers, each with whether other layers read it; `None` are held elsewhere. `last` is the last one that forwards come
    /// to, and `last_is_read` whether attention reads that one.
    pub fn new(layers: Vec<Option<(Layer, bool)>>, last: usize, last_is_read: bool) -> Self {
        let layers = layers.into_iter().map(|layer| layer.map(|(layer, shared)| Box::new(Packed::new(layer, shared))));
        Self {
            layers: layers.collect(),
            sources: Vec::new(),
            forward: None,
            recording: None,
            last,
            last_is_read,
            version: 0,
            undone: Vec::new(),
            abandoned: None,
        }
    }

    /// The cache, some of whose layers read what others hold; those hold nothing themselves.
    #[must_use]
    pub fn with_share(self, share: &dyn Share) -> Self {
        let sources: Vec<usize> = (0..self.layers.len()).map(|i| share.source(i)).collect();
        let own = self.layers.into_iter().enumerate().map(|(i, layer)| layer.filter(|_| sources[i] == i));
        Self { layers: own.collect(), sources, ..self }
    }

    /// The layer that holds the tokens of layer `i`.
    pub(super) fn source(&self, i: usize) -> usize {
        self.sources.get(i).copied().unwrap_or(i)
    }

    /// How many layers there are.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    // ---- changes of batch and length: all layers or none -----------------------------------------------------------

    /// Changes all packed layers that hold something, or none: where `change` fails, the layers are those of before.
    fn change_all(&mut self, mut change: impl FnMut(&mut Packed) -> Result<()>) -> Result<()> {
        let changed: Result<Vec<_>> = error::caught(|| {
            let packed = self.layers.iter().map(|packed| {
                let mut packed = packed.clone();
                if let Some(packed) = packed.as_mut().filter(|packed| packed.seen() > 0) {
                    change(packed)?;
                }
                Ok(packed)
            });
            packed.collect()
        });
        self.layers = changed?;
        let versions = self.version + 1..;
        for (packed, version) in self.layers.iter_mut().flatten().zip(versions) {
            packed.version = version;
            self.version = version;
        }
        Ok(())
    }

    /// Removes the `n` newest positions of all layers; without `lossy` only those that are held exactly, unless past recording
    /// is on. That also packs what waited for it.
    ///
    /// # Errors
    /// [`Error::Crop`] or [`Error::Busy`]; nothing has changed then.
    pub fn crop(&mut self, n: usize, lossy: bool) -> Result<()> {
        self.settle_forward()?;
        let recording = self.recording.is_some();
        let exactly = !(lossy || recording);
        for packed in self.layers.iter().flatten().filter(|packed| packed.seen() > 0) {
            packed.check_crop(n, !exactly)?;
        }
        if n == 0 && !recording {
            return Ok(());
        }
        self.change_all(|packed| packed.crop(n, !exactly, recording))?;
        if let Some(recording) = &mut self.recording {
            *recording = Recording::cropped();
        }
        Ok(())
    }

    /// Raises what [`Self::crop`] would raise.
    ///
    /// # Errors
    /// As that.
    pub fn check_crop(&self, n: usize, lossy: bool) -> Result<()> {
        let lossy = lossy || self.recording.is_some();
        self.shown().flatten().filter(|packed| packed.seen() > 0).try_for_each(|packed| packed.check_crop(n, lossy))
    }

    /// Makes the batch of all layers out of the rows at `indices`, which may repeat; rows are shared, not copied.
    ///
    /// # Errors
    /// [`Error::Shape`] for an index that is not below the batch size, or [`Error::Busy`]; nothing has changed then.
    pub fn select(&mut self, indices: &[usize]) -> Result<()> {
        self.settle_forward()?;
        let recording = self.recording.is_some();
        self.change_all(|packed| {
            packed.commit_unread(recording)?;
            packed.state.attention = None;
            packed.layer.select(indices)
        })
    }

    /// Forgets all tokens, and ends past recording.
    ///
    /// # Errors
    /// [`Error::Busy`] in the middle of another thread's forward.
    pub fn reset(&mut self) -> Result<()> {
        self.settle_forward()?;
        self.recording = None;
        for i in 0..self.layers.len() {
            self.reset_layer(i);
        }
        Ok(())
    }

    fn reset_layer(&mut self, i: usize) {
        let version = self.next_version();
        if let Some(packed) = &mut self.layers[i] {
            packed.layer.reset();
            let counts = packed.state.counts;
            (packed.state, packed.version) = (State { counts, ..State::default() }, version);
        }
    }

    /// From now on packing waits for [`Self::crop`], which then reaches any token; until nobody crops any more.
    pub fn record(&mut self) {
        self.recording = Some(Recording::default());
    }

    /// Whether packing waits for that.
    pub fn records(&self) -> bool {
        self.recording.is_some()
    }

    /// Stores tokens of another cache in layer `i`, which is empty; `valid` as in [`Self::commit`]. Before them were `missing` positions,
    /// which the layer's window has passed.
    ///
    /// # Errors
    /// What does not fit; the layer is empty then.
    pub fn load(&mut self, i: usize, k: &View<'_>, v: &View<'_>, valid: Option<&[bool]>, missing: usize) -> Result<()> {
        self.settle_forward()?;
        let packed = self.packed_mut(i)?;
        expect("layer: tokens before another cache's are packed", packed.seen(), 0)?;
        let (k, v) = (&k.reborrow(), &v.reborrow());
        packed.layer.check(k, v)?;
        packed.layer.begin_at(missing);
        let loaded = error::caught(|| packed.layer.append(&New { k, v, valid, queries: None, flush: true }));
        if loaded.is_err() {
            self.reset_layer(i);
        }
        loaded
    }

    /// Whether what the newest query attends to in layer `i` is remembered from now on.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is no such layer.
    pub fn watch(&mut self, i: usize, watched: bool) -> Result<()> {
        let packed = self.packed_mut(i)?;
        packed.state.watched = watched;
        packed.state.attention = packed.state.attention.take().filter(|_| watched);
        Ok(())
    }

    /// Takes layer 0 of another cache in as the last one, or one that is held elsewhere.
    pub fn adopt(&mut self, other: Option<&Self>) {
        self.last = self.layers.len();
        self.layers.push(other.and_then(|other| other.layers.first().cloned().flatten()));
    }

    // ---- for the other files of this room --------------------------------------------------------------------------

    pub(super) fn next_version(&mut self) -> u64 {
        self.version += 1;
        self.version
    }

    /// Raises [`Error::Stale`] when layer `i` has changed since it had that version.
    ///
    /// # Errors
    /// That, or [`Error::Shape`] when it is not packed.
    pub fn check_version(&self, i: usize, version: u64) -> Result<()> {
        let expected = self.packed(i)?.version;
        if version == expected { Ok(()) } else { Err(Error::Stale { given: version, expected }) }
    }

    pub(super) fn packed(&self, i: usize) -> Result<&Packed> {
        self.layers.get(self.source(i)).and_then(Option::as_deref).ok_or_else(|| self.no_layer(i))
    }

    pub(super) fn packed_mut(&mut self, i: usize) -> Result<&mut Packed> {
        let i = self.source(i);
        if self.layers.get(i).is_none_or(Option::is_none) {
            return Err(self.no_layer(i));
        }
        Ok(self.layers[i].as_deref_mut().expect("it is packed"))
    }
}
