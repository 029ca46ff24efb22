//! What a rank of an island knows of it: which segments it computes, whom it exchanges sums with, and, at rank 0, how the
//! others hear of a step. Queues nothing but what ranks say to each other.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use tramontane_compute::{Error, StepBatch};
use tramontane_types::{SEGMENTS_PER_EXPERT, SegmentRange};

use super::abi::NodeParts;
use super::context::Context;
use crate::collective::Collective;
use crate::device::DeviceError;

/// One step as every rank computes it.
#[derive(Clone, Copy, Debug)]
pub struct RankStep<'a> {
    /// The rows.
    pub batch: &'a StepBatch,
    /// Pages of the KV cache that rank 0 has and the others lack, ascending: they are copied before the step.
    pub pages: &'a [Range<u32>],
}

/// How the ranks that follow hear of steps, at rank 0.
pub trait Lead: Send + Sync + fmt::Debug {
    /// Tells all ranks of a step, which begins now. `false`: not now, and nobody was told.
    ///
    /// # Errors
    /// When a rank is lost.
    fn begin(&self, epoch: u64, step: RankStep<'_>) -> Result<bool, DeviceError>;

    /// The step that was begun has ended; after an error the ranks do not compute together any more.
    fn end(&self, epoch: u64, result: Result<(), String>);
}

/// Ranks that compute together, seen from one of them. When it has failed there is another one at another epoch, or none.
#[derive(Clone, Debug)]
pub struct Island {
    epoch: u64,
    collective: Arc<dyn Collective>,
    /// At rank 0.
    lead: Option<Arc<dyn Lead>>,
}

/// The segments of every expert that a rank computes: contiguous, as even as possible, whole subtrees where the number of
/// ranks is a power of two. `None` for more ranks than segments, or a rank that is not one of them.
#[must_use]
pub fn rank_segments(rank: u32, num_ranks: u32) -> Option<SegmentRange> {
    let all = u32::from(SEGMENTS_PER_EXPERT);
    if rank >= num_ranks || num_ranks > all {
        return None;
    }
    let bound = |rank: u32| (rank * all / num_ranks) as u8;
    SegmentRange::new(bound(rank), bound(rank + 1)).ok()
}

impl Island {
    /// Ranks that are connected; `lead` at rank 0.
    ///
    /// # Errors
    /// When there are more ranks than an expert has segments.
    pub fn new(
        epoch: u64,
        collective: Arc<dyn Collective>,
        lead: Option<Arc<dyn Lead>>,
    ) -> Result<Self, Error> {
        let (rank, num_ranks) = (collective.rank(), collective.num_ranks());
        if rank_segments(rank, num_ranks).is_none() {
            return Err(Error::OutOfRange {
                what: "ranks of an island",
                limit: usize::from(SEGMENTS_PER_EXPERT) + 1,
                got: num_ranks as usize,
            });
        }
        Ok(Self {
            epoch,
            collective,
            lead,
        })
    }

    /// Counts the times that ranks came together.
    #[must_use]
    pub const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What the ranks exchange by.
    #[must_use]
    pub fn collective(&self) -> &Arc<dyn Collective> {
        &self.collective
    }

    /// The segments of this rank.
    #[must_use]
    pub fn segments(&self) -> SegmentRange {
        let own = rank_segments(self.collective.rank(), self.collective.num_ranks());
        own.unwrap_or(SegmentRange::WHOLE)
    }

    /// Whether every expert is complete on all ranks together, and they know of the step now.
    pub(super) fn begin(&self, step: RankStep<'_>) -> Result<bool, Error> {
        let Some(lead) = &self.lead else {
            return Ok(true);
        };
        lead.begin(self.epoch, step).map_err(lost)
    }

    /// Ends a step: a result counts when no rank has failed meanwhile. After an error the ranks part: those that are
    /// waited for must not be waited for any longer.
    pub(super) fn end(&self, result: Result<(), Error>) -> Result<(), Error> {
        let result = result.and_then(|()| self.collective.check().map_err(lost));
        if result.is_err() {
            self.part();
        }
        if let Some(lead) = &self.lead {
            lead.end(self.epoch, result.as_ref().map_err(describe).copied());
        }
        result
    }

