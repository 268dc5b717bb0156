//! The cache of a model: all its layers, and the forward that is under way.
//!
//! A forward is a transaction. It begins with the first layer that is given tokens and ends with the attention of the last
//! one; whatever fails in between takes every layer back to what it was before. One that never ended, as its thread was
//! interrupted between two layers, is taken back when the next one begins. Who only looks sees what was there before.

use std::any::Any;
use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;
use std::thread::{self, ThreadId};

use super::layer::{Layer, New, Readers, expect};
use super::memory::Memory;
use super::read::Request;
use super::snapshot::Snapshot;
use crate::attend::kernels::Kernels;
use crate::error::{self, Error, Result};
use crate::tensor::{Dtype, Kept, View, ViewMut};

/// Something of the caller's that is handed back when a forward is rolled back.
pub type Foreign = Arc<dyn Any + Send + Sync>;

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
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

/// What layers are given that is no state: tokens.
const TOKENS: u8 = 0;

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

/// A forward's tokens of a layer, which nothing has stored yet.
#[derive(Clone)]
struct Pending {
    k: Kept,
    v: Kept,
}

impl Pending {
    fn tokens(&self) -> usize {
        self.k.view().shape()[2]
    }
}

/// A layer that is packed.
#[derive(Clone)]
#[allow(clippy::struct_excessive_bools)] // each is a fact of its own
struct Packed {
    layer: Layer,
    pending: Option<Pending>,
    /// Whether the model's own attention reads it: its tokens were stored without ours having been called.
    outside: bool,
    /// Whether other layers read it too, so that packing waits until the forward is over.
    shared: bool,
    /// Whether what the newest query attends to is wanted.
    watched: bool,
    /// What that was, `[B, seen]`.
    attention: Option<Vec<f32>>,
    /// Whether our attention read it in the last forward.
    attended: bool,
    version: u64,
    counts: Counts,
}

/// What a packed layer was like before a forward.
struct Before {
    snapshot: Snapshot,
    pending: Option<Pending>,
    outside: bool,
    watched: bool,
    attention: Option<Vec<f32>>,
    attended: bool,
    counts: Counts,
}

enum Saved {
    Packed(Box<Before>),
    Other(Foreign),
}

#[allow(clippy::struct_excessive_bools)] // each is a fact of its own
struct Forward {
    thread: ThreadId,
    /// Which layers were given what, in their order: tokens, or states of their own kind.
    given: Vec<(usize, u8)>,
    last: usize,
    /// Whether all is done, and only [`Cache::finish`] is missing.
    ended: bool,
    /// Whether it cannot be undone any more.
    finished: bool,
    /// Whether our attention has read one of its layers.
    attended: bool,
    /// Whether it is one of a whole model, of which is known that it goes on to the last layer.
    of_module: bool,
    saved: Vec<(usize, Saved)>,
}

/// Assisted decoding, which rolls the newest tokens back after each forward: packing waits for that.
#[derive(Clone, Copy, Debug, Default)]
struct Recording {
    cropped: bool,
    /// Forwards since then.
    uncropped: usize,
}

/// Forwards without a crop, after some with, until recording is over.
const PATIENCE: usize = 16;

impl Recording {
    /// Whether nobody crops any more.
    fn is_over(self) -> bool {
        self.cropped && self.uncropped >= PATIENCE
    }
}

/// All layers of a model; some may be held elsewhere, and only take part in forwards.
pub struct Cache {
    layers: Vec<Option<Box<Packed>>>,
    forward: Option<Forward>,
    recording: Option<Recording>,
    /// The last layer that forwards come to.
    last: usize,
    /// Whether attention reads it.
    last_is_read: bool,
    /// The last version given to a layer.
    version: u64,
    undone: Vec<Foreign>,
}

impl Cache {
    /// Empty layers, each with whether other layers read it; `None` are held elsewhere. `last` is the last one that forwards come
    /// to, and `last_is_read` whether attention reads that one.
    pub fn new(layers: Vec<Option<(Layer, bool)>>, last: usize, last_is_read: bool) -> Self {
        let layers = layers.into_iter().map(|layer| layer.map(|(layer, shared)| Box::new(Packed::new(layer, shared))));
        Self {
            layers: layers.collect(),
            forward: None,
            recording: None,
            last,
            last_is_read,
            version: 0,
            undone: Vec::new(),
        }
    }

