//! How many tokens may stay.

#![forbid(unsafe_code)]

use crate::amount::Amount;
use crate::error::{Result, refuse};
use crate::options::Options;

/// What a KV head may hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// Tokens, or a share of the prompt.
    pub amount: Amount,
    /// `PyramidKV`: layers have budgets of their own.
    pub pyramid: Option<Pyramid>,
}

/// A budget that falls linearly from the first layer to the last (`PyramidKV`, arXiv 2406.02069), the same in the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pyramid {
    /// The last layer has `1 / beta` of the mean.
    pub beta: usize,
    /// The layer's number.
    pub layer: usize,
    /// Layers of the model.
    pub layers: usize,
    /// Tokens that every layer has beside its share: the observation window.
    pub window: usize,
}

impl Budget {
    pub(super) fn check(self) -> Result<()> {
        self.amount.check("budget", false)?;
        match self.pyramid {
            Some(Pyramid { beta: 0, .. }) => refuse("beta", 0, "whole numbers from 1"),
            _ => Ok(()),
        }
    }

    /// Tokens of a prompt of `prompt` that may stay.
    pub fn tokens(self, prompt: usize) -> usize {
        let mean = self.amount.tokens(prompt).max(1);
        self.pyramid.map_or(mean, |pyramid| pyramid.tokens(mean, prompt))
    }
}

impl Pyramid {
    pub(super) fn from_options(options: &mut Options) -> Result<Self> {
        let (beta, window) = (options.whole("beta")?, options.whole("window")?);
        Ok(Self { beta, layer: options.whole("layer")?, layers: options.whole("layers")?, window })
    }

    /// The layer's budget when the mean is `mean`: the mean itself where the prompt, or the mean, is too small for a pyramid.
    fn tokens(self, mean: usize, prompt: usize) -> usize {
        let Self { beta, layer, layers, window } = self;
        let Some(rest) = mean.checked_sub(window).filter(|&rest| rest > 0 && layers > 1 && mean < prompt) else {
            return mean;
        };
        let room = prompt.saturating_sub(window);
        let (mut least, mut most) = (rest / beta, 2 * rest - rest / beta);
        if most > room {
            (most, least) = (room, (2 * rest).saturating_sub(room));
        }
        window + most - (most.saturating_sub(least)) * layer / (layers - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budgets(amount: Amount, prompt: usize) -> Vec<usize> {
        let pyramid = |layer| Some(Pyramid { beta: 20, layer, layers: 5, window: 8 });
        (0..5).map(|layer| Budget { amount, pyramid: pyramid(layer) }.tokens(prompt)).collect()
    }

    #[test]
    fn a_pyramid_falls_and_keeps_the_mean() {
        let falling = budgets(Amount::Tokens(108), 1000);
        assert_eq!(falling, [203, 156, 108, 61, 13]);
        assert!(falling.iter().sum::<usize>().abs_diff(5 * 108) <= 5);
        // A prompt with no room for the first layer's share.
        assert_eq!(budgets(Amount::Share(0.75), 120), [120, 105, 90, 75, 60]);
        assert_eq!(budgets(Amount::Tokens(200), 120), [200; 5]);
        assert_eq!(budgets(Amount::Tokens(8), 120), [8; 5]);
    }
}
