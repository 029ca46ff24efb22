//! The norms of a step, which differ in where their rows go: products of layers read what their format wants, all others bf16.
//! Decides nothing.

use super::abi::NormArgs;
use super::call::row_stride;
use super::context::Rows;
use super::core::Queue;
use super::kernels::Norms;
use crate::device::{Args, Buffer, DeviceError};

/// A norm of rows of the residual stream: what it reads and writes, and the kernels that write rows so.
#[derive(Clone, Copy)]
pub(super) struct Norm<'a> {
    pub(super) args: NormArgs,
    pub(super) kernels: &'a Norms,
}

impl<'a> Queue<'a> {
    /// The final norm, for the logits rows from the `first` on.
    pub(super) fn norm_of_logits(&self, first: usize) -> Norm<'a> {
        let norm = self.norm_as_bf16(&self.weights.norm);
        let args = NormArgs {
            // Where this counts more rows than a turn has, its grid has no blocks for them.
            num_rows: self.input.num_logits(),
            source: self.input.logits_rows(first),
            ..norm.args
        };
        Norm { args, ..norm }
    }

    /// A norm whose rows go to the LM head or to other workers.
    pub(super) fn norm_as_bf16(&self, weight: &Buffer) -> Norm<'a> {
        let geometry = &self.context.geometry;
        let args = NormArgs {
            out: self.buffers.x.address(),
            residual: self.buffers.residual.address(),
            weight: weight.address(),
            num_rows: self.input.num_rows(),
            source: 0,
            scales: 0,
            eps: geometry.rms_eps as f32,
            hidden: geometry.hidden as u32,
            out_stride: (row_stride(geometry.hidden) / 2) as u32,
            pad: 0,
        };
        Norm {
            args,
            kernels: &self.context.kernels.norms,
        }
    }

    /// A norm whose rows go to a product of a layer.
    pub(super) fn norm_for_layers(&self, weight: &Buffer) -> Norm<'a> {
        let norm = self.norm_as_bf16(weight);
        let Some(rounded) = &self.buffers.rounded_x else {
            return norm;
        };
        let rows = rounded.as_rows(self.rows);
        let args = NormArgs {
            out: rows.address,
            scales: rows.scales,
            out_stride: rows.stride as u32,
            ..norm.args
        };
        Norm {
            args,
            kernels: &self.context.kernels.norms_of_layers,
        }
    }

    /// The rows that such a norm has written.
    pub(super) fn rows_for_layers(&self) -> Rows {
        let rounded = self.buffers.rounded_x.as_ref();
        rounded.map_or_else(|| self.bf16_rows(), |rows| rows.as_rows(self.rows))
    }

    pub(super) fn bf16_rows(&self) -> Rows {
        Rows {
            address: self.buffers.x.address(),
            num_tokens: self.rows,
            stride: row_stride(self.context.geometry.hidden),
            scales: 0,
        }
    }

    /// A norm with nothing before and behind it.
    ///
    /// # Safety
    /// As `launch`.
    pub(super) unsafe fn norm(&self, norm: Norm<'_>) -> Result<(), DeviceError> {
        let (kernel, shape) = norm.kernels.norm(self.rows);
        // SAFETY: the caller's promise.
        unsafe { self.launch(kernel, shape, Args::new().pod(&norm.args)) }
    }
}
