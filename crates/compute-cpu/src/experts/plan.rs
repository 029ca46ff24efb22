//! What a call is to compute: jobs grouped by expert, and the segments that they need. Computes nothing.

use std::ops::Range;
use std::sync::Arc;

use tramontane_compute::ExpertJob;
use tramontane_compute::backend::job_output_len;
use tramontane_types::{ExpertId, SegmentRange};

use super::segment::Segment;
use crate::context::Context;
use crate::rows::GROUP_ROWS;

/// An entry that only fills a group of rows.
pub(crate) const NO_ROW: u32 = u32::MAX;

/// The jobs of one call, in the order of computation. Buffers are kept from call to call.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    /// Jobs by expert and range.
    order: Vec<usize>,
    /// Where each job's output begins.
    job_outs: Vec<usize>,
    pub(crate) groups: Vec<Group>,
    /// Row of each entry. An entry is one row of one job, in the order of the groups; entries of a group
    /// begin at a group of rows of the kernels, and those in between have [`NO_ROW`].
    pub(crate) entry_rows: Vec<u32>,
    /// Where the entry's vectors begin in the output.
    pub(crate) entry_outs: Vec<usize>,
    pub(crate) segments: Vec<Arc<Segment>>,
    pub(crate) gate_up_items: Vec<GateUpItem>,
}

/// Jobs of the same expert and range: their weights are read once.
#[derive(Debug)]
pub(crate) struct Group {
    expert: ExpertId,
    pub(crate) range: SegmentRange,
    /// A job of the group, for errors.
    job: usize,
    pub(crate) entries: Range<usize>,
    /// In [`Plan::segments`].
    pub(crate) segments: Range<usize>,
}

/// 32 `ff` columns of one segment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GateUpItem {
    pub(crate) group: usize,
    /// In [`Plan::segments`].
    pub(crate) segment: usize,
    /// Block of the segment's columns.
    pub(crate) block: usize,
}

impl Plan {
    /// Groups the jobs; returns the length of the output.
    pub(crate) fn arrange(&mut self, context: &Context, jobs: &[ExpertJob<'_>]) -> usize {
        let geometry = &context.geometry;
        let mut total = 0;
        self.job_outs.clear();
        for job in jobs {
            self.job_outs.push(total);
            total += job_output_len(geometry, job.range, job.row_ids.len());
        }
        self.order.clear();
        self.order.extend(0..jobs.len());
        self.order
            .sort_unstable_by_key(|&i| (jobs[i].expert, jobs[i].range, i));
        self.groups.clear();
        self.entry_rows.clear();
        self.entry_outs.clear();
        for i in 0..self.order.len() {
            let index = self.order[i];
            let job = &jobs[index];
            if job.row_ids.is_empty() {
                continue;
            }
            let begin = self.entries_begin(job);
            let width = job.range.num_nodes(geometry.num_segments()) * geometry.hidden;
            for (n, &row) in job.row_ids.iter().enumerate() {
                self.entry_rows.push(row);
                self.entry_outs.push(self.job_outs[index] + n * width);
            }
            self.add_to_group(index, job, begin);
        }
        total
    }

    /// Where the entries of the next job begin.
    fn entries_begin(&mut self, job: &ExpertJob<'_>) -> usize {
        let last = self.groups.last();
        if last.is_none_or(|last| (last.expert, last.range) != (job.expert, job.range)) {
            let begin = self.entry_rows.len().next_multiple_of(GROUP_ROWS);
            self.entry_rows.resize(begin, NO_ROW);
            self.entry_outs.resize(begin, 0);
        }
        self.entry_rows.len()
    }

    fn add_to_group(&mut self, index: usize, job: &ExpertJob<'_>, begin: usize) {
        let entries = begin..self.entry_rows.len();
        if let Some(last) = self.groups.last_mut()
            && (last.expert, last.range) == (job.expert, job.range)
        {
            last.entries.end = entries.end;
            return;
        }
        self.groups.push(Group {
            expert: job.expert,
            range: job.range,
            job: index,
            entries,
            segments: 0..0,
        });
    }

    /// Takes a share of every segment that the plan needs.
    ///
    /// # Errors
    /// With the index of a job whose segments `find` does not know.
    pub(crate) fn take_segments(
        &mut self,
        context: &Context,
        find: impl Fn(ExpertId, u8) -> Option<Arc<Segment>>,
    ) -> Result<(), usize> {
        let num_segments = context.geometry.num_segments();
        self.segments.clear();
        self.gate_up_items.clear();
        for (g, group) in self.groups.iter_mut().enumerate() {
            let begin = self.segments.len();
            for s in group.range.begin()..group.range.end().min(num_segments) {
                let segment = find(group.expert, s).ok_or(group.job)?;
                for block in 0..segment.down.blocks() {
                    self.gate_up_items.push(GateUpItem {
                        group: g,
                        segment: self.segments.len(),
                        block,
                    });
                }
                self.segments.push(segment);
            }
            group.segments = begin..self.segments.len();
        }
        Ok(())
    }
}
