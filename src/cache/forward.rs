//! A forward is a transaction: it begins with the first layer that is given something, and ends with the attention of the last
//! one. What fails in between is rolled back in all layers; one that never ended when the next one begins.

use std::thread::{self, ThreadId};

use super::cache::{Cache, Foreign};
use super::packed::Before;
use super::recording::Recording;
use crate::error::{self, Error, Result};

/// What layers are given that is no state: tokens.
pub(super) const TOKENS: u8 = 0;

/// What brings a layer back.
pub(super) enum Saved {
    Packed(Box<Before>),
    Other(Foreign),
}

/// How far a forward has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    UnderWay,
    /// All is done, and only [`Cache::finish`] is missing.
    Ended,
    /// It cannot be undone any more.
    Finished,
}

/// The forward under way, or the last one.
pub(super) struct Forward {
    thread: ThreadId,
    /// Which layers were given what, in their order: tokens, or states of their own kind.
    given: Vec<(usize, u8)>,
    /// The last layer of them.
    last: usize,
    phase: Phase,
    /// Whether our attention has read one of its layers.
    attended: bool,
    /// Whether it is one of a whole model, of which is known that it goes on to the last layer: until it has ended, who looks sees
    /// what was there before. Of layers that are given tokens by hand nobody knows where that ends.
    of_module: bool,
    /// What the layers that it changed were like.
    saved: Vec<(usize, Saved)>,
}

impl Forward {
    /// What packed layer `i` was like.
    fn packed(&self, i: usize) -> Option<&Before> {
        self.saved.iter().find_map(|(saved, before)| match before {
            Saved::Packed(before) if *saved == i => Some(&**before),
            _ => None,
        })
    }

    /// What brings back what is held elsewhere of layer `i`.
    fn other(&self, i: usize) -> Option<&Foreign> {
        self.saved.iter().find_map(|(saved, before)| match before {
            Saved::Other(before) if *saved == i => Some(before),
            _ => None,
        })
    }
}

impl Cache {
    /// Says that layer `i`, which is held elsewhere, is about to be given tokens, or states of a `kind` of their own; `of_module` as
    /// in [`Self::update`]. Returns whether what brings it back is still to be [kept](Self::keep).
    ///
    /// # Errors
    /// [`Error::Busy`] in the middle of another thread's forward.
    pub fn enter(&mut self, i: usize, kind: u8, of_module: bool) -> Result<bool> {
        self.begin(i, kind, of_module)?;
        self.tokens_came();
        let unknown = |forward: &Forward| forward.phase != Phase::Finished && forward.other(i).is_none();
        Ok(self.forward.as_ref().is_some_and(unknown))
    }

    /// Keeps what brings layer `i` back, which is held elsewhere, if this thread's forward is rolled back.
    pub fn keep(&mut self, i: usize, before: Foreign) {
        if let Some(forward) = self
            .forward
            .as_mut()
            .filter(|forward| forward.thread == thread::current().id() && forward.phase != Phase::Finished)
        {
            forward.saved.push((i, Saved::Other(before)));
        }
    }

    /// What was [kept](Self::keep) of layer `i` by the forward that is under way.
    pub fn kept(&self, i: usize) -> Option<Foreign> {
        self.hidden()?.other(i).cloned()
    }

    /// Whether a forward has begun and not ended.
    pub fn is_under_way(&self) -> bool {
        self.forward.as_ref().is_some_and(|forward| forward.phase == Phase::UnderWay)
    }

    /// Says that attention has read layer `i`, which is held elsewhere. Returns whether the forward is over.
    pub fn attended(&mut self, i: usize) -> bool {
        self.attention_ends(i)
    }

    /// Undoes this thread's forward, if there is one that is not [finished](Self::finish).
    pub fn roll_back(&mut self) {
        let mine = |forward: &mut Forward| forward.thread == thread::current().id() && forward.phase != Phase::Finished;
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
        if let Some(forward) = self.forward.as_mut().filter(|forward| forward.phase == Phase::UnderWay) {
            forward.thread = thread::current().id();
            self.roll_back();
        }
    }

