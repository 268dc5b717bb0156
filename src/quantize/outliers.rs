//! A few numbers of every vector, kept beside the codes: what the codes lack there.
//!
//! Each has a place of its own, used or not: the channel (a byte) and the difference to what the code stands for (f16).

use half::f16;

/// Where the outliers of `tokens` vectors lie in a run of words: all differences, then all channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outliers {
    /// Places a vector.
    pub(super) each: usize,
    /// Vectors, an even number.
    pub(super) tokens: usize,
}

impl Outliers {
    /// Words of all.
    pub(super) fn words(self) -> usize {
        self.each * self.tokens + self.each * self.tokens / 2
    }

    /// Writes the outliers of vector `t`, at most `each`, as channel and difference; their place must still be 0.
    pub(super) fn put(self, words: &mut [u16], t: usize, outliers: &[(u8, f16)]) {
        for (i, &(channel, rest)) in outliers.iter().enumerate() {
            let place = t * self.each + i;
            words[place] = rest.to_bits();
            words[self.each * self.tokens + place / 2] |= u16::from(channel) << (8 * (place % 2));
        }
    }

    /// The outliers of vector `t`; places that are not used are channel 0, difference 0.
    pub(super) fn of(self, words: &[u16], t: usize) -> impl Iterator<Item = (usize, f32)> + '_ {
        (t * self.each..(t + 1) * self.each).map(move |place| {
            let channel = words[self.each * self.tokens + place / 2] >> (8 * (place % 2)) & 0xff;
            (usize::from(channel), f16::from_bits(words[place]).to_f32())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_is_found() {
        let outliers = Outliers { each: 3, tokens: 4 };
        let mut words = vec![0; outliers.words()];
        assert_eq!(words.len(), 18);
        let of = |t: usize| -> Vec<(u8, f16)> {
            (0..t.min(3)).map(|i| ((250 - 7 * t + i) as u8, f16::from_f32(t as f32 - 0.5 * i as f32))).collect()
        };
        for t in 0..4 {
            outliers.put(&mut words, t, &of(t));
        }
        for t in 0..4 {
            let want = of(t).into_iter().map(|(c, x)| (usize::from(c), x.to_f32()));
            let unused = std::iter::repeat_n((0, 0.0), 3 - t.min(3));
            assert_eq!(outliers.of(&words, t).collect::<Vec<_>>(), want.chain(unused).collect::<Vec<_>>());
        }
    }
}
