//! Expert slices: how the intermediate dimension of an expert is cut, and how the cut parts are summed.
//!
//! Every expert is cut into [`SEGMENTS_PER_EXPERT`] segments of its intermediate dimension `ff`. The
//! output of the expert is the sum of its segments' partial outputs along a fixed binary tree:
//! `((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))`. A worker that holds a range of segments
//! returns the sums of the largest whole subtrees ("nodes") inside its range, so a slice costs few
//! vectors on the wire and the result has the same bits however the expert is cut.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ExpertId, LayerId};

/// Leaves of the summation tree; the finest slice of an expert is one segment.
pub const SEGMENTS_PER_EXPERT: u8 = 8;

/// Segments have a multiple of this many `ff` columns (the quantisation block), except the last.
pub const SEGMENT_ALIGN: usize = 32;

/// `ff` columns of one full segment: `ceil(ff / 8)` rounded up to a multiple of 32.
///
/// Trailing segments may be shorter or empty when `ff` is small or odd.
#[must_use]
pub const fn segment_len(ff: usize) -> usize {
    ff.div_ceil(SEGMENTS_PER_EXPERT as usize)
        .div_ceil(SEGMENT_ALIGN)
        * SEGMENT_ALIGN
}

/// Number of segments that hold at least one column, `1..=8` for `ff >= 1`.
#[must_use]
pub const fn num_segments(ff: usize) -> u8 {
    // At most 8 by the definition of `segment_len`.
    ff.div_ceil(segment_len(ff)) as u8
}

/// The `ff` columns `[begin, end)` of a segment; empty for a segment behind the last column.
#[must_use]
pub fn segment_columns(ff: usize, segment: u8) -> std::ops::Range<usize> {
    let len = segment_len(ff);
    let begin = (usize::from(segment) * len).min(ff);
    begin..(begin + len).min(ff)
}

/// A contiguous range of segments `[begin, end)` of one expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u8, u8)", into = "(u8, u8)")]
pub struct SegmentRange {
    begin: u8,
    end: u8,
}

/// A range that is empty, reversed or reaches behind the last segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("segments {begin}..{end} are not a non-empty range within 0..{SEGMENTS_PER_EXPERT}")]
pub struct InvalidSegmentRange {
    begin: u8,
    end: u8,
}

impl SegmentRange {
    /// The whole expert.
    pub const WHOLE: Self = Self {
        begin: 0,
        end: SEGMENTS_PER_EXPERT,
    };

    /// The range `[begin, end)`.
    ///
    /// # Errors
    /// When the range is empty, reversed or reaches behind the last segment.
    pub const fn new(begin: u8, end: u8) -> Result<Self, InvalidSegmentRange> {
        if begin < end && end <= SEGMENTS_PER_EXPERT {
            Ok(Self { begin, end })
        } else {
            Err(InvalidSegmentRange { begin, end })
        }
    }

    /// First segment.
    #[must_use]
    pub const fn begin(self) -> u8 {
        self.begin
    }

    /// One behind the last segment.
    #[must_use]
    pub const fn end(self) -> u8 {
        self.end
    }

    /// Number of segments.
    #[must_use]
    pub const fn len(self) -> u8 {
        self.end - self.begin
    }

    /// Never true: an empty range cannot be built.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.end == self.begin
    }

    /// One bit per segment, segment 0 lowest.
    #[must_use]
    pub const fn mask(self) -> u8 {
        let ones = ((1_u16 << (self.end - self.begin)) - 1) as u8;
        ones << self.begin
    }

    /// The largest whole subtrees inside this range, ascending, for an expert of `num_segments`
    /// non-empty segments. Subtrees without a non-empty segment are left out.
    ///
    /// A range that reaches the last non-empty segment counts as reaching the end of the tree: what
    /// lies behind adds nothing.
    pub fn nodes(self, num_segments: u8) -> impl Iterator<Item = Node> {
        let end = if self.end >= num_segments {
            SEGMENTS_PER_EXPERT
        } else {
            self.end
        };
        let mut begin = self.begin;
        std::iter::from_fn(move || {
            if begin >= end || begin >= num_segments {
                return None;
            }
            let mut len = 1;
            while begin.is_multiple_of(len * 2) && begin + len * 2 <= end {
                len *= 2;
            }
            let node = Node { begin, len };
            begin += len;
            Some(node)
        })
    }

    /// How many vectors a worker that holds this range returns per row.
    #[must_use]
    pub fn num_nodes(self, num_segments: u8) -> usize {
        self.nodes(num_segments).count()
    }
}

