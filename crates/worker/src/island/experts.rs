//! The experts of an island as one store: every rank has its segments, and a call is answered by all of them. Whole steps
//! do not come here.

use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use tramontane_compute::{Error, ExpertJob, ExpertWeights, Experts, RowFormat};
use tramontane_proto::v1::{self, lead_message::Kind};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, ModelGeometry, Node, SegmentRange};

use super::hub::{Hub, Part, Pending};
use super::{CALL_MAX, LOAD_MAX, PAIRS_MAX, index_of, overlap};

/// The leader's experts and those of its ranks.
#[derive(Debug)]
pub(crate) struct IslandExperts {
    hub: Arc<Hub>,
    /// The leader's own.
    inner: Arc<dyn Experts>,
    geometry: ModelGeometry,
    row_bytes: usize,
}

/// Why a rank did not do its part.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct RankFailed(String);

fn rank_failed(why: String) -> Error {
    Error::Library {
        operation: "loading a slice on a rank of the island",
        source: Box::new(RankFailed(why)),
    }
}

/// Some pairs of a call, whose rows lie in order of the pairs.
struct Pass<'a> {
    layer: LayerId,
    rows: Bytes,
    /// Expert and segments of each job, and its rows.
    jobs: Vec<(&'a ExpertJob<'a>, Range<u32>)>,
}

/// What one rank returned for a pass, by job; `None` where the rank has no part in it.
struct Answered {
    ranges: Vec<Option<SegmentRange>>,
    outputs: Vec<f32>,
}

impl IslandExperts {
    pub(crate) fn new(hub: Arc<Hub>, inner: Arc<dyn Experts>, row_format: RowFormat) -> Self {
        let geometry = hub.geometry().clone();
        Self {
            row_bytes: row_format.row_bytes(geometry.hidden),
            hub,
            inner,
            geometry,
        }
    }