    /// How many layers there are.
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    // ---- a forward -------------------------------------------------------------------------------------------------

    /// Takes a forward's keys `[B, H, n, Dk]` and values `[B, H, n, Dv]` of layer `i`. They wait until attention has read them:
    /// only then is it known which are pads.
    ///
    /// # Errors
    /// [`Error::Busy`] in the middle of another thread's forward; else what does not fit, and the forward is rolled back.
    pub fn update(&mut self, i: usize, k: Kept, v: Kept) -> Result<Given> {
        let tokens = k.view().shape()[2];
        self.begin(i, TOKENS)?;
        self.step(|cache| {
            let recording = cache.recording.is_some();
            cache.save(i, tokens)?;
            let version = cache.next_version();
            let packed = cache.packed_mut(i)?;
            packed.flush(recording)?;
            packed.layer.check(&k.view(), &v.view())?;
            let first = packed.layer.seen() == 0;
            let gone = packed.gone();
            packed.pending = Some(Pending { k, v });
            packed.version = version;
            let given = Given { version, first, tokens: packed.seen() - gone };
            cache.tokens_came();
            Ok(given)
        })
    }

    /// Says that layer `i`, which is held elsewhere, is about to be given tokens, or states of a `kind` of their own. Returns whether what brings it back is still to be
    /// [kept](Self::keep).
    ///
    /// # Errors
    /// [`Error::Busy`] in the middle of another thread's forward.
    pub fn enter(&mut self, i: usize, kind: u8) -> Result<bool> {
        self.begin(i, kind)?;
        self.tokens_came();
        let unknown = |forward: &Forward| !forward.finished && forward.saved.iter().all(|&(saved, _)| saved != i);
        Ok(self.forward.as_ref().is_some_and(unknown))
    }

    /// Keeps what brings layer `i` back, which is held elsewhere, if this thread's forward is rolled back.
    pub fn keep(&mut self, i: usize, before: Foreign) {
        if let Some(forward) =
            self.forward.as_mut().filter(|forward| forward.thread == thread::current().id() && !forward.finished)
        {
            forward.saved.push((i, Saved::Other(before)));
        }
    }

    /// What was [kept](Self::keep) of layer `i` by the forward that is under way.
    pub fn kept(&self, i: usize) -> Option<Foreign> {
        let forward = self.hidden()?;
        forward.saved.iter().find_map(|(saved, before)| match before {
            Saved::Other(before) if *saved == i => Some(Arc::clone(before)),
            _ => None,
        })
    }

    /// Says that the forward is one of a whole model: until it has ended, who looks sees what was there before, and if another
    /// one begins before that it is rolled back. Of layers that are given tokens by hand nobody knows where that ends.
    pub fn is_of_module(&mut self) {
        if let Some(forward) = self.forward.as_mut().filter(|forward| forward.thread == thread::current().id()) {
            forward.of_module = true;
        }
    }

    /// Whether a forward has begun and not ended.
    pub fn is_under_way(&self) -> bool {
        self.forward.as_ref().is_some_and(|forward| !forward.ended)
    }

    /// Says that attention has read layer `i`, which is held elsewhere. Returns whether the forward is over.
    pub fn attended(&mut self, i: usize) -> bool {
        self.attention_ends(i)
    }

    /// Stores layer `i`'s first tokens, after the attention of `readers` over the model's own tensors; `valid` `[B, n]` says
    /// which are no pads. Returns whether the forward is over.
    ///
    /// # Errors
    /// [`Error::Stale`] when the layer was changed since; else what does not fit, and the forward is rolled back.
    pub fn commit(
        &mut self,
        i: usize,
        version: u64,
        valid: Option<&[bool]>,
        readers: Readers<'_>,
        kernels: &'static Kernels,
    ) -> Result<bool> {
        self.check_version(i, version)?;
        self.step(|cache| {
            let recording = cache.recording.is_some();
            let packed = cache.packed_mut(i)?;
            packed.check_center(&readers)?;
            packed.counts.prefill += 1;
            packed.outside = false;
            packed.store(valid, Some(readers), recording)?;
            packed.watch(&readers, kernels)?;
            Ok(cache.attention_ends(i))
        })
    }