    /// What the caller gave to bring layers back that are held elsewhere, of forwards that were rolled back since the last call.
    pub fn take_undone(&mut self) -> Vec<Foreign> {
        std::mem::take(&mut self.undone)
    }

    /// The layer that a forward came to which was rolled back as it never ended, and the last one of the model, since the last call.
    pub fn take_abandoned(&mut self) -> Option<(usize, usize)> {
        Some((self.abandoned.take()?, self.last))
    }

    /// After a forward that is over: from now on it cannot be undone.
    pub fn finish(&mut self) {
        let Some(forward) = self.forward.as_mut().filter(|forward| forward.phase == Phase::Ended) else { return };
        forward.phase = Phase::Finished;
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
    pub(super) fn begin(&mut self, i: usize, kind: u8, of_module: bool) -> Result<()> {
        let now = (i, kind);
        if let Some(forward) = &mut self.forward {
            let mine = forward.thread == thread::current().id();
            if !mine && forward.phase == Phase::UnderWay {
                return Err(Error::Busy);
            }
            // What the first layer is given again begins the next one. After the attention of the last layer there may be states
            // of it to come.
            let again = forward.given.contains(&now);
            let goes_on = if forward.phase == Phase::UnderWay {
                forward.given.first() != Some(&now)
            } else {
                i >= forward.last && !again
            };
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
            phase: Phase::UnderWay,
            attended: false,
            of_module,
            saved: Vec::new(),
        });
        Ok(())
    }

    /// Remembers what layer `i` is like, once a forward.
    pub(super) fn save(&mut self, i: usize, tokens: usize) -> Result<()> {
        let known = |forward: &Forward| forward.phase == Phase::Finished || forward.packed(i).is_some();
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
    pub(super) fn attention_ends(&mut self, i: usize) -> bool {
        if let Some(packed) = &mut self.layers[i] {
            packed.state.attended = true;
        }
        let last = self.last;
        self.forward.as_mut().is_some_and(|forward| {
            forward.attended = true;
            if i >= last && forward.phase == Phase::UnderWay {
                forward.phase = Phase::Ended;
            }
            forward.phase != Phase::UnderWay
        })
    }

    /// Where attention that is not ours reads the last layer, nobody says when it has: a forward is over with its tokens.
    pub(super) fn tokens_came(&mut self) {
        if let Some(forward) = &self.forward
            && self.is_over(forward)
        {
            self.end();
        }
    }

    /// Whether a forward has come to its last layer, which as far as is known other attention than ours reads.
    fn is_over(&self, forward: &Forward) -> bool {
        let ours = forward.attended || self.layers[forward.last].as_ref().is_some_and(|packed| packed.state.attended);
        forward.last >= self.last && !(ours && self.last_is_read)
    }

    fn end(&mut self) {
        if let Some(forward) = self.forward.as_mut().filter(|forward| forward.phase == Phase::UnderWay) {
            forward.phase = Phase::Ended;
        }
    }

    /// Runs `f`; if it fails or panics, the forward is rolled back.
    pub(super) fn step<R>(&mut self, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        let result = error::caught(|| f(self));
        if result.is_err() {
            self.roll_back();
        }
        result
    }

    /// Ends the forward before another change.
    ///
    /// # Errors
    /// [`Error::Busy`] in the middle of another thread's forward.
    pub fn settle_forward(&mut self) -> Result<()> {
        if let Some(forward) = self.forward.as_ref().filter(|forward| forward.phase == Phase::UnderWay) {
            if forward.thread != thread::current().id() {
                return Err(Error::Busy);
            }
            if forward.of_module && !self.is_over(forward) {
                // Begun, and never ended.
                self.abandoned = Some(forward.last);
                self.roll_back();
            } else {
                self.end();
            }
        }
        self.finish();
        Ok(())
    }

    /// The forward of a whole model that is under way.
    fn hidden(&self) -> Option<&Forward> {
        self.forward.as_ref().filter(|forward| forward.of_module && forward.phase == Phase::UnderWay)
    }

    /// What layer `i` was like, if it is in the midst of a forward.
    pub(super) fn saved(&self, i: usize) -> Option<&Before> {
        self.hidden()?.packed(self.source(i))
    }
}
