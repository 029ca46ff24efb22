//! What came back for one layer, and where each vector of it lies. Adds nothing itself.

use bytes::Bytes;
use tramontane_compute::{Contributions, ExpertSum, Piece, RoutedRows, backend::job_output_len};
use tramontane_types::{ExpertId, ModelGeometry};

use crate::{Job, Reply};

/// Which experts each row of the step chose, and with what weight.
#[derive(Debug)]
pub(crate) struct Routing {
    top_k: usize,
    ids: Vec<ExpertId>,
    weights: Vec<f32>,
}

impl Routing {
    pub(crate) fn new(routed: &RoutedRows, top_k: usize) -> Self {
        let (ids, weights) = (routed.topk_ids.clone(), routed.topk_weights.clone());
        Self {
            top_k,
            ids,
            weights,
        }
    }

    /// Index of (row, expert) among all choices: rows ascending, experts ascending.
    fn choice(&self, row: u32, expert: ExpertId) -> Option<u32> {
        let begin = row as usize * self.top_k;
        let of_row = self.ids.get(begin..begin + self.top_k)?;
        let place = of_row.iter().position(|&id| id == expert)?;
        u32::try_from(begin + place).ok()
    }
}

/// Answered jobs and their output vectors: job after job, row after row, node after node.
#[derive(Debug)]
pub(crate) struct Answer {
    jobs: Vec<Job>,
    values: Values,
}

#[derive(Debug)]
enum Values {
    Owned(Vec<f32>),
    /// Aligned for f32.
    Received(Bytes),
}

impl Answer {
    pub(crate) const fn local(jobs: Vec<Job>, values: Vec<f32>) -> Self {
        Self {
            jobs,
            values: Values::Owned(values),
        }
    }

    /// The answer of another worker; `reply` has [`outputs_len`] bytes. Copies only what came unaligned.
    pub(crate) fn remote(jobs: Vec<Job>, reply: Reply) -> Self {
        let bytes = reply.outputs;
        if bytemuck::try_cast_slice::<u8, f32>(&bytes).is_ok() {
            return Self {
                jobs,
                values: Values::Received(bytes),
            };
        }
        let mut values = vec![0.0_f32; bytes.len() / size_of::<f32>()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(&bytes);
        Self {
            jobs,
            values: Values::Owned(values),
        }
    }

    fn values(&self) -> &[f32] {
        match &self.values {
            Values::Owned(values) => values,
            Values::Received(bytes) => bytemuck::try_cast_slice(bytes).unwrap_or_default(),
        }
    }
}

/// Bytes that a worker returns for `jobs`.
pub(crate) fn outputs_len(geometry: &ModelGeometry, jobs: &[Job]) -> usize {
    let floats = |job: &Job| job_output_len(geometry, job.range, job.row_ids.len());
    jobs.iter().map(floats).sum::<usize>() * size_of::<f32>()
}

/// Calls `add` once with everything that was answered, sorted by row, expert and node.
pub(crate) fn contribute<T>(
    geometry: &ModelGeometry,
    routing: &Routing,
    answers: &[Answer],
    add: impl FnOnce(&Contributions<'_>) -> T,
) -> T {
    let buffers: Vec<&[f32]> = answers.iter().map(Answer::values).collect();
    let found = locate(geometry, routing, answers);
    let mut pieces = Vec::with_capacity(found.len());
    let mut sums: Vec<ExpertSum> = Vec::with_capacity(routing.ids.len());
    let mut last = None;
    for (choice, piece) in found {
        let index = pieces.len() as u32;
        pieces.push(piece);
        match sums.last_mut() {
            Some(sum) if last == Some(choice) => sum.pieces.end = index + 1,
            _ => {
                let row = choice / routing.top_k as u32;
                let weight = routing
                    .weights
                    .get(choice as usize)
                    .copied()
                    .unwrap_or_default();
                sums.push(ExpertSum {
                    row,
                    weight,
                    pieces: index..index + 1,
                });
            }
        }
        last = Some(choice);
    }
    add(&Contributions {
        buffers: &buffers,
        pieces: &pieces,
        sums: &sums,
        num_segments: geometry.num_segments(),
    })
}

/// Every vector of every answer with the choice it belongs to, sorted by choice, then node.
fn locate(geometry: &ModelGeometry, routing: &Routing, answers: &[Answer]) -> Vec<(u32, Piece)> {
    let mut found = Vec::with_capacity(routing.ids.len());
    for (buffer, answer) in answers.iter().enumerate() {
        let mut offset = 0;
        for job in &answer.jobs {
            for &row in &job.row_ids {
                let choice = routing.choice(row, job.expert);
                debug_assert!(
                    choice.is_some(),
                    "row {row} did not choose expert {}",
                    job.expert
                );
                for node in job.range.nodes(geometry.num_segments()) {
                    if let Some(choice) = choice {
                        found.push((
                            choice,
                            Piece {
                                node,
                                buffer: buffer as u32,
                                offset,
                            },
                        ));
                    }
                    offset += geometry.hidden;
                }
            }
        }
    }
    found.sort_unstable_by_key(|(choice, piece)| (*choice, piece.node.begin));
    found
}