    /// Stores what layer `i` was given last, then writes the attention of the newest positions' queries to `out`. Returns
    /// whether the forward is over.
    ///
    /// # Errors
    /// As [`Self::commit`].
    pub fn attend(
        &mut self,
        i: usize,
        version: u64,
        valid: Option<&[bool]>,
        request: &Request<'_>,
        out: &mut ViewMut<'_>,
        kernels: &'static Kernels,
    ) -> Result<bool> {
        self.check_version(i, version)?;
        self.step(|cache| {
            let recording = cache.recording.is_some();
            let packed = cache.packed_mut(i)?;
            let Request { query, softmax, sinks, .. } = *request;
            let readers = Readers { query: &query, softmax, sinks };
            packed.check_center(&readers)?;
            packed.store(valid, Some(readers), recording)?;
            let new = query.shape()[2];
            let received = new == 1 && packed.layer.wants_attention();
            let attention = packed.layer.attend(&Request { received, ..*request }, out, kernels)?;
            if !attention.is_empty() {
                packed.layer.receive(&attention, kernels);
            }
            packed.counts.fused += 1;
            packed.watch(&readers, kernels)?;
            if new > packed.layer.codec().window() && !recording && !packed.shared {
                packed.layer.settle(); // a long chunk would otherwise be held exactly in all layers at once
            }
            Ok(cache.attention_ends(i))
        })
    }

    /// Undoes this thread's forward, if there is one that is not [finished](Self::finish).
    pub fn roll_back(&mut self) {
        let mine = |forward: &mut Forward| forward.thread == thread::current().id() && !forward.finished;
        let Some(forward) = self.forward.take_if(mine) else { return };
        for (i, saved) in forward.saved.into_iter().rev() {
            let version = self.next_version();
            match (saved, &mut self.layers[i]) {
                (Saved::Packed(before), Some(packed)) => {
                    packed.restore(&before);
                    packed.version = version;
                }
                (Saved::Other(before), _) => self.undone.push(before),
                (Saved::Packed(_), None) => {}
            }
        }
    }

    /// Undoes the forward of whatever thread, which the caller knows to be over without having come to its end.
    pub fn abandon(&mut self) {
        if let Some(forward) = self.forward.as_mut().filter(|forward| !forward.ended) {
            forward.thread = thread::current().id();
            self.roll_back();
        }
    }

    /// What the caller gave to bring layers back that are held elsewhere, of forwards that were rolled back since the last call.
    pub fn take_undone(&mut self) -> Vec<Foreign> {
        std::mem::take(&mut self.undone)
    }

    /// After a forward that is over: from now on it cannot be undone.
    pub fn finish(&mut self) {
        let Some(forward) = self.forward.as_mut().filter(|forward| forward.ended && !forward.finished) else { return };
        forward.finished = true;
        for (i, saved) in forward.saved.drain(..) {
            if let (Saved::Packed(before), Some(packed)) = (saved, &mut self.layers[i]) {
                packed.layer.release(&before.snapshot);
            }
        }
        if let Some(recording) = &mut self.recording {
            recording.uncropped += 1;
        }
    }

    /// Goes on with the forward that is under way, or begins one: layer `i` is given something of that kind.
    fn begin(&mut self, i: usize, kind: u8) -> Result<()> {
        let now = (i, kind);
        if let Some(forward) = &mut self.forward {
            let mine = forward.thread == thread::current().id();
            if !mine && !forward.ended {
                return Err(Error::Busy);
            }
            // What the first layer is given again begins the next one. After the attention of the last layer there may be states
            // of it to come.
            let again = forward.given.contains(&now);
            let goes_on = if forward.ended { i >= forward.last && !again } else { forward.given.first() != Some(&now) };
            if mine && goes_on {
                forward.last = forward.last.max(i);
                if !again {
                    forward.given.push(now);
                }
                return Ok(());
            }
        }
        self.settle_forward()?;
        if self.recording.is_some_and(Recording::is_over) {
            self.recording = None;
        }
        self.forward = Some(Forward {
            thread: thread::current().id(),
            given: vec![now],
            last: i,
            ended: false,
            finished: false,
            attended: false,
            of_module: false,
            saved: Vec::new(),
        });
        Ok(())
    }

