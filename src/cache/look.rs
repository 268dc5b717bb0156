//! Looking at a cache: nothing here changes anything. In the middle of a whole model's forward the answer is what was there before.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;

use super::cache::{Cache, Counts, Foreign, Which};
use super::layer::Layer;
use super::memory::Memory;
use super::packed::{Before, Packed, Pending};
use crate::error::{Error, Result};
use crate::kernels::Kernels;
use crate::quantize::Codecs;
use crate::tensor::{Dtype, ViewMut};

impl Cache {
    /// The layers as they were before the forward that is under way.
    pub(super) fn shown(&self) -> impl Iterator<Item = Option<Cow<'_, Packed>>> {
        (0..self.layers.len()).map(|i| self.shown_at(i).filter(|_| self.source(i) == i))
    }

    fn shown_at(&self, i: usize) -> Option<Cow<'_, Packed>> {
        let packed = self.layers.get(self.source(i))?.as_deref()?;
        let before = self.saved(i);
        Some(before.map_or(Cow::Borrowed(packed), |before| {
            let mut then = packed.clone();
            then.restore(before);
            Cow::Owned(then)
        }))
    }

    /// A layer that is packed, as it was before the forward under way.
    fn look(&self, i: usize) -> Result<Cow<'_, Packed>> {
        self.shown_at(i).ok_or_else(|| self.no_layer(i))
    }

    pub(super) fn no_layer(&self, i: usize) -> Error {
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
        Self { layers, sources: self.sources.clone(), last: self.last, ..self.bare() }
    }

    /// What a copy of this has in common with it, but for layers.
    fn bare(&self) -> Self {
        Self {
            layers: Vec::new(),
            sources: Vec::new(),
            forward: None,
            recording: self.recording,
            last: 0,
            last_is_read: self.last_is_read,
            version: self.version,
            undone: Vec::new(),
            abandoned: None,
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
        let packed = self.packed(i)?;
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
        if packed.layer.window.is_some() {
            return Ok(packed.layer.passed(packed.seen()));
        }
        let ours = packed.layer.seen() > 0 && !packed.state.outside;
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
        if self.source(i) != i {
            return Ok(Memory::default()); // it is counted where it is held
        }
        let before = self.saved(i);
        let mut memory =
            before.map_or_else(|| packed.layer.memory(), |before| packed.layer.memory_then(&before.snapshot));
        if before.map_or_else(|| packed.layer.seen(), |before| before.snapshot.seen()) > 0 {
            for (own, shared) in packed.layer.methods().all_codecs().map(Codecs::tables) {
                memory.scales += own;
                memory.index += shared.filter(|&(table, _)| tables.insert(table)).map_or(0, |(_, bytes)| bytes);
            }
        }
        Ok(memory)
    }

    /// Who keeps the memory of layer `i`'s tokens that wait to be stored.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn owners(&self, i: usize) -> Result<Vec<Foreign>> {
        let before = self.saved(i).and_then(|before| before.state.pending.as_ref());
        let pending = [self.packed(i)?.state.pending.as_ref(), before];
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
        let waiting = packed.state.pending.as_ref().filter(|pending| {
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
        Ok(self.packed(i)?.state.counts)
    }

    /// What the newest query attended to in layer `i`, `[B, seen]`, the mean over its heads, if that was watched.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed.
    pub fn attention(&self, i: usize) -> Result<Option<&[f32]>> {
        Ok(self.packed(i)?.state.attention.as_deref())
    }

    /// Sizes `[B, H, n, D]` of what [`Self::write`] writes of layer `i`: of `compact` the tokens that are held, else all positions; with
    /// a window those that attention of the newest tokens, else of the next ones, reads.
    ///
    /// # Errors
    /// [`Error::Shape`] when it is not packed or empty; [`Error::Option`] when heads hold different numbers of tokens, or none
    /// could know that tokens would go.
    pub fn extent(&self, i: usize, which: Which, compact: bool) -> Result<([usize; 4], Dtype)> {
        let packed = self.packed(i)?;
        let ([batch, heads, key_dim, value_dim], dtype) = packed.shape().ok_or_else(|| Error::Shape {
            what: "cache",
            given: "no tokens".into(),
            expected: "at least one token".into(),
        })?;
        let tokens = if compact { packed.held_by_all()? } else { packed.seen() - packed.layer.passed(packed.seen()) };
        Ok(([batch, heads, tokens, if which == Which::Keys { key_dim } else { value_dim }], dtype))
    }

    /// Writes the keys or values of layer `i`, dequantised, to `out`, which is 0 before, each at its position or, where it is
    /// `compact` and tokens were let go, in the order of those that are held. What waits to be stored is last.
    ///
    /// # Errors
    /// As [`Self::extent`], which `out` must have.
    pub fn write(
        &self,
        i: usize,
        which: Which,
        compact: bool,
        mut out: ViewMut<'_>,
        kernels: &'static Kernels,
    ) -> Result<()> {
        let (expected, _) = self.extent(i, which, compact)?;
        if out.shape() != expected {
            let given = format!("{:?}", out.shape());
            return Err(Error::Shape { what: "out", given, expected: format!("{expected:?}") });
        }
        let packed = self.packed(i)?;
        if let Some(pending) = &packed.state.pending {
            let new = if which == Which::Keys { pending.k.view() } else { pending.v.view() };
            let ([batch, heads, n, dim], first) = (new.shape(), expected[2] - pending.tokens());
            let mut row = vec![0.0; dim];
            for (b, h, t) in (0..batch).flat_map(|b| (0..heads).flat_map(move |h| (0..n).map(move |t| (b, h, t)))) {
                new.row(b, h, t).to_f32(&mut row);
                out.write_row([b, h, first + t], &row);
            }
        }
        let in_order = compact && packed.layer.eviction().is_some() && packed.state.outside;
        let first = if in_order { None } else { Some(packed.seen() - expected[2]) };
        packed.layer.write(which, first, out, kernels);
        Ok(())
    }

    /// Counts that layer `i` was dequantised for other attention than ours.
    pub fn materialised(&mut self, i: usize) {
        if let Some(packed) = self.layers.get_mut(i).and_then(Option::as_mut) {
            packed.state.counts.materialised += 1;
        }
    }
}
