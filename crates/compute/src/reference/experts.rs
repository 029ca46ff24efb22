//! Expert slices, row by row and segment by segment, summed along the tree.

use std::sync::{Arc, PoisonError, RwLock};

use tramontane_types::{
    ExpertId, ExpertSlice, LayerId, ModelGeometry, Node, SEGMENTS_PER_EXPERT, slice,
};

use super::ops::{Linear, check_tensor, silu};
use crate::error::{check_index, check_size};
use crate::{Error, ExpertJob, ExpertWeights, Experts, HostTensor};

/// One expert: its loaded segments.
type Segments = [Option<Arc<Segment>>; SEGMENTS_PER_EXPERT as usize];

#[derive(Debug)]
pub(super) struct ReferenceExperts {
    geometry: Arc<ModelGeometry>,
    /// `[num_layers * num_experts]`.
    experts: RwLock<Vec<Segments>>,
}

/// Some columns of an expert's intermediate dimension.
#[derive(Debug)]
struct Segment {
    /// `[len, hidden]`.
    w1: Linear,
    /// `[hidden, len]`.
    w2: Linear,
    /// `[len, hidden]`.
    w3: Linear,
}

impl Segment {
    fn load(g: &ModelGeometry, segment: u8, weights: &ExpertWeights<'_>) -> Result<Self, Error> {
        let columns = slice::segment_columns(g.ff, segment);
        let len = columns.len();
        let rows = |tensor: &HostTensor<'_>| {
            let mut values = vec![0.0; len * g.hidden];
            for (row, values) in columns.clone().zip(values.chunks_exact_mut(g.hidden)) {
                tensor.read_row(row, 0, values);
            }
            Linear::from_values(values, len, g.hidden)
        };
        let mut down = vec![0.0; g.hidden * len];
        for (row, values) in down.chunks_exact_mut(len).enumerate() {
            weights.w2.read_row(row, columns.start, values);
        }
        Ok(Self {
            w1: rows(&weights.w1)?,
            w2: Linear::from_values(down, g.hidden, len)?,
            w3: rows(&weights.w3)?,
        })
    }

    /// `w2 (silu(w1 x) * (w3 x))`.
    fn apply(&self, x: &[f32]) -> Result<Vec<f32>, Error> {
        let (gate, up) = (self.w1.apply(x)?, self.w3.apply(x)?);
        let hidden = gate.iter().zip(up).map(|(gate, up)| silu(*gate) * up);
        self.w2.apply(&hidden.collect::<Vec<f32>>())
    }
}

impl ReferenceExperts {
    pub(super) fn new(geometry: Arc<ModelGeometry>) -> Self {
        let num_experts = geometry.num_layers * geometry.num_experts;
        Self {
            geometry,
            experts: RwLock::new(vec![Segments::default(); num_experts]),
        }
    }

    fn index(&self, layer: LayerId, expert: ExpertId) -> Result<usize, Error> {
        let g = &self.geometry;
        let (layer, expert) = (usize::from(layer.0), usize::from(expert.0));
        check_index("layer", g.num_layers, layer)?;
        check_index("expert", g.num_experts, expert)?;
        Ok(layer * g.num_experts + expert)
    }

    fn segments(&self, index: usize) -> Segments {
        let experts = self.experts.read().unwrap_or_else(PoisonError::into_inner);
        experts[index].clone()
    }

    /// Sum of a node's segments: of its halves, or the segment itself; `None` behind the last column.
    fn node(&self, node: Node, segments: &Segments, x: &[f32]) -> Result<Option<Vec<f32>>, Error> {
        if node.begin >= self.geometry.num_segments() {
            return Ok(None);
        }
        let Some((left, right)) = node.halves() else {
            let segment = segments[usize::from(node.begin)].as_ref();
            return segment.map(|s| s.apply(x)).transpose();
        };
        let left = self.node(left, segments, x)?;
        let right = self.node(right, segments, x)?;
        Ok(match (left, right) {
            (Some(left), Some(right)) => Some(left.iter().zip(right).map(|(a, b)| a + b).collect()),
            // An empty right half adds nothing.
            (left, _) => left,
        })
    }

    /// One bit per segment that is loaded, or empty.
    fn mask(&self, segments: &Segments) -> u8 {
        let num_segments = usize::from(self.geometry.num_segments());
        let held = segments.iter().enumerate();
        let held = held.filter(|(i, segment)| *i >= num_segments || segment.is_some());
        held.fold(0, |mask, (i, _)| mask | 1 << i)
    }
}

impl Experts for ReferenceExperts {
    fn load(&self, slice: ExpertSlice, weights: &ExpertWeights<'_>) -> Result<(), Error> {
        let g = &self.geometry;
        let index = self.index(slice.layer, slice.expert)?;
        check_tensor("w1", &weights.w1, g.ff, g.hidden)?;
        check_tensor("w2", &weights.w2, g.hidden, g.ff)?;
        check_tensor("w3", &weights.w3, g.ff, g.hidden)?;
        let held = self.segments(index);
        let end = slice.range.end().min(g.num_segments());
        let mut loaded = Vec::new();
        for segment in slice.range.begin()..end {
            if held[usize::from(segment)].is_none() {
                loaded.push((segment, Arc::new(Segment::load(g, segment, weights)?)));
            }
        }
        let mut experts = self.experts.write().unwrap_or_else(PoisonError::into_inner);
        for (segment, weights) in loaded {
            experts[index][usize::from(segment)].get_or_insert(weights);
        }
        Ok(())
    }

    fn unload(&self, slice: ExpertSlice) {
        let Ok(index) = self.index(slice.layer, slice.expert) else {
            return;
        };
        let mut experts = self.experts.write().unwrap_or_else(PoisonError::into_inner);
        for segment in slice.range.begin()..slice.range.end() {
            experts[index][usize::from(segment)] = None;
        }
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        let Ok(index) = self.index(layer, expert) else {
            return 0;
        };
        self.mask(&self.segments(index))
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let g = &self.geometry;
        out.clear();
        check_size(
            "bytes of rows",
            num_rows * g.hidden * size_of::<f32>(),
            rows.len(),
        )?;
        for job in jobs {
            let segments = self.segments(self.index(layer, job.expert)?);
            if self.mask(&segments) & job.range.mask() != job.range.mask() {
                let slice = ExpertSlice {
                    layer,
                    expert: job.expert,
                    range: job.range,
                };
                return Err(Error::NotHeld { slice });
            }
            for &row in job.row_ids {
                check_index("row", num_rows, row as usize)?;
                let row_bytes = g.hidden * size_of::<f32>();
                let row = &rows[row as usize * row_bytes..][..row_bytes];
                let values = row.chunks_exact(4);
                let x: Vec<f32> = values
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect();
                for node in job.range.nodes(g.num_segments()) {
                    out.extend(self.node(node, &segments, &x)?.unwrap_or_default());
                }
            }
        }
        Ok(())
    }
}