    /// Remembers what layer `i` is like, once a forward.
    fn save(&mut self, i: usize, tokens: usize) -> Result<()> {
        let known = |forward: &Forward| forward.finished || forward.saved.iter().any(|&(saved, _)| saved == i);
        if self.forward.as_ref().is_some_and(known) {
            return Ok(());
        }
        let before = Box::new(self.packed_mut(i)?.before(tokens));
        if let Some(forward) = &mut self.forward {
            forward.saved.push((i, Saved::Packed(before)));
        }
        Ok(())
    }

    /// Our attention has read layer `i`; says whether the forward is over.
    fn attention_ends(&mut self, i: usize) -> bool {
        if let Some(packed) = &mut self.layers[i] {
            packed.attended = true;
        }
        let last = self.last;
        self.forward.as_mut().is_some_and(|forward| {
            forward.attended = true;
            forward.ended |= i >= last;
            forward.ended
        })
    }

    /// Where attention that is not ours reads the last layer, nobody says when it has: a forward is over with its tokens.
    fn tokens_came(&mut self) {
        if let Some(forward) = &self.forward
            && self.is_over(forward)
        {
            self.end();
        }
    }

    /// Whether a forward has come to its last layer, which as far as is known other attention than ours reads.
    fn is_over(&self, forward: &Forward) -> bool {
        let ours = forward.attended || self.layers[forward.last].as_ref().is_some_and(|packed| packed.attended);
        forward.last >= self.last && !(ours && self.last_is_read)
    }

    fn end(&mut self) {
        if let Some(forward) = &mut self.forward {
            forward.ended = true;
        }
    }

    /// Runs `f`; if it fails or panics, the forward is rolled back.
    fn step<R>(&mut self, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        let result = error::caught(|| f(self));
        if result.is_err() {
            self.roll_back();
        }
        result
    }

    // ---- changes of batch and length: all layers or none -----------------------------------------------------------

    /// Ends the forward before another change.
    ///
    /// # Errors
    /// [`Error::Busy`] in the middle of another thread's forward.
    pub fn settle_forward(&mut self) -> Result<()> {
        if let Some(forward) = self.forward.as_ref().filter(|forward| !forward.ended) {
            if forward.thread != thread::current().id() {
                return Err(Error::Busy);
            }
            if forward.of_module && !self.is_over(forward) {
                self.roll_back(); // begun, and never ended
            } else {
                self.end();
            }
        }
        self.finish();
        Ok(())
    }

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
            *recording = Recording { cropped: true, ..Recording::default() };
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
            packed.absorb(recording)?;
            packed.attention = None;
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
            let counts = packed.counts;
            **packed = Packed { version, counts, ..Packed::new(packed.layer.clone(), packed.shared) };
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

    /// Stores tokens of another cache in layer `i`, which is empty; `valid` as in [`Self::commit`].
    ///
    /// # Errors
    /// What does not fit; the layer is empty then.
    pub fn load(&mut self, i: usize, k: &View<'_>, v: &View<'_>, valid: Option<&[bool]>) -> Result<()> {
        self.settle_forward()?;
        let loaded = error::caught(|| {
            let packed = self.packed_mut(i)?;
            expect("layer: tokens before another cache's are packed", packed.seen(), 0)?;
            packed.layer.check(k, v)?;
            packed.layer.append(&New { k, v, valid, readers: None, settle: true })
        });
        if loaded.is_err() && self.layers.get(i).is_some_and(Option::is_some) {
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
        packed.watched = watched;
        packed.attention = packed.attention.take().filter(|_| watched);
        Ok(())
    }

    /// Takes layer 0 of another cache in as the last one, or one that is held elsewhere.
    pub fn adopt(&mut self, other: Option<&Self>) {
        self.last = self.layers.len();
        self.layers.push(other.and_then(|other| other.layers.first().cloned().flatten()));
    }

    // ---- looking: nothing changes ----------------------------------------------------------------------------------

    /// The layers as they were before the forward that is under way.
    fn shown(&self) -> impl Iterator<Item = Option<Cow<'_, Packed>>> {
        (0..self.layers.len()).map(|i| self.shown_at(i))
    }

