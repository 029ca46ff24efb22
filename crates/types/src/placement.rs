//! Who holds which expert slice: data only. Computing a placement is `coordination::balance`'s work.

use serde::{Deserialize, Serialize};

use crate::slice::{InvalidSegmentRange, SEGMENTS_PER_EXPERT, SegmentRange};
use crate::{Epoch, ExpertId, ExpertSlice, LayerId, WorkerId};

/// For every expert of every layer, the slices it is cut into and the workers that hold each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Version; only grows.
    pub epoch: Epoch,
    /// The numeric class that all holders compute in, such as `cpu-q8`.
    pub numeric_class: String,
    /// Fingerprint of the checkpoint that all holders read.
    pub model: String,
    /// Layers of the model.
    pub num_layers: usize,
    /// Experts per layer.
    pub num_experts: usize,
    /// The holders, each named once; slices refer to them by index.
    pub workers: Vec<WorkerId>,
    /// `[num_layers * num_experts]`, layer-major: the slices of each expert, ascending.
    pub experts: Vec<Vec<SliceHolders>>,
}

/// One slice of an expert and who holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceHolders {
    /// Which segments.
    pub range: SegmentRange,
    /// Indices into [`Placement::workers`], preferred holder first; never empty.
    pub holders: Vec<u16>,
}

/// A placement that does not cover the model exactly once, or names a worker that it does not list.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPlacement {
    /// The table has the wrong number of experts.
    #[error("placement lists {got} experts, expected {expected} (layers times experts)")]
    Experts {
        /// `num_layers * num_experts`.
        expected: usize,
        /// Entries found.
        got: usize,
    },
    /// The slices of one expert leave a hole, overlap or are out of order.
    #[error("layer {layer} expert {expert}: slice {range} does not continue at segment {expected}")]
    Cover {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The slice found.
        range: SegmentRange,
        /// Where the next slice had to begin.
        expected: u8,
    },
    /// The slices of one expert end early.
    #[error(
        "layer {layer} expert {expert}: slices end at segment {got}, expected {SEGMENTS_PER_EXPERT}"
    )]
    Short {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// Where they end.
        got: u8,
    },
    /// A slice without a holder, or with one that is not in the table of workers.
    #[error(
        "layer {layer} expert {expert} slice {range}: holders {holders:?} of {num_workers} workers"
    )]
    Holders {
        /// The layer.
        layer: LayerId,
        /// The expert.
        expert: ExpertId,
        /// The slice.
        range: SegmentRange,
        /// What it names.
        holders: Vec<u16>,
        /// Workers in the table.
        num_workers: usize,
    },
    /// A slice range that is not a range.
    #[error(transparent)]
    Range(#[from] InvalidSegmentRange),
}

impl Placement {
    /// The slices of one expert, ascending; empty when `layer` or `expert` is out of range.
    #[must_use]
    pub fn slices(&self, layer: LayerId, expert: ExpertId) -> &[SliceHolders] {
        if usize::from(expert.0) >= self.num_experts {
            return &[];
        }
        let index = usize::from(layer.0) * self.num_experts + usize::from(expert.0);
        self.experts.get(index).map_or(&[], Vec::as_slice)
    }

    /// The name of a holder.
    #[must_use]
    pub fn worker(&self, holder: u16) -> Option<&WorkerId> {
        self.workers.get(usize::from(holder))
    }

    /// Every slice that `worker` holds, by layer, expert and segment.
    pub fn slices_of<'a>(&'a self, worker: &'a WorkerId) -> impl Iterator<Item = ExpertSlice> + 'a {
        let holder = self.workers.iter().position(|w| w == worker);
        self.iter().filter_map(move |(slice, holders)| {
            let mine = holders.iter().any(|&h| Some(usize::from(h)) == holder);
            mine.then_some(slice)
        })
    }

    /// Every slice with its holders, by layer, expert and segment.
    pub fn iter(&self) -> impl Iterator<Item = (ExpertSlice, &[u16])> {
        let num_experts = self.num_experts.max(1);
        self.experts
            .iter()
            .enumerate()
            .flat_map(move |(index, slices)| {
                // In range: `validate` bounds layers and experts by u16.
                let layer = LayerId((index / num_experts) as u16);
                let expert = ExpertId((index % num_experts) as u16);
                slices.iter().map(move |s| {
                    (
                        ExpertSlice {
                            layer,
                            expert,
                            range: s.range,
                        },
                        s.holders.as_slice(),
                    )
                })
            })
    }

