//! Joins calls of one layer into one batch and takes its outputs apart again. Computes nothing.

use tramontane_compute::backend::job_output_len;
use tramontane_types::ModelGeometry;

use crate::{ExpertCall, Job};

/// Several calls as one batch.
#[derive(Debug)]
pub(crate) struct Merged {
    pub(crate) num_rows: usize,
    pub(crate) jobs: Vec<Job>,
    /// (call, job) in the order in which the merged jobs return their outputs.
    pub(crate) parts: Vec<(usize, usize)>,
}

/// One batch out of several calls: rows behind each other, jobs of the same slice joined.
pub(crate) fn merge(calls: &[&ExpertCall], rows: &mut Vec<u8>) -> Merged {
    rows.clear();
    let mut num_rows = 0;
    let mut first_row = Vec::with_capacity(calls.len());
    let mut parts = Vec::new();
    for (index, call) in calls.iter().enumerate() {
        first_row.push(num_rows as u32);
        num_rows += call.num_rows;
        rows.extend_from_slice(&call.rows);
        parts.extend((0..call.jobs.len()).map(|job| (index, job)));
    }
    parts.sort_by_key(|&(call, job)| {
        let job = &calls[call].jobs[job];
        (job.expert, job.range)
    });
    let mut jobs: Vec<Job> = Vec::new();
    for &(call, job) in &parts {
        let (job, first_row) = (&calls[call].jobs[job], first_row[call]);
        let row_ids = job.row_ids.iter().map(|row| row + first_row);
        match jobs.last_mut() {
            Some(last) if (last.expert, last.range) == (job.expert, job.range) => {
                last.row_ids.extend(row_ids);
            }
            _ => jobs.push(Job {
                row_ids: row_ids.collect(),
                ..*job
            }),
        }
    }
    Merged {
        num_rows,
        jobs,
        parts,
    }
}

/// Gives each call its part of the merged outputs.
pub(crate) fn split(
    calls: &[&ExpertCall],
    parts: &[(usize, usize)],
    merged: &[f32],
    geometry: &ModelGeometry,
) -> Vec<Vec<f32>> {
    let mut source_of: Vec<Vec<usize>> =
        calls.iter().map(|call| vec![0; call.jobs.len()]).collect();
    let mut offset = 0;
    for &(call, job) in parts {
        source_of[call][job] = offset;
        offset += len_of(geometry, &calls[call].jobs[job]);
    }
    let mut outputs = Vec::with_capacity(calls.len());
    for (call, sources) in calls.iter().zip(&source_of) {
        let mut out = Vec::new();
        for (job, &source) in call.jobs.iter().zip(sources) {
            out.extend_from_slice(&merged[source..source + len_of(geometry, job)]);
        }
        outputs.push(out);
    }
    outputs
}

/// Output values of a job.
pub(crate) fn len_of(geometry: &ModelGeometry, job: &Job) -> usize {
    job_output_len(geometry, job.range, job.row_ids.len())
}