    fn shown_at(&self, i: usize) -> Option<Cow<'_, Packed>> {
        let packed = self.layers.get(i)?.as_deref()?;
        let before = self.saved(i);
        Some(before.map_or(Cow::Borrowed(packed), |before| {
            let mut then = packed.clone();
            then.restore(before);
            Cow::Owned(then)
        }))
    }

    /// The forward of a whole model that is under way.
    fn hidden(&self) -> Option<&Forward> {
        self.forward.as_ref().filter(|forward| forward.of_module && !forward.ended)
    }

    /// What layer `i` was like, if it is in the midst of a forward.
    fn saved(&self, i: usize) -> Option<&Before> {
        let forward = self.hidden()?;
        match forward.saved.iter().find(|(saved, _)| *saved == i) {
            Some((_, Saved::Packed(before))) => Some(before),
            _ => None,
        }
    }

    /// A layer that is packed, as it was before the forward under way.
    fn look(&self, i: usize) -> Result<Cow<'_, Packed>> {
        self.shown_at(i).ok_or_else(|| self.no_layer(i))
    }

    fn no_layer(&self, i: usize) -> Error {
        let packed: Vec<_> = (0..self.layers.len()).filter(|&i| self.layers[i].is_some()).collect();
        Error::Shape { what: "layer", given: i.to_string(), expected: format!("one of the packed layers {packed:?}") }
    }

    /// The stored tokens of layer `i`, those apart that wait.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn layer(&self, i: usize) -> Result<Cow<'_, Layer>> {
        Ok(match self.look(i)? {
            Cow::Borrowed(packed) => Cow::Borrowed(&packed.layer),
            Cow::Owned(packed) => Cow::Owned(packed.layer),
        })
    }

    /// Another cache with the same tokens; pages are shared until one of the two changes them.
    #[must_use]
    pub fn fork(&self) -> Self {
        let layers = self.shown().map(|packed| packed.map(|packed| Box::new(packed.into_owned()))).collect();
        Self { layers, last: self.last, ..self.bare() }
    }

    /// What a copy of this has in common with it, but for layers.
    fn bare(&self) -> Self {
        Self {
            layers: Vec::new(),
            forward: None,
            recording: self.recording,
            last: 0,
            last_is_read: self.last_is_read,
            version: self.version,
            undone: Vec::new(),
        }
    }

    /// A cache of layer `i` alone, as [`Self::fork`] makes them.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn fork_layer(&self, i: usize) -> Result<Self> {
        let layers = vec![Some(Box::new(self.look(i)?.into_owned()))];
        Ok(Self { layers, ..self.bare() })
    }

    /// Positions that layer `i` has seen, pads included.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn seen(&self, i: usize) -> Result<usize> {
        let packed = self.layers.get(i).and_then(Option::as_deref).ok_or_else(|| self.no_layer(i))?;
        Ok(self.saved(i).map_or_else(|| packed.seen(), Before::seen))
    }

    /// Names the state of all layers that are packed.
    pub fn changes(&self) -> u64 {
        self.version
    }

    /// Names the state of layer `i`.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn version(&self, i: usize) -> Result<u64> {
        Ok(self.packed(i)?.version)
    }

    /// Batch, KV heads, key dim, value dim and dtype of layer `i`, once there are tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn shape(&self, i: usize) -> Result<Option<([usize; 4], Dtype)>> {
        Ok(self.look(i)?.shape())
    }

    /// Of positions that layer `i` has seen, how many the model's own attention will miss at the next forward: none, but where
    /// that attention reads what is held of tokens that were let go.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed; [`Error::Option`] when tokens cannot be let go so.
    pub fn gone(&self, i: usize) -> Result<usize> {
        let packed = self.look(i)?;
        let ours = packed.layer.seen() > 0 && !packed.outside;
        if packed.layer.eviction().is_none() || packed.seen() == 0 || ours {
            return Ok(0);
        }
        // What is due goes before the next forward's own tokens come: here in a copy.
        let mut then = packed.into_owned();
        then.flush(self.recording.is_some())?;
        Ok(then.gone())
    }

    /// Bytes allocated for layer `i`, without those of tokens that wait to be stored.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn memory(&self, i: usize, tables: &mut HashSet<usize>) -> Result<Memory> {
        let packed = self.packed(i)?;
        let before = self.saved(i);
        let mut memory =
            before.map_or_else(|| packed.layer.memory(), |before| packed.layer.memory_then(&before.snapshot));
        if before.map_or_else(|| packed.layer.seen(), |before| before.snapshot.seen()) > 0 {
            let (own, shared) = packed.layer.codec().tables();
            memory.scales += own;
            memory.index += shared.filter(|&(table, _)| tables.insert(table)).map_or(0, |(_, bytes)| bytes);
        }
        Ok(memory)
    }

    /// Who keeps the memory of layer `i`'s tokens that wait to be stored.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn owners(&self, i: usize) -> Result<Vec<Foreign>> {
        let before = self.saved(i).and_then(|before| before.pending.as_ref());
        let pending = [self.packed(i)?.pending.as_ref(), before];
        Ok(pending.into_iter().flatten().flat_map(|Pending { k, v }| [k, v]).map(|x| Arc::clone(x.owner())).collect())
    }

    /// The share of the numbers of layer `i`, those of the `new` newest positions aside, that are not what the model made, or
    /// gone.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn lossy_share(&self, i: usize, new: usize) -> Result<f64> {
        let packed = self.look(i)?;
        let waiting = packed.waiting();
        let (lossy, held) = packed.layer.lossy(new.saturating_sub(waiting));
        let numbers =
            packed.shape().map_or(0, |([batch, heads, key_dim, value_dim], _)| batch * heads * (key_dim + value_dim));
        let all = held + waiting.saturating_sub(new) * numbers;
        Ok(if all == 0 { 0.0 } else { lossy as f64 / all as f64 })
    }

    /// Positions that a KV head of a sequence holds in layer `i`.
    ///
    /// # Errors
    /// [`Error::Shape`] when there is none of that number.
    pub fn positions(&self, i: usize, row: usize, head: usize) -> Result<Vec<u32>> {
        let packed = self.look(i)?;
        let mut positions = Vec::new();
        let waiting = packed.pending.as_ref().filter(|pending| {
            let [batch, heads, ..] = pending.k.view().shape();
            row < batch && head < heads
        });
        if packed.layer.seen() > 0 || waiting.is_none() {
            let held = packed.layer.head(row, head)?.positions();
            held.collect_into(0, held.len(), &mut positions);
        }
        let first = packed.layer.seen() as u32;
        positions.extend(first..first + waiting.map_or(0, Pending::tokens) as u32);
        Ok(positions)
    }

    /// Attention calls of layer `i`.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn counts(&self, i: usize) -> Result<Counts> {
        Ok(self.packed(i)?.counts)
    }

    /// What the newest query attended to in layer `i`, `[B, seen]`, the mean over its heads, if that was watched.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn attention(&self, i: usize) -> Result<Option<&[f32]>> {
        Ok(self.packed(i)?.attention.as_deref())
    }

    /// Sizes `[B, H, n, D]` of what [`Self::write`] writes of layer `i`: of `compact` the tokens that are held, else all positions.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed or empty; [`Error::Option`] when heads hold different numbers of tokens, or none
    /// could know that tokens would go.
    pub fn extent(&self, i: usize, side: Side, compact: bool) -> Result<([usize; 4], Dtype)> {
        let packed = self.packed(i)?;
        let ([batch, heads, key_dim, value_dim], dtype) = packed.shape().ok_or_else(|| Error::Shape {
            what: "cache",
            given: "no tokens".into(),
            expected: "at least one token".into(),
        })?;
        let tokens = if compact { packed.held_by_all()? } else { packed.seen() };
        Ok(([batch, heads, tokens, if side == Side::Keys { key_dim } else { value_dim }], dtype))
    }

    /// Writes the keys or values of layer `i`, dequantised, to `out`, which is 0 before, each at its position or, where it is
    /// `compact`, in the order of those that are held. What waits to be stored is last.
    ///
    /// # Errors
    /// As [`Self::extent`], which `out` must have.
    pub fn write(
        &self,
        i: usize,
        side: Side,
        compact: bool,
        mut out: ViewMut<'_>,
        kernels: &'static Kernels,
    ) -> Result<()> {
        let (expected, _) = self.extent(i, side, compact)?;
        if out.shape() != expected {
            let given = format!("{:?}", out.shape());
            return Err(Error::Shape { what: "out", given, expected: format!("{expected:?}") });
        }
        let packed = self.packed(i)?;
        if let Some(pending) = &packed.pending {
            let new = if side == Side::Keys { pending.k.view() } else { pending.v.view() };
            let ([batch, heads, n, dim], first) = (new.shape(), expected[2] - pending.tokens());
            let mut row = vec![0.0; dim];
            for (b, h, t) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..n).map(move |t| (b, h, t)))) {
                new.row(b, h, t).to_f32(&mut row);
                out.write_row([b, h, first + t], &row);
            }
        }
        packed.layer.write(side, compact, out, kernels);
        Ok(())
    }

    /// Counts that layer `i` was dequantised for other attention than ours.
    pub fn materialised(&mut self, i: usize) {
        if let Some(packed) = self.layers.get_mut(i).and_then(Option::as_mut) {
            packed.counts.materialised += 1;
        }
    }

    // ---- small -----------------------------------------------------------------------------------------------------

    fn next_version(&mut self) -> u64 {
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

    fn packed(&self, i: usize) -> Result<&Packed> {
        self.layers.get(i).and_then(Option::as_deref).ok_or_else(|| self.no_layer(i))
    }

    fn packed_mut(&mut self, i: usize) -> Result<&mut Packed> {
        if self.layers.get(i).is_none_or(Option::is_none) {
            return Err(self.no_layer(i));
        }
        self.layers[i].as_deref_mut().ok_or(Error::Busy)
    }
}

