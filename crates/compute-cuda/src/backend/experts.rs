//! Expert slices on the device, segment by segment, and calls of other workers for them. Keeps nothing of a call but its memory.

use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use tramontane_compute::error::{check_index, check_size};
use tramontane_compute::{Error, ExpertJob, ExpertWeights, Experts, RowFormat};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, SEGMENTS_PER_EXPERT, SegmentRange, slice};

use super::abi::ExpertEntry;
use super::call::Call;
use super::context::{Context, Part, check_tensor, failed};
use super::format::{Source, gate_up_rows};
use crate::device::{Buffer, Stream};

/// One segment on the device.
#[derive(Debug)]
struct Segment {
    buffer: Buffer,
    layout: SegmentLayout,
}

/// What a segment's buffer has where: gate and up rows woven, then the down columns, then the scales of both, if the format
/// has such.
#[derive(Clone, Copy, Debug)]
struct SegmentLayout {
    down_at: usize,
    gate_up_scales_at: usize,
    down_scales_at: usize,
    bytes: usize,
}

impl SegmentLayout {
    /// Of a segment of `len` columns of ff.
    fn new(context: &Context, len: usize) -> Self {
        let (packing, hidden) = (context.formats.experts, context.geometry.hidden);
        let down_at = packing.part_bytes(gate_up_rows(len), hidden);
        let gate_up_scales_at = down_at + packing.part_bytes(hidden, len);
        let down_scales_at = gate_up_scales_at + packing.scales_bytes(gate_up_rows(len));
        Self {
            down_at,
            gate_up_scales_at,
            down_scales_at,
            bytes: down_scales_at + packing.scales_bytes(hidden),
        }
    }
}

/// The store of slices.
pub(crate) struct CudaExperts {
    context: Arc<Context>,
    held: RwLock<Held>,
    /// The memory of the running call, from the first one on; calls take turns.
    call: Mutex<Option<Call>>,
}

/// What is loaded. Whoever computes holds it for reading until the device has finished.
pub(super) struct Held {
    /// `[layer][expert][segment]`.
    segments: Vec<Option<Segment>>,
    /// From the first load on.
    table: Option<Table>,
}

/// Addresses of the segments for the kernels.
struct Table {
    /// `[layer][expert]` of [`ExpertEntry`].
    entries: Buffer,
    stream: Stream,
}

impl Table {
    fn new(context: &Context) -> Result<Self, Error> {
        let num_experts = context.geometry.num_layers * context.geometry.num_experts;
        let nothing = vec![ExpertEntry::default(); num_experts];
        Ok(Self {
            entries: context.upload(bytemuck::cast_slice(&nothing))?,
            stream: context.stream()?,
        })
    }
}

impl fmt::Debug for CudaExperts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.held.read().segments.iter().flatten().count();
        f.debug_struct("CudaExperts")
            .field("segments_held", &held)
            .finish_non_exhaustive()
    }
}

/// Bytes of one full segment on the device.
pub(super) fn segment_bytes(context: &Context) -> usize {
    SegmentLayout::new(context, slice::segment_len(context.geometry.ff)).bytes
}

impl CudaExperts {
    /// Takes no memory of the device yet.
    pub(super) fn new(context: Arc<Context>) -> Self {
        let geometry = &context.geometry;
        let slots = geometry.num_layers * geometry.num_experts * usize::from(SEGMENTS_PER_EXPERT);
        Self {
            held: RwLock::new(Held {
                segments: (0..slots).map(|_| None).collect(),
                table: None,
            }),
            call: Mutex::new(None),
            context,
        }
    }

    pub(super) fn context(&self) -> &Arc<Context> {
        &self.context
    }

    /// What is loaded, kept as it is as long as the result lives.
    pub(super) fn hold(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read()
    }

    /// Where the segments of an expert begin.
    fn slot(&self, layer: LayerId, expert: ExpertId) -> Result<usize, Error> {
        let geometry = &self.context.geometry;
        check_index("layer", geometry.num_layers, usize::from(layer.0))?;
        check_index("expert", geometry.num_experts, usize::from(expert.0))?;
        let index = usize::from(layer.0) * geometry.num_experts + usize::from(expert.0);
        Ok(index * usize::from(SEGMENTS_PER_EXPERT))
    }

