//! How logits become weights.

#![forbid(unsafe_code)]

/// `w = softmax(cap(scaling q . k) + bias)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Softmax {
    /// Factor of the logits.
    pub scaling: f32,
    /// `s -> c tanh(s / c)` after scaling.
    pub softcap: Option<f32>,
}

/// Caps scaled logits: `s -> c tanh(s / c)`.
pub fn cap(softcap: Option<f32>, logits: &mut [f32]) {
    if let Some(cap) = softcap {
        for s in logits {
            *s = cap * (*s / cap).tanh();
        }
    }
}

/// Adds what tokens have beside their keys to their capped logits.
pub fn add_bias(bias: Option<&[f32]>, logits: &mut [f32]) {
    if let Some(bias) = bias {
        logits.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
    }
}