impl Before {
    fn seen(&self) -> usize {
        self.snapshot.seen() + self.pending.as_ref().map_or(0, Pending::tokens)
    }
}

impl Packed {
    fn new(layer: Layer, shared: bool) -> Self {
        Self {
            layer,
            pending: None,
            outside: false,
            shared,
            watched: false,
            attention: None,
            attended: false,
            version: 0,
            counts: Counts::default(),
        }
    }

    /// What it is like, before a forward of so many tokens.
    fn before(&mut self, tokens: usize) -> Before {
        // Tokens that other attention has read may make an eviction due: then nothing is known of how much changes.
        let unsure = self.pending.is_some() && self.layer.eviction().is_some();
        Before {
            snapshot: self.layer.snapshot(if unsure { usize::MAX } else { tokens + self.waiting() }),
            pending: self.pending.clone(),
            outside: self.outside,
            watched: self.watched,
            attention: self.attention.clone(),
            attended: self.attended,
            counts: self.counts,
        }
    }

    fn restore(&mut self, before: &Before) {
        self.layer.restore(&before.snapshot);
        self.pending.clone_from(&before.pending);
        self.attention.clone_from(&before.attention);
        (self.outside, self.watched, self.attended, self.counts) =
            (before.outside, before.watched, before.attended, before.counts);
    }