    /// Ends what the ranks do together, here and for the others; returns at once. Any thread may do it.
    pub fn part(&self) {
        let collective = Arc::clone(&self.collective);
        // It may wait for graphs, which their owner gives back when its step has failed.
        let started = std::thread::Builder::new()
            .name("part".to_owned())
            .spawn(move || collective.abort());
        if let Err(error) = started {
            tracing::error!(%error, "no thread to end an island with");
        }
    }
}

/// The error and its cause.
fn describe(error: &Error) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// A rank is lost, or the device refuses.
fn lost(source: DeviceError) -> Error {
    Error::Library {
        operation: "computing a step with the ranks of an island",
        source: Box::new(source),
    }
}

/// Where the partial sums of all ranks lie: `[rank][node of the rank][slot]`, every rank with room for as many nodes.
#[derive(Clone, Debug)]
pub(super) struct Nodes {
    /// The segments of this rank's nodes, ascending.
    pub(super) own: Vec<SegmentRange>,
    pub(super) rank: usize,
    pub(super) num_ranks: usize,
    /// Most nodes of any rank.
    pub(super) most: usize,
    /// Length and place of every node, ascending.
    all: Vec<(u8, usize)>,
}

impl Nodes {
    pub(super) fn new(context: &Context, island: &Island) -> Self {
        let num_segments = context.geometry.num_segments();
        let num_ranks = island.collective.num_ranks();
        let nodes_of = |rank: u32| -> Vec<tramontane_types::Node> {
            let range = rank_segments(rank, num_ranks);
            range.map_or_else(Vec::new, |range| range.nodes(num_segments).collect())
        };
        let most = (0..num_ranks).map(|rank| nodes_of(rank).len()).max();
        let most = most.unwrap_or(1).max(1);
        let rank = island.collective.rank();
        let segments = |node: tramontane_types::Node| {
            SegmentRange::new(node.begin, node.begin + node.len).ok()
        };
        let all = (0..num_ranks).flat_map(|rank| {
            let nodes = nodes_of(rank).into_iter().enumerate();
            nodes.map(move |(i, node)| (node.len, rank as usize * most + i))
        });
        Self {
            own: nodes_of(rank).into_iter().filter_map(segments).collect(),
            rank: rank as usize,
            num_ranks: num_ranks as usize,
            most,
            all: all.collect(),
        }
    }

    /// Places of `slots` vectors each.
    pub(super) const fn places(&self) -> usize {
        self.num_ranks * self.most
    }

    /// For [`NodeParts`], when each place has `slots` vectors.
    pub(super) fn parts(&self, slots: usize) -> NodeParts {
        let mut parts = NodeParts {
            num_nodes: self.all.len() as u32,
            ..NodeParts::default()
        };
        for (i, (len, place)) in self.all.iter().enumerate() {
            parts.lens[i] = u32::from(*len);
            parts.begins[i] = (place * slots) as u64;
        }
        parts
    }
}

/// Pages of the KV cache by what ranks have of them.
#[derive(Debug, Default)]
pub(super) struct Behind {
    /// Written since the start, here.
    written: Vec<bool>,
    /// Written here, and not by the ranks that follow.
    lacking: Vec<bool>,
}

impl Behind {
    pub(super) fn new(num_pages: usize) -> Self {
        Self {
            written: vec![false; num_pages],
            lacking: vec![false; num_pages],
        }
    }

    /// Pages that a step writes; alone, or together with all ranks.
    pub(super) fn note(&mut self, pages: &[tramontane_types::PageId], is_alone: bool) {
        for page in pages {
            let page = page.0 as usize;
            if let (Some(written), Some(lacking)) =
                (self.written.get_mut(page), self.lacking.get_mut(page))
            {
                *written = true;
                *lacking |= is_alone;
            }
        }
    }

    /// The ranks that follow have nothing.
    pub(super) fn all(&mut self) {
        self.lacking.clone_from(&self.written);
    }

    /// The ranks that follow have everything.
    pub(super) fn none(&mut self) {
        self.lacking.fill(false);
    }

    /// What is lacking, as ranges.
    pub(super) fn runs(&self) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for (page, _) in self.lacking.iter().enumerate().filter(|(_, lacks)| **lacks) {
            let page = page as u32;
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += 1,
                _ => runs.push(page..page + 1),
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use tramontane_types::PageId;

    use super::*;

    #[test]
    fn ranks_share_all_segments_and_powers_of_two_have_one_subtree_each() {
        for num_ranks in 1..=8 {
            let ranges: Vec<_> = (0..num_ranks)
                .map(|rank| rank_segments(rank, num_ranks).unwrap())
                .collect();
            assert_eq!((ranges[0].begin(), ranges[ranges.len() - 1].end()), (0, 8));
            assert!(
                ranges
                    .windows(2)
                    .all(|pair| pair[0].end() == pair[1].begin())
            );
            let nodes: Vec<usize> = ranges.iter().map(|range| range.num_nodes(8)).collect();
            assert!(nodes.iter().all(|&n| n <= 2), "{num_ranks}: {nodes:?}");
            if num_ranks.is_power_of_two() {
                assert!(nodes.iter().all(|&n| n == 1), "{num_ranks}: {nodes:?}");
            }
        }
        assert_eq!(rank_segments(2, 2), None);
        assert_eq!(rank_segments(0, 9), None);
    }

    #[test]
    fn pages_are_lacking_until_they_are_copied_and_all_are_for_newcomers() {
        let page = |n: u32| PageId(n);
        let mut behind = Behind::new(8);
        behind.note(&[page(1), page(2), page(6)], true);
        behind.note(&[page(3)], false);
        assert_eq!(behind.runs(), [1..3, 6..7]);
        behind.none();
        assert_eq!(behind.runs(), []);
        behind.all();
        assert_eq!(behind.runs(), [1..4, 6..7]);
    }
}