    /// Cuts jobs into passes, and copies the rows of each.
    fn passes<'a>(&self, layer: LayerId, rows: &[u8], jobs: &'a [ExpertJob<'a>]) -> Vec<Pass<'a>> {
        let mut passes = Vec::new();
        let (mut bytes, mut some, mut pairs) = (Vec::new(), Vec::new(), 0_u32);
        for job in jobs {
            let mut left = job.row_ids;
            // A job without rows has no outputs.
            while !left.is_empty() {
                let room = PAIRS_MAX - pairs as usize;
                let (now, later) = left.split_at(left.len().min(room));
                for &row in now {
                    let at = row as usize * self.row_bytes;
                    bytes.extend_from_slice(&rows[at..at + self.row_bytes]);
                }
                let end = pairs + now.len() as u32;
                some.push((job, pairs..end));
                (left, pairs) = (later, end);
                if pairs as usize == PAIRS_MAX {
                    let (rows, jobs) = (std::mem::take(&mut bytes), std::mem::take(&mut some));
                    passes.push(Pass {
                        layer,
                        rows: rows.into(),
                        jobs,
                    });
                    pairs = 0;
                }
            }
        }
        if !some.is_empty() {
            passes.push(Pass {
                layer,
                rows: bytes.into(),
                jobs: some,
            });
        }
        passes
    }

    /// Appends what a pass gives.
    fn pass(
        &self,
        pass: &Pass<'_>,
        own: SegmentRange,
        parts: &[Part],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let asked: Vec<Option<Pending>> = parts.iter().map(|part| self.ask(pass, part)).collect();
        let mut answered = vec![self.compute_own(pass, own)?];
        for (part, pending) in parts.iter().zip(&asked) {
            let ranges = pass.ranges(part.segments);
            let outputs = match pending {
                None => Vec::new(),
                Some(pending) => {
                    let said = self.hub.wait(pending, CALL_MAX);
                    let said = said.and_then(|bytes| self.floats(pass, &ranges, &bytes));
                    said.map_err(|why| Self::lost(pass, part.segments, &why))?
                }
            };
            answered.push(Answered { ranges, outputs });
        }
        self.merge(pass, &answered, out);
        Ok(())
    }

    fn ask(&self, pass: &Pass<'_>, part: &Part) -> Option<Pending> {
        let jobs: Vec<v1::ExpertJob> = pass
            .jobs_in(part.segments)
            .map(|(expert, range, rows)| v1::ExpertJob {
                expert: expert.0.into(),
                segment_begin: range.begin().into(),
                segment_end: range.end().into(),
                row_ids: rows.collect(),
            })
            .collect();
        (!jobs.is_empty()).then(|| {
            self.hub.call(part, |call_id| {
                Kind::Call(v1::ExpertCall {
                    call_id,
                    epoch: 0,
                    layer: pass.layer.0.into(),
                    num_rows: pass.num_rows(),
                    rows: pass.rows.clone(),
                    jobs,
                })
            })
        })
    }

    fn compute_own(&self, pass: &Pass<'_>, own: SegmentRange) -> Result<Answered, Error> {
        let row_ids: Vec<u32> = (0..pass.num_rows()).collect();
        let jobs: Vec<ExpertJob<'_>> = pass
            .jobs_in(own)
            .map(|(expert, range, rows)| ExpertJob {
                expert,
                range,
                row_ids: &row_ids[rows.start as usize..rows.end as usize],
            })
            .collect();
        let (ranges, mut outputs) = (pass.ranges(own), Vec::new());
        if !jobs.is_empty() {
            let num_rows = row_ids.len();
            let (layer, rows) = (pass.layer, &pass.rows);
            self.inner
                .compute(layer, rows, num_rows, &jobs, &mut outputs)?;
        }
        Ok(Answered { ranges, outputs })
    }

    /// The numbers of an answer of the right length.
    fn floats(
        &self,
        pass: &Pass<'_>,
        ranges: &[Option<SegmentRange>],
        bytes: &[u8],
    ) -> Result<Vec<f32>, String> {
        let num_segments = self.geometry.num_segments();
        let vectors = pass.jobs.iter().zip(ranges).map(|((_, rows), range)| {
            range.map_or(0, |range| rows.len() * range.num_nodes(num_segments))
        });
        let expected = vectors.sum::<usize>() * self.geometry.hidden * size_of::<f32>();
        if bytes.len() != expected {
            let got = bytes.len();
            return Err(format!("a rank returned {got} bytes, expected {expected}"));
        }
        let words = bytes.as_chunks::<4>().0.iter();
        Ok(words.map(|word| f32::from_le_bytes(*word)).collect())
    }

    /// What a rank does not compute is not held here: it may be asked elsewhere.
    fn lost(pass: &Pass<'_>, segments: SegmentRange, why: &str) -> Error {
        tracing::warn!(layer = %pass.layer, %segments, why, "a rank did not do its part of a call");
        let first = pass.jobs_in(segments).next();
        let (expert, range) = first.map_or((ExpertId(0), segments), |(e, range, _)| (e, range));
        Error::NotHeld {
            slice: ExpertSlice {
                layer: pass.layer,
                expert,
                range,
            },
        }
    }

    /// Sums the ranks' nodes to those of the jobs, as one device would have.
    fn merge(&self, pass: &Pass<'_>, answered: &[Answered], out: &mut Vec<f32>) {
        let (hidden, num_segments) = (self.geometry.hidden, self.geometry.num_segments());
        let mut at = vec![0; answered.len()];
        for (i, (job, rows)) in pass.jobs.iter().enumerate() {
            for _ in rows.clone() {
                let mut pieces: Vec<(Node, &[f32])> = Vec::new();
                for (answered, at) in answered.iter().zip(&mut at) {
                    let nodes = answered.ranges[i].into_iter();
                    for node in nodes.flat_map(|range| range.nodes(num_segments)) {
                        pieces.push((node, &answered.outputs[*at..*at + hidden]));
                        *at += hidden;
                    }
                }
                for node in job.range.nodes(num_segments) {
                    // All ranks together have all segments: there is a sum.
                    out.extend(sum_of(node, &pieces, num_segments).unwrap_or_default());
                }
            }
        }
    }
}

/// The sum of a node from pieces below it: see ADR 1.
fn sum_of(node: Node, pieces: &[(Node, &[f32])], num_segments: u8) -> Option<Vec<f32>> {
    if let Some((_, vector)) = pieces.iter().find(|(other, _)| *other == node) {
        return Some(vector.to_vec());
    }
    let (left, right) = node.halves()?;
    let mut sum = sum_of(left, pieces, num_segments)?;
    if right.begin < num_segments {
        for (a, b) in sum.iter_mut().zip(sum_of(right, pieces, num_segments)?) {
            *a += b;
        }
    }
    Some(sum)
}

impl Pass<'_> {
    fn num_rows(&self) -> u32 {
        self.jobs.last().map_or(0, |(_, rows)| rows.end)
    }

    /// Of each job what lies in these segments.
    fn ranges(&self, segments: SegmentRange) -> Vec<Option<SegmentRange>> {
        let jobs = self.jobs.iter();
        jobs.map(|(job, _)| overlap(job.range, segments)).collect()
    }

