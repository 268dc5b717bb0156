//! A few numbers of every vector, kept beside the codes: what the codes lack there.
//!
//! Each has a place of its own, used or not: the channel (a byte) and the difference to what the code stands for (f16).

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};

use super::bytes_of;
use crate::memory;

/// Where the outliers of `tokens` vectors lie in a run of words: all differences, then all channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::quantize) struct Outliers {
    /// Places a vector.
    pub(in crate::quantize) each: usize,
    /// Vectors, an even number.
    pub(in crate::quantize) tokens: usize,
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
            words[self.each * self.tokens + place / 2] |= u16::from_ne_bytes(match place % 2 {
                0 => [channel, 0],
                _ => [0, channel],
            });
        }
    }

    /// Writes the outliers of vector `from` of `others` as those of vector `t`; their place must still be 0.
    pub(super) fn copy(self, words: &mut [u16], t: usize, others: &[u16], from: usize) {
        let mut buffer = Vec::new();
        let (channels, _) = self.of(others, from, 1, &mut buffer);
        let rests = others[from * self.each..(from + 1) * self.each].reinterpret_cast::<f16>();
        let outliers: Vec<_> = channels.iter().copied().zip(rests.iter().copied()).collect();
        self.put(words, t, &outliers);
    }

    /// The outliers of `n` vectors from vector `first` on: channels and differences, `each` a vector, by way of `buffer`; places
    /// that are not used are channel 0, difference 0.
    pub(super) fn of<'a>(
        self,
        words: &'a [u16],
        first: usize,
        n: usize,
        buffer: &'a mut Vec<f32>,
    ) -> (&'a [u8], &'a [f32]) {
        let places = first * self.each..(first + n) * self.each;
        let (rests, channels) = words.split_at(self.each * self.tokens);
        memory::resize(buffer, places.len());
        rests[places.clone()].reinterpret_cast::<f16>().convert_to_f32_slice(buffer);
        (&bytes_of(channels)[places], buffer)
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
        let mut buffer = vec![7.0; 2];
        for (first, n) in [(0, 4), (1, 2), (3, 1), (2, 0)] {
            let mut want: Vec<(u8, f32)> = Vec::new();
            for t in first..first + n {
                want.extend(of(t).into_iter().map(|(c, x)| (c, x.to_f32())));
                want.extend(std::iter::repeat_n((0, 0.0), 3 - t.min(3)));
            }
            let (channels, rests) = outliers.of(&words, first, n, &mut buffer);
            assert_eq!(channels.iter().copied().zip(rests.iter().copied()).collect::<Vec<_>>(), want);
        }
    }
}