    /// The non-empty segments of a slice.
    fn segments_of(&self, range: SegmentRange) -> Range<u8> {
        let end = range.end().min(self.context.geometry.num_segments());
        range.begin().min(end)..end
    }

    /// Loads every segment of every expert with `fill` instead of a checkpoint's weights: it is told where scales begin.
    pub(super) fn load_all(
        &self,
        fill: &mut dyn FnMut(&Buffer, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let geometry = &self.context.geometry;
        // A value, not a guard: `insert` below writes.
        let num_slots = self.held.read().segments.len();
        for slot in (0..num_slots).step_by(usize::from(SEGMENTS_PER_EXPERT)) {
            for segment in 0..geometry.num_segments() {
                let columns = slice::segment_columns(geometry.ff, segment);
                let empty = self.empty(columns.len())?;
                fill(&empty.buffer, empty.layout.gate_up_scales_at)?;
                self.insert(slot, vec![(slot + usize::from(segment), empty)])?;
            }
        }
        Ok(())
    }

    /// Room for a segment of `len` columns of ff.
    fn empty(&self, len: usize) -> Result<Segment, Error> {
        let layout = SegmentLayout::new(&self.context, len);
        let buffer = self.context.buffer(layout.bytes)?;
        Ok(Segment { buffer, layout })
    }

    /// Makes segments of one expert known.
    fn insert(&self, slot: usize, segments: Vec<(usize, Segment)>) -> Result<(), Error> {
        let mut held = self.held.write();
        if held.table.is_none() {
            held.table = Some(Table::new(&self.context)?);
        }
        for (at, segment) in segments {
            held.segments[at].get_or_insert(segment);
        }
        held.publish(slot)
    }

    fn pack(&self, columns: Range<usize>, weights: &ExpertWeights<'_>) -> Result<Segment, Error> {
        let (context, hidden) = (&*self.context, self.context.geometry.hidden);
        let packing = context.formats.experts;
        let len = columns.len();
        let segment = self.empty(len)?;
        let Segment { buffer, layout } = &segment;
        let rows = |tensor| Source {
            tensors: std::slice::from_ref(tensor),
            row_begin: columns.start,
            col_begin: 0,
        };
        context.pack(&Part {
            packing,
            out: buffer.address(),
            scales: buffer.at(layout.gate_up_scales_at),
            rows: len,
            cols: hidden,
            gate_or_plain: rows(&weights.w1),
            up: Some(rows(&weights.w3)),
        })?;
        context.pack(&Part {
            packing,
            out: buffer.at(layout.down_at),
            scales: buffer.at(layout.down_scales_at),
            rows: hidden,
            cols: len,
            gate_or_plain: Source {
                tensors: std::slice::from_ref(&weights.w2),
                row_begin: 0,
                col_begin: columns.start,
            },
            up: None,
        })?;
        Ok(segment)
    }

    fn check_job(&self, held: &Held, layer: LayerId, job: &ExpertJob<'_>) -> Result<(), Error> {
        let slot = self.slot(layer, job.expert)?;
        for segment in self.segments_of(job.range) {
            if held.segments[slot + usize::from(segment)].is_none() {
                return Err(Error::NotHeld {
                    slice: ExpertSlice {
                        layer,
                        expert: job.expert,
                        range: job.range,
                    },
                });
            }
        }
        Ok(())
    }
}

impl Held {
    /// Whether these segments of all experts are here, as far as they have columns.
    pub(super) fn has_all(&self, range: SegmentRange, num_segments: u8) -> bool {
        let end = range.end().min(num_segments);
        let range = usize::from(range.begin().min(end))..usize::from(end);
        let experts = self.segments.chunks_exact(usize::from(SEGMENTS_PER_EXPERT));
        let is_here =
            |expert: &[Option<Segment>]| expert[range.clone()].iter().all(Option::is_some);
        experts.into_iter().all(is_here)
    }