    fn jobs_in(
        &self,
        segments: SegmentRange,
    ) -> impl Iterator<Item = (ExpertId, SegmentRange, Range<u32>)> {
        let jobs = self.jobs.iter();
        jobs.filter_map(move |(job, rows)| {
            Some((job.expert, overlap(job.range, segments)?, rows.clone()))
        })
    }
}

impl Experts for IslandExperts {
    fn load(&self, slice: ExpertSlice, weights: &ExpertWeights<'_>) -> Result<(), Error> {
        let parts = self.hub.parts();
        let (own, parts) =
            parts.ok_or_else(|| rank_failed("the ranks come together just now".to_owned()))?;
        let mut asked = Vec::new();
        for part in &parts {
            let Some(range) = overlap(slice.range, part.segments) else {
                continue;
            };
            let pending = self.hub.call(part, |call_id| {
                Kind::Load(v1::IslandLoad {
                    call_id,
                    layer: slice.layer.0.into(),
                    expert: slice.expert.0.into(),
                    segment_begin: range.begin().into(),
                    segment_end: range.end().into(),
                })
            });
            asked.push((part, ExpertSlice { range, ..slice }, pending));
        }
        if let Some(range) = overlap(slice.range, own) {
            self.inner.load(ExpertSlice { range, ..slice }, weights)?;
        }
        for (part, slice, pending) in asked {
            self.hub.wait(&pending, LOAD_MAX).map_err(rank_failed)?;
            self.hub.note_loaded(part, slice);
        }
        Ok(())
    }

    fn unload(&self, slice: ExpertSlice) {
        self.hub.unload(slice);
        self.inner.unload(slice);
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        let index = index_of(&self.geometry, layer, expert);
        self.inner.held(layer, expert) | self.hub.held_elsewhere(index)
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let check = tramontane_compute::error::check_size;
        check(
            "bytes of expert rows",
            num_rows * self.row_bytes,
            rows.len(),
        )?;
        let parts = self.hub.parts();
        for job in jobs {
            for &row in job.row_ids {
                tramontane_compute::error::check_index("row", num_rows, row as usize)?;
            }
            let mask = job.range.mask();
            if parts.is_none() || self.held(layer, job.expert) & mask != mask {
                return Err(Error::NotHeld {
                    slice: ExpertSlice {
                        layer,
                        expert: job.expert,
                        range: job.range,
                    },
                });
            }
        }
        out.clear();
        let Some((own, parts)) = parts else {
            return Ok(());
        };
        if parts.is_empty() {
            return self.inner.compute(layer, rows, num_rows, jobs, out);
        }
        for pass in self.passes(layer, rows, jobs) {
            self.pass(&pass, own, &parts, out)?;
        }
        Ok(())
    }

    fn on_device(&self) -> Option<&dyn Any> {
        self.inner.on_device()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sum of a subtree of leaves whose sums differ with the order in which they are taken.
    fn whole(node: Node, num_segments: u8) -> Option<f32> {
        let Some((left, right)) = node.halves() else {
            let leaf = f32::from(node.begin) * 1.7;
            return (node.begin < num_segments)
                .then(|| leaf.sin() * 10_f32.powi(node.begin.into()));
        };
        let left = whole(left, num_segments)?;
        Some(whole(right, num_segments).map_or(left, |right| left + right))
    }

    #[test]
    fn nodes_of_all_ranks_sum_to_the_nodes_of_any_job() {
        for num_segments in 1..=8 {
            for num_ranks in 1..=8 {
                for (begin, end) in [(0, 8), (0, 3), (1, 6), (2, 8), (4, 5)] {
                    let job = SegmentRange::new(begin, end).unwrap();
                    let ranks = (0..num_ranks)
                        .filter_map(|rank| tramontane_compute_cuda::rank_segments(rank, num_ranks))
                        .filter_map(|segments| overlap(job, segments));
                    let nodes: Vec<Node> = ranks.flat_map(|r| r.nodes(num_segments)).collect();
                    let vectors: Vec<[f32; 1]> = nodes
                        .iter()
                        .map(|node| [whole(*node, num_segments).unwrap()])
                        .collect();
                    let pieces: Vec<(Node, &[f32])> = nodes
                        .iter()
                        .copied()
                        .zip(vectors.iter().map(|v| &v[..]))
                        .collect();
                    for node in job.nodes(num_segments) {
                        let got = sum_of(node, &pieces, num_segments).unwrap();
                        let expected = whole(node, num_segments).unwrap();
                        assert_eq!(got[0].to_bits(), expected.to_bits(), "{node:?}");
                    }
                }
            }
        }
    }
}