    fn waiting(&self) -> usize {
        self.pending.as_ref().map_or(0, Pending::tokens)
    }

    fn seen(&self) -> usize {
        self.layer.seen() + self.waiting()
    }

    fn shape(&self) -> Option<([usize; 4], Dtype)> {
        if let Some(shape) = self.layer.shape() {
            return Some(([self.layer.batch(), shape.heads, shape.key_dim, shape.value_dim], shape.dtype));
        }
        let Pending { k, v } = self.pending.as_ref()?;
        let [batch, heads, _, key_dim] = k.view().shape();
        Some(([batch, heads, key_dim, v.view().shape()[3]], k.view().dtype()))
    }

    /// Stores what waits, which was read by other attention than ours.
    fn absorb(&mut self, recording: bool) -> Result<()> {
        if let Some(pending) = &self.pending {
            if self.layer.seen() == 0 {
                self.check_outside(&pending.k.view())?;
                self.outside = true; // our attention would have taken them by now
            }
            self.store(None, None, recording)?;
        }
        Ok(())
    }

    /// Stores what waits, and packs and lets go what is due of it: the newest tokens of a forward wait until the next one
    /// comes, so that until then they can be cropped.
    fn flush(&mut self, recording: bool) -> Result<()> {
        self.absorb(recording)?;
        if !recording {
            self.layer.settle();
        }
        Ok(())
    }

