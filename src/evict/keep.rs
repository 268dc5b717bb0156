//! Which tokens stay: the best ones of each head, or of all heads of a layer.

use std::cmp::Ordering;

use crate::memory;

/// The tokens of a KV head, and how many may stay.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidates {
    /// Which stay in any case.
    pub fixed: Vec<bool>,
    /// The newest ones, which come before all others as far as there is room.
    pub recent: usize,
    /// Tokens that may stay.
    pub budget: usize,
    /// What each is worth; -inf: it goes even where there is room.
    pub scores: Vec<f32>,
}

/// Tokens that stay or go together.
#[derive(Clone, Copy)]
struct Granule {
    head: usize,
    first: usize,
    tokens: usize,
    /// 2 for those that stay in any case, 1 for recent ones, 0 for all others.
    rank: u8,
    /// Mean of the tokens' scores; for recent tokens their age does it.
    score: f32,
}

impl Granule {
    fn better(&self, other: &Self) -> Ordering {
        other.rank.cmp(&self.rank).then(other.score.total_cmp(&self.score)).then(self.first.cmp(&other.first))
    }
}

/// The tokens that stay, head by head. `granules` are the lengths of the runs of tokens that stay or go together, of each head;
/// with a floor (`AdaKV`, arXiv 2407.11550) all heads share one budget, of which the best `floor budget` tokens of every
/// head are its own.
pub fn keep(heads: &[Candidates], granules: &[Vec<usize>], floor: Option<f32>) -> Vec<Vec<bool>> {
    let mut keep: Vec<Vec<bool>> = heads.iter().map(|head| memory::filled(false, head.scores.len())).collect();
    let mut rest = Vec::new();
    for (h, (head, granules)) in heads.iter().zip(granules).enumerate() {
        let own = floor.map_or(head.budget, |floor| (floor * head.budget as f32) as usize);
        let mut granules = granules_of(h, head, granules);
        granules.sort_by(Granule::better);
        rest.extend(fill(granules, own, &mut keep));
    }
    if floor.is_some() {
        let budget: usize = heads.iter().map(|head| head.budget).sum();
        let kept: usize = keep.iter().flatten().filter(|&&kept| kept).count();
        rest.sort_by(Granule::better);
        fill(rest, budget.saturating_sub(kept), &mut keep);
    }
    keep
}

/// Keeps granules, best first, as long as their tokens fit into `room`, and those that stay in any case; the others are returned.
fn fill(granules: Vec<Granule>, mut room: usize, keep: &mut [Vec<bool>]) -> Vec<Granule> {
    let mut rest = Vec::new();
    for granule in granules {
        if granule.rank == 2 || granule.tokens <= room && granule.score > f32::NEG_INFINITY {
            keep[granule.head][granule.first..][..granule.tokens].fill(true);
            room = room.saturating_sub(granule.tokens);
        } else if granule.score > f32::NEG_INFINITY {
            rest.push(granule);
        }
    }
    rest
}

fn granules_of(h: usize, head: &Candidates, lengths: &[usize]) -> Vec<Granule> {
    let tokens = head.scores.len();
    let newest = tokens - head.recent.min(tokens);
    let mut first = 0;
    let granule = |&tokens: &usize| {
        let range = first..first + tokens;
        first = range.end;
        let rank = if head.fixed[range.clone()].contains(&true) { 2 } else { u8::from(range.end > newest) };
        let mean = head.scores[range.clone()].iter().sum::<f32>() / tokens as f32;
        let score = if rank == 1 { range.end as f32 } else { mean };
        Granule { head: h, first: range.start, tokens, rank, score }
    };
    lengths.iter().map(granule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(scores: &[f32], fixed: usize, recent: usize, budget: usize) -> Candidates {
        let fixed = (0..scores.len()).map(|t| t < fixed).collect();
        Candidates { fixed, recent, budget, scores: scores.to_vec() }
    }

    fn kept(heads: &[Candidates], granules: &[Vec<usize>], floor: Option<f32>) -> Vec<Vec<usize>> {
        let places = |keep: &Vec<bool>| (0..keep.len()).filter(|&t| keep[t]).collect();
        keep(heads, granules, floor).iter().map(places).collect()
    }

    #[test]
    fn the_best_stay_beside_the_first_and_the_newest() {
        let head = candidates(&[0.0, 5.0, 1.0, 4.0, 2.0, 0.0, 0.0], 1, 2, 5);
        assert_eq!(kept(&[head], &[vec![1; 7]], None), [[0, 1, 3, 5, 6]]);
    }

    #[test]
    fn recent_tokens_beyond_the_budget_go_and_fixed_ones_stay() {
        let head = candidates(&[9.0, 9.0, 9.0, 0.0, 0.0, 0.0], 0, 4, 2);
        assert_eq!(kept(&[head], &[vec![1; 6]], None), [[4, 5]]);
        let head = candidates(&[0.0, 0.0, 0.0, 0.0, 5.0, 1.0], 3, 0, 2);
        assert_eq!(kept(&[head], &[vec![1; 6]], None), [[0, 1, 2]]);
    }

    #[test]
    fn units_stay_whole() {
        let head = candidates(&[1.0, 9.0, 2.0, 2.0, 8.0, 3.0], 0, 0, 4);
        assert_eq!(kept(&[head], &[vec![2, 2, 1, 1]], None), [[0, 1, 4, 5]]);
    }

    #[test]
    fn heads_share_a_budget_above_the_floor() {
        let (a, b) = (candidates(&[5.0, 6.0, 7.0, 8.0], 0, 1, 2), candidates(&[1.0, 2.0, 3.0, 4.0], 0, 1, 2));
        let granules = [vec![1; 4], vec![1; 4]];
        assert_eq!(kept(&[a.clone(), b.clone()], &granules, Some(0.5)), [vec![1, 2, 3], vec![3]]);
        assert_eq!(kept(&[a, b], &granules, Some(1.0)), [vec![2, 3], vec![2, 3]]);
    }
}