impl TryFrom<(u8, u8)> for SegmentRange {
    type Error = InvalidSegmentRange;

    fn try_from((begin, end): (u8, u8)) -> Result<Self, Self::Error> {
        Self::new(begin, end)
    }
}

impl From<SegmentRange> for (u8, u8) {
    fn from(range: SegmentRange) -> Self {
        (range.begin, range.end)
    }
}

impl fmt::Display for SegmentRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.begin, self.end)
    }
}

/// A subtree of the summation tree: `len` (a power of two) segments from `begin` (a multiple of `len`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// First segment of the subtree.
    pub begin: u8,
    /// Number of leaves below it: 1, 2, 4 or 8.
    pub len: u8,
}

impl Node {
    /// The root: the whole expert.
    pub const ROOT: Self = Self {
        begin: 0,
        len: SEGMENTS_PER_EXPERT,
    };

    /// The two halves of a node that is not a leaf.
    #[must_use]
    pub const fn halves(self) -> Option<(Self, Self)> {
        if self.len < 2 {
            return None;
        }
        let len = self.len / 2;
        Some((
            Self {
                begin: self.begin,
                len,
            },
            Self {
                begin: self.begin + len,
                len,
            },
        ))
    }
}

/// A contiguous part of one expert of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ExpertSlice {
    /// The layer.
    pub layer: LayerId,
    /// The expert in that layer.
    pub expert: ExpertId,
    /// Which part of it.
    pub range: SegmentRange,
}

impl fmt::Display for ExpertSlice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "layer {} expert {} segments {}",
            self.layer, self.expert, self.range
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(begin: u8, end: u8, num_segments: u8) -> Vec<(u8, u8)> {
        let range = SegmentRange::new(begin, end).unwrap();
        range
            .nodes(num_segments)
            .map(|n| (n.begin, n.len))
            .collect()
    }

    #[test]
    fn a_range_is_covered_by_its_largest_subtrees() {
        assert_eq!(nodes(0, 8, 8), [(0, 8)]);
        assert_eq!(nodes(0, 4, 8), [(0, 4)]);
        assert_eq!(nodes(4, 8, 8), [(4, 4)]);
        assert_eq!(nodes(0, 3, 8), [(0, 2), (2, 1)]);
        assert_eq!(nodes(3, 6, 8), [(3, 1), (4, 2)]);
        assert_eq!(nodes(1, 8, 8), [(1, 1), (2, 2), (4, 4)]);
    }

    #[test]
    fn segments_behind_the_last_column_count_as_the_end() {
        assert_eq!(nodes(0, 8, 3), [(0, 8)]);
        assert_eq!(nodes(0, 3, 3), [(0, 8)]);
        assert_eq!(nodes(2, 8, 3), [(2, 2)]);
        assert_eq!(nodes(4, 8, 3), []);
        assert_eq!(nodes(1, 2, 3), [(1, 1)]);
    }

    #[test]
    fn columns_are_cut_at_blocks_and_lose_nothing() {
        for ff in [1, 31, 32, 33, 96, 100, 384, 3584, 14336] {
            let mut next = 0;
            for segment in 0..SEGMENTS_PER_EXPERT {
                let columns = segment_columns(ff, segment);
                assert_eq!(columns.start, next.min(ff));
                assert_eq!(
                    columns.is_empty(),
                    segment >= num_segments(ff),
                    "ff {ff} segment {segment}"
                );
                next = columns.end;
            }
            assert_eq!(next, ff);
        }
    }

    #[test]
    fn a_mask_has_one_bit_per_segment() {
        assert_eq!(SegmentRange::WHOLE.mask(), 0xff);
        assert_eq!(SegmentRange::new(2, 5).unwrap().mask(), 0b1_1100);
        assert!(SegmentRange::new(3, 3).is_err());
        assert!(SegmentRange::new(0, 9).is_err());
    }
}
