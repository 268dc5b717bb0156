//! Past recording: what `activate_past_recording` asks for.

/// Assisted decoding, which rolls the newest tokens back after each forward: packing waits for that.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Recording {
    /// Whether anybody has cropped.
    pub(super) cropped: bool,
    /// Forwards since then.
    pub(super) uncropped: usize,
}

/// Forwards without a crop, after some with, until recording is over.
const PATIENCE: usize = 16;

impl Recording {
    /// It was just cropped.
    pub(super) fn cropped() -> Self {
        Self { cropped: true, uncropped: 0 }
    }

    /// Whether nobody crops any more.
    pub(super) fn is_over(self) -> bool {
        self.cropped && self.uncropped >= PATIENCE
    }
}
