//! A forward's step of a layer: its tokens come, wait until attention has read them, and are stored.

use super::append::LayerQueries;
use super::cache::{Cache, Given};
use super::forward::TOKENS;
use super::layer::expect;
use super::packed::Pending;
use super::read::Request;
use crate::error::Result;
use crate::kernels::Kernels;
use crate::tensor::{Kept, ViewMut};

impl Cache {
    /// Takes a forward's keys `[B, H, n, Dk]` and values `[B, H, n, Dv]` of layer `i`. They wait until attention has read them:
    /// only then is it known which are pads. `of_module`: should a forward begin here, whether it is one of a whole model.
    ///
    /// # Errors
    /// [`Error::Busy`] in the middle of another thread's forward; else what does not fit, and the forward is rolled back.
    pub fn update(&mut self, i: usize, k: Kept, v: Kept, of_module: bool) -> Result<Given> {
        let (tokens, source) = (k.view().shape()[2], self.source(i));
        expect("layer that holds the tokens", i, source)?;
        self.begin(i, TOKENS, of_module)?;
        self.step(|cache| {
            let recording = cache.recording.is_some();
            cache.save(i, tokens)?;
            let version = cache.next_version();
            let packed = cache.packed_mut(i)?;
            packed.flush(recording)?;
            packed.layer.check(&k.view(), &v.view())?;
            let first = packed.layer.seen() == 0;
            let gone = packed.gone();
            packed.state.missed = gone;
            packed.state.pending = Some(Pending { k, v });
            packed.version = version;
            let given = Given { version, first, tokens: packed.seen() - gone };
            cache.tokens_came();
            Ok(given)
        })
    }

    /// Stores layer `i`'s first tokens, after the attention of `queries` over the model's own tensors; `valid` `[B, n]` says
    /// which are no pads. Returns whether the forward is over.
    ///
    /// # Errors
    /// [`Error::Stale`] when the layer was changed since; else what does not fit, and the forward is rolled back.
    pub fn commit(
        &mut self,
        i: usize,
        version: u64,
        valid: Option<&[bool]>,
        queries: LayerQueries<'_>,
        kernels: &'static Kernels,
    ) -> Result<bool> {
        self.check_version(i, version)?;
        self.step(|cache| {
            let recording = cache.recording.is_some();
            let packed = cache.packed_mut(i)?;
            packed.check_center(&queries)?;
            packed.state.counts.prefill += 1;
            packed.state.outside = false;
            packed.store(valid, Some(queries), recording)?;
            packed.watch(&queries, &[], kernels)?;
            Ok(cache.attention_ends(i))
        })
    }

    /// Stores what layer `i` was just given before anything has read it, in no more memory than that takes: nothing follows it.
    ///
    /// # Errors
    /// What does not fit, and the forward is rolled back.
    pub fn store(&mut self, i: usize) -> Result<()> {
        self.step(|cache| {
            let recording = cache.recording.is_some();
            let packed = cache.packed_mut(i)?;
            packed.commit_unread(recording)?;
            packed.layer.fit();
            Ok(())
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
            let (query, Request { softmax, sink_logits, .. }) = (request.query.reborrow(), *request);
            let queries = LayerQueries { query: &query, softmax, sink_logits };
            packed.check_center(&queries)?;
            packed.store(valid, Some(queries), recording)?;
            let new = query.shape()[2];
            let scores = new == 1 && (packed.layer.wants_attention() || packed.state.watched);
            let attention = packed.layer.attend(&Request { scores, ..*request }, out, kernels)?;
            if packed.layer.wants_attention() {
                packed.layer.receive(&attention, kernels);
            }
            packed.state.counts.fused += 1;
            packed.watch(&queries, &attention, kernels)?;
            if packed.layer.is_long(new) && !recording && !packed.shared {
                packed.layer.flush()?; // a long chunk would otherwise be held exactly in all layers at once
                if packed.layer.window.is_some() {
                    // Tokens that these queries saw may have left: the same keys cannot be read again.
                    let version = cache.next_version();
                    cache.packed_mut(i)?.version = version;
                }
            }
            Ok(cache.attention_ends(i))
        })
    }
}