    /// Stores what waits. A first prompt is packed at once.
    fn store(&mut self, valid: Option<&[bool]>, readers: Option<Readers<'_>>, recording: bool) -> Result<()> {
        let Some(Pending { k, v }) = self.pending.take() else { return Ok(()) };
        let (k, v) = (&k.view(), &v.view());
        let settle = !recording && self.layer.seen() == 0;
        let readers = readers.filter(|_| self.layer.wants_queries());
        self.layer.append(&New { k, v, valid, readers, settle })
    }

    /// Refuses first tokens of which some are to go, where other attention than ours reads them.
    fn check_outside(&self, keys: &View<'_>) -> Result<()> {
        const OURS: &str = "a model that was loaded with attn_implementation='kvpack'";
        if self.layer.selects() {
            return Err(Error::Option {
                name: "select",
                given: "Quest, while this layer's attention does not run in kvpack, and reads everything".into(),
                accepted: format!("None, or {OURS}"),
            });
        }
        let Some(eviction) = self.layer.eviction() else { return Ok(()) };
        if eviction.is_ragged() {
            return Err(Error::Option {
                name: "evict",
                given: "a method whose heads or layers hold different numbers of tokens, which only kvpack's own attention can \
                        read"
                    .into(),
                accepted: format!("here KeyDiff, L2Norm, StreamingLLM, Random, or {OURS}"),
            });
        }
        let rows = keys.shape()[0];
        if (1..rows).any(|row| !keys.same_rows(0, row)) {
            return Err(Error::Option {
                name: "evict",
                given: format!(
                    "a method for a batch of {rows} different sequences, while this layer's attention does not run in kvpack, and \
                     which tokens are pads is not known"
                ),
                accepted: format!("here one sequence at a time, or {OURS}"),
            });
        }
        Ok(())
    }

    /// Refuses attention that would change if all keys moved.
    fn check_center(&self, readers: &Readers<'_>) -> Result<()> {
        if self.layer.centers() && (readers.softmax.softcap.is_some() || readers.sinks.is_some()) {
            return Err(Error::Option {
                name: "center",
                given: "True, for a model with learned sinks or capped logits, which do not move with the keys".into(),
                accepted: "False".into(),
            });
        }
        Ok(())
    }

    /// Remembers what the newest query attends to, if that is wanted.
    fn watch(&mut self, readers: &Readers<'_>, kernels: &'static Kernels) -> Result<()> {
        if self.watched {
            let newest = readers.query.newest();
            let (softmax, sinks) = (readers.softmax, readers.sinks);
            let request = Request { query: newest, mask: None, softmax, sinks, received: true };
            self.attention = Some(self.layer.received(&request, kernels)?);
        }
        Ok(())
    }

    /// Positions that the model's own attention does not see any more.
    fn gone(&self) -> usize {
        let held = || self.layer.head(0, 0).map_or(0, |head| head.positions().len());
        if self.outside && self.layer.eviction().is_some() { self.layer.seen() - held() } else { 0 }
    }

    /// Tokens that every head holds, for other attention than ours.
    fn held_by_all(&self) -> Result<usize> {
        if self.layer.eviction().is_none() || self.layer.seen() == 0 {
            return Ok(self.seen());
        }
        let mut held = self.layer.heads().map(|head| head.positions().len());
        let first = held.next().unwrap_or(0);
        let equal = held.all(|n| n == first);
        if equal && (first == self.layer.seen() || self.outside) {
            return Ok(first + self.waiting());
        }
        Err(Error::Option {
            name: "evict",
            given: "a method that let tokens go, while this layer is read by another attention than kvpack's, which cannot know \
                    of it"
                .into(),
            accepted: "attn_implementation='kvpack' from the first token on".into(),
        })
    }

    fn check_crop(&self, n: usize, lossy: bool) -> Result<()> {
        let waiting = self.waiting();
        if n <= waiting {
            return Ok(());
        }
        self.layer.check_crop(n - waiting, lossy).map_err(|error| match error {
            Error::Crop { reachable, .. } => Error::Crop { asked: n, reachable: reachable + waiting },
            error => error,
        })
    }

    fn crop(&mut self, n: usize, lossy: bool, recording: bool) -> Result<()> {
        self.absorb(recording)?;
        self.layer.crop(n, lossy)?;
        if recording {
            self.layer.settle();
        }
        Ok(())
    }
}
