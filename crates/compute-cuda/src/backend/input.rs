//! What a step tells the device: one block of memory, one copy. Decides nothing about the step.

use tramontane_compute::{AttentionConfig, Error, KV_PAGE_TOKENS, StepBatch, Wanted};
use tramontane_types::PageId;

use super::abi::{AttendItem, Draw};
use super::context::{Context, failed};
use super::outputs::draw_of;
use super::plan::{AttendPlan, EXTRA_ITEMS};
use crate::device::{Buffer, Pinned, Stream};

/// Where things are, in bytes. Tables are last: only those of a step's sequences are copied.
#[derive(Clone, Copy, Debug)]
struct Layout {
    tokens: usize,
    positions: usize,
    sequences: usize,
    logits_rows: usize,
    draws: usize,
    narrow: usize,
    wide: usize,
    tables: usize,
    bytes: usize,
}

/// Numbers at the start: rows, logits rows, narrow items, wide items.
const HEADER_BYTES: usize = 256;

/// The block, on both sides.
#[derive(Debug)]
pub(super) struct StepInput {
    host: Pinned,
    device: Buffer,
    layout: Layout,
    /// Pages of a line of the tables.
    table_stride: usize,
}

impl StepInput {
    pub(super) fn new(context: &Context, config: AttentionConfig) -> Result<Self, Error> {
        let table_stride = context.geometry.max_positions.div_ceil(KV_PAGE_TOKENS);
        let rows = config.max_rows * size_of::<u32>();
        let items = (config.max_rows + EXTRA_ITEMS) * size_of::<AttendItem>();
        let tables = config.max_rows * table_stride * size_of::<u32>();
        let mut bytes = HEADER_BYTES;
        let mut take = |len: usize| {
            let at = bytes;
            bytes += len.next_multiple_of(256);
            at
        };
        let layout = Layout {
            tokens: take(rows),
            positions: take(rows),
            sequences: take(rows),
            logits_rows: take(rows),
            draws: take(config.max_rows * size_of::<Draw>()),
            narrow: take(items),
            wide: take(items),
            tables: take(tables),
            bytes: 0,
        };
        let layout = Layout { bytes, ..layout };
        Ok(Self {
            host: context.pinned(layout.bytes)?,
            device: context.buffer(layout.bytes)?,
            layout,
            table_stride,
        })
    }

    /// Writes a batch that was checked, what is wanted of its logits rows, and its plan, and queues the copy.
    pub(super) fn send(
        &mut self,
        stream: &Stream,
        (batch, wanted): (&StepBatch, &[Wanted]),
        plan: &AttendPlan,
    ) -> Result<(), Error> {
        let layout = self.layout;
        let header = [
            batch.num_rows(),
            batch.logits_rows.len(),
            plan.narrow.len(),
            plan.wide.len(),
        ];
        self.put(0, &header.map(|n| n as u32));
        self.put(layout.tokens, &batch.tokens);
        self.put(layout.positions, &batch.positions);
        self.put(layout.logits_rows, &batch.logits_rows);
        let draws = &mut self.host.as_mut_slice::<u8>()[layout.draws..];
        let draws: &mut [Draw] =
            bytemuck::cast_slice_mut(&mut draws[..size_of::<Draw>() * wanted.len()]);
        for (draw, wanted) in draws.iter_mut().zip(wanted) {
            *draw = draw_of(*wanted);
        }
        self.put(layout.narrow, &plan.narrow);
        self.put(layout.wide, &plan.wide);
        let words = self.host.as_mut_slice::<u32>();
        let (tables, stride) = (layout.tables / 4, self.table_stride);
        for (i, span) in batch.sequences.iter().enumerate() {
            let rows = layout.sequences / 4 + span.row_begin as usize;
            words[rows..rows + span.num_rows as usize].fill(i as u32);
            let table = &mut words[tables + i * stride..][..stride];
            for (entry, page) in table.iter_mut().zip(&span.block_table) {
                // Never read, but no address of anything either.
                *entry = if *page == PageId::RELEASED { 0 } else { page.0 };
            }
        }
        let bytes = layout.tables + batch.sequences.len() * stride * size_of::<u32>();
        // SAFETY: both live in `self`, and nothing is written before the stream of the last step was waited for.
        let queued = unsafe { stream.upload(&self.device, &self.host, bytes) };
        queued.map_err(failed("sending a step to the device"))
    }

    fn put<T: bytemuck::Pod>(&mut self, at: usize, values: &[T]) {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.host.as_mut_slice::<u8>()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn num_rows(&self) -> u64 {
        self.device.address()
    }

    pub(super) fn num_logits(&self) -> u64 {
        self.device.at(4)
    }

    pub(super) fn num_narrow(&self) -> u64 {
        self.device.at(8)
    }

    pub(super) fn num_wide(&self) -> u64 {
        self.device.at(12)
    }

    pub(super) fn tokens(&self) -> u64 {
        self.device.at(self.layout.tokens)
    }

    pub(super) fn positions(&self) -> u64 {
        self.device.at(self.layout.positions)
    }

    pub(super) fn sequences(&self) -> u64 {
        self.device.at(self.layout.sequences)
    }

    /// The logits rows from the `first` on.
    pub(super) fn logits_rows(&self, first: usize) -> u64 {
        self.device.at(self.layout.logits_rows + 4 * first)
    }

    /// How tokens of the logits rows from the `first` on are drawn.
    pub(super) fn draws(&self, first: usize) -> u64 {
        let draw = size_of::<Draw>();
        self.device.at(self.layout.draws + draw * first)
    }

    pub(super) fn narrow(&self) -> u64 {
        self.device.at(self.layout.narrow)
    }

    pub(super) fn wide(&self) -> u64 {
        self.device.at(self.layout.wide)
    }

    pub(super) fn tables(&self) -> u64 {
        self.device.at(self.layout.tables)
    }

    pub(super) const fn table_stride(&self) -> usize {
        self.table_stride
    }
}