    /// The entries of a layer's experts; 0 before the first load.
    pub(super) fn entries(&self, layer: usize, num_experts: usize) -> u64 {
        let at = layer * num_experts * size_of::<ExpertEntry>();
        self.table.as_ref().map_or(0, |table| table.entries.at(at))
    }

    /// Tells the kernels where the segments of an expert are now.
    fn publish(&self, slot: usize) -> Result<(), Error> {
        let Some(table) = &self.table else {
            return Ok(());
        };
        let mut entry = ExpertEntry::default();
        for (i, segment) in self.segments[slot..]
            .iter()
            .take(usize::from(SEGMENTS_PER_EXPERT))
            .enumerate()
        {
            if let Some(segment) = segment {
                let Segment { buffer, layout } = segment;
                entry.gate_up[i] = buffer.address();
                entry.down[i] = buffer.at(layout.down_at);
                entry.gate_up_scales[i] = buffer.at(layout.gate_up_scales_at);
                entry.down_scales[i] = buffer.at(layout.down_scales_at);
            }
        }
        let at = slot / usize::from(SEGMENTS_PER_EXPERT) * size_of::<ExpertEntry>();
        let written = table
            .stream
            .write(&table.entries, at, bytemuck::bytes_of(&entry));
        written.map_err(failed("writing the table of experts"))
    }
}

impl Experts for CudaExperts {
    fn load(&self, slice: ExpertSlice, weights: &ExpertWeights<'_>) -> Result<(), Error> {
        let slot = self.slot(slice.layer, slice.expert)?;
        let (hidden, ff) = (self.context.geometry.hidden, self.context.geometry.ff);
        check_tensor("w1", &weights.w1, (ff, hidden))?;
        check_tensor("w2", &weights.w2, (hidden, ff))?;
        check_tensor("w3", &weights.w3, (ff, hidden))?;
        let mut packed = Vec::new();
        for segment in self.segments_of(slice.range) {
            let at = slot + usize::from(segment);
            if self.held.read().segments[at].is_none() {
                packed.push((at, self.pack(slice::segment_columns(ff, segment), weights)?));
            }
        }
        self.insert(slot, packed)
    }

    fn unload(&self, slice: ExpertSlice) {
        let Ok(slot) = self.slot(slice.layer, slice.expert) else {
            return;
        };
        let mut dropped = Vec::new();
        let mut held = self.held.write();
        for segment in self.segments_of(slice.range) {
            dropped.push(held.segments[slot + usize::from(segment)].take());
        }
        if let Err(error) = held.publish(slot) {
            tracing::warn!(%error, %slice, "the table of experts keeps a slice that is gone");
        }
        // Freeing waits for the device; nobody else needs to.
        drop(held);
        drop(dropped);
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        let Ok(slot) = self.slot(layer, expert) else {
            return 0;
        };
        let held = self.held.read();
        let num_segments = self.context.geometry.num_segments();
        (0..SEGMENTS_PER_EXPERT)
            .filter(|&s| s >= num_segments || held.segments[slot + usize::from(s)].is_some())
            .fold(0, |mask, s| mask | 1 << s)
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let geometry = &self.context.geometry;
        check_index("layer", geometry.num_layers, usize::from(layer.0))?;
        let row_bytes = RowFormat::Bf16.row_bytes(geometry.hidden);
        check_size("bytes of expert rows", num_rows * row_bytes, rows.len())?;
        let mut call = self.call.lock();
        let held = self.held.read();
        for job in jobs {
            self.check_job(&held, layer, job)?;
            for &row in job.row_ids {
                check_index("row", num_rows, row as usize)?;
            }
        }
        out.clear();
        let entries = held.entries(usize::from(layer.0), geometry.num_experts);
        let call = match &mut *call {
            Some(call) => call,
            none => none.insert(Call::new(&self.context)?),
        };
        call.run(&self.context, entries, rows, jobs, out)
    }

    fn on_device(&self) -> Option<&dyn Any> {
        Some(self)
    }
}