    /// Checks that every expert is covered exactly once and every holder is listed.
    ///
    /// # Errors
    /// Names the first expert that is not.
    pub fn validate(&self) -> Result<(), InvalidPlacement> {
        // Saturates: a hostile value must not overflow.
        let expected = self.num_layers.saturating_mul(self.num_experts);
        let fits =
            self.num_layers <= usize::from(u16::MAX) && self.num_experts <= usize::from(u16::MAX);
        if !fits || self.experts.len() != expected {
            return Err(InvalidPlacement::Experts {
                expected,
                got: self.experts.len(),
            });
        }
        for (index, slices) in self.experts.iter().enumerate() {
            let layer = LayerId((index / self.num_experts) as u16);
            let expert = ExpertId((index % self.num_experts) as u16);
            self.validate_expert(layer, expert, slices)?;
        }
        Ok(())
    }

    fn validate_expert(
        &self,
        layer: LayerId,
        expert: ExpertId,
        slices: &[SliceHolders],
    ) -> Result<(), InvalidPlacement> {
        let mut next = 0;
        for slice in slices {
            let range = slice.range;
            if range.begin() != next {
                return Err(InvalidPlacement::Cover {
                    layer,
                    expert,
                    range,
                    expected: next,
                });
            }
            next = range.end();
            let num_workers = self.workers.len();
            let known = slice.holders.iter().all(|&h| usize::from(h) < num_workers);
            if slice.holders.is_empty() || !known {
                let holders = slice.holders.clone();
                return Err(InvalidPlacement::Holders {
                    layer,
                    expert,
                    range,
                    holders,
                    num_workers,
                });
            }
        }
        if next == SEGMENTS_PER_EXPERT {
            return Ok(());
        }
        Err(InvalidPlacement::Short {
            layer,
            expert,
            got: next,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_workers() -> Placement {
        let slice = |begin, end, holders: &[u16]| SliceHolders {
            range: SegmentRange::new(begin, end).unwrap(),
            holders: holders.to_vec(),
        };
        Placement {
            epoch: Epoch(3),
            numeric_class: "cpu-q8".to_owned(),
            model: "demo".to_owned(),
            num_layers: 1,
            num_experts: 2,
            workers: vec![WorkerId::new("a"), WorkerId::new("b")],
            experts: vec![
                vec![slice(0, 8, &[0, 1])],
                vec![slice(0, 3, &[0]), slice(3, 8, &[1])],
            ],
        }
    }

    #[test]
    fn a_placement_says_who_holds_what() {
        let placement = two_workers();
        placement.validate().unwrap();
        let of_b: Vec<String> = placement
            .slices_of(&WorkerId::new("b"))
            .map(|s| s.to_string())
            .collect();
        assert_eq!(
            of_b,
            [
                "layer 0 expert 0 segments 0..8",
                "layer 0 expert 1 segments 3..8"
            ]
        );
        assert_eq!(placement.slices_of(&WorkerId::new("c")).count(), 0);
        assert!(placement.slices(LayerId(0), ExpertId(2)).is_empty());
        let text = serde_json::to_string(&placement).unwrap();
        assert_eq!(serde_json::from_str::<Placement>(&text).unwrap(), placement);
    }

    #[test]
    fn holes_overlaps_and_strangers_are_refused() {
        let mut hole = two_workers();
        hole.experts[1].remove(0);
        let text = hole.validate().unwrap_err().to_string();
        assert_eq!(
            text,
            "layer 0 expert 1: slice 3..8 does not continue at segment 0"
        );
        let mut short = two_workers();
        short.experts[1].pop();
        assert!(
            short
                .validate()
                .unwrap_err()
                .to_string()
                .contains("end at segment 3")
        );
        let mut stranger = two_workers();
        stranger.experts[0][0].holders.push(2);
        assert!(
            stranger
                .validate()
                .unwrap_err()
                .to_string()
                .contains("[0, 1, 2] of 2 workers")
        );
        let mut missing = two_workers();
        missing.experts.pop();
        assert!(missing.validate().is_err());
    }
}
