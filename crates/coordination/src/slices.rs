//! Which expert slices a worker must load for a placement and which it may drop. Never counts a segment
//! twice: what a worker holds as part of another slice it holds.

use std::collections::BTreeMap;

use tramontane_types::{
    ExpertId, ExpertSlice, LayerId, Placement, SEGMENTS_PER_EXPERT, SegmentRange, WorkerId,
};

/// What `worker` must load so that it holds all its slices of both placements: the segments that
/// `held` lacks, as the longest contiguous ranges, by layer, expert and segment.
#[must_use]
pub fn slices_to_load(
    worker: &WorkerId,
    published: Option<&Placement>,
    pending: Option<&Placement>,
    held: &[ExpertSlice],
) -> Vec<ExpertSlice> {
    let mut wanted = wanted(worker, published, pending);
    for (expert, mask) in masks(held.iter().copied()) {
        wanted.entry(expert).and_modify(|want| *want &= !mask);
    }
    ranges(&wanted)
}

/// What `worker` may drop once the frames of older epochs have drained: the segments that it holds and
/// that no placement asks of it, as the longest contiguous ranges.
#[must_use]
pub fn slices_to_drop(
    worker: &WorkerId,
    published: Option<&Placement>,
    pending: Option<&Placement>,
    held: &[ExpertSlice],
) -> Vec<ExpertSlice> {
    let mut spare = masks(held.iter().copied());
    for (expert, mask) in wanted(worker, published, pending) {
        spare.entry(expert).and_modify(|have| *have &= !mask);
    }
    ranges(&spare)
}

/// One bit per segment, as in [`SegmentRange::mask`], of each expert.
type Masks = BTreeMap<(LayerId, ExpertId), u8>;

fn wanted(worker: &WorkerId, published: Option<&Placement>, pending: Option<&Placement>) -> Masks {
    let placements = published.into_iter().chain(pending);
    masks(placements.flat_map(|placement| placement.slices_of(worker)))
}

fn masks(slices: impl Iterator<Item = ExpertSlice>) -> Masks {
    let mut masks = Masks::new();
    for slice in slices {
        *masks.entry((slice.layer, slice.expert)).or_default() |= slice.range.mask();
    }
    masks
}

fn ranges(masks: &Masks) -> Vec<ExpertSlice> {
    let mut slices = Vec::new();
    for (&(layer, expert), &mask) in masks {
        let bit = |segment: u8| segment < SEGMENTS_PER_EXPERT && mask >> segment & 1 == 1;
        let mut begin = 0;
        while begin < SEGMENTS_PER_EXPERT {
            let mut end = begin;
            while bit(end) {
                end += 1;
            }
            if let Ok(range) = SegmentRange::new(begin, end) {
                slices.push(ExpertSlice {
                    layer,
                    expert,
                    range,
                });
            }
            begin = end + 1;
        }
    }
    slices
}

#[cfg(test)]
mod tests {
    use tramontane_types::{Epoch, SliceHolders};

    use super::*;

    fn range(begin: u8, end: u8) -> SegmentRange {
        SegmentRange::new(begin, end).unwrap()
    }

    fn placement(cuts: &[(u8, u8, u16)]) -> Placement {
        let slices = cuts.iter().map(|&(begin, end, holder)| SliceHolders {
            range: range(begin, end),
            holders: vec![holder],
        });
        Placement {
            epoch: Epoch(1),
            numeric_class: "c".to_owned(),
            model: "m".to_owned(),
            num_layers: 1,
            num_experts: 1,
            workers: vec![WorkerId::new("a"), WorkerId::new("b")],
            experts: vec![slices.collect()],
        }
    }

    fn text(slices: &[ExpertSlice]) -> Vec<String> {
        slices.iter().map(|s| s.range.to_string()).collect()
    }

    #[test]
    fn only_missing_segments_are_loaded_and_only_unwanted_ones_dropped() {
        let a = WorkerId::new("a");
        let published = placement(&[(0, 8, 0)]);
        let pending = placement(&[(0, 4, 0), (4, 8, 1)]);
        let load = |worker, published, pending, held: &[ExpertSlice]| {
            text(&slices_to_load(worker, published, pending, held))
        };
        assert_eq!(load(&a, Some(&published), Some(&pending), &[]), ["0..8"]);
        let held: Vec<ExpertSlice> = published.slices_of(&a).collect();
        assert!(load(&a, Some(&published), Some(&pending), &held).is_empty());
        let b = WorkerId::new("b");
        assert_eq!(load(&b, Some(&published), Some(&pending), &[]), ["4..8"]);
        // While both count nothing goes; once published, the other half does.
        assert!(slices_to_drop(&a, Some(&published), Some(&pending), &held).is_empty());
        assert_eq!(
            text(&slices_to_drop(&a, Some(&pending), None, &held)),
            ["4..8"]
        );
        let middle = ExpertSlice {
            range: range(2, 3),
            ..held[0]
        };
        assert_eq!(load(&a, Some(&pending), None, &[middle]), ["0..2", "3..4"]);
    }
}
