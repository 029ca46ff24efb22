//! What both halves of a backend share: the device, the kernels, the model's shape, and the way weights take to the device.

use std::sync::Arc;

use parking_lot::Mutex;
use tramontane_compute::{Error, HostTensor, WeightFormat};
use tramontane_types::{ModelGeometry, slice};

use super::abi::{Linear, Pack};
use super::format::{Formats, Packing, ROWS_ALIGN, STRIP_ROWS, Source, gate_up_rows, read_bf16};
use super::island::Island;
use super::kernels::{EXPERTS_MAX, HEAD_DIM_MAX, Kernels, WIDE_PAIRS};
use crate::device::{Args, Buffer, Device, DeviceError, Pinned, Stream};

/// Row-major weights on their way, in bytes: enough to keep the bus busy, little beside the weights.
pub(super) const STAGING_BYTES: usize = 32 << 20;

/// Shared by a backend, its attention worker and its experts.
pub(crate) struct Context {
    pub(super) device: Arc<dyn Device>,
    pub(super) geometry: ModelGeometry,
    pub(super) formats: Formats,
    pub(super) kernels: Kernels,
    /// The ranks that this device computes with now.
    island: Mutex<Option<Arc<Island>>>,
    staging: Mutex<Staging>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

/// Where weights wait to be packed; whoever loads takes turns.
#[derive(Debug)]
struct Staging {
    stream: Stream,
    pinned: Pinned,
    rows: Buffer,
}

/// A packed matrix on the device.
#[derive(Debug)]
pub(super) struct Matrix {
    /// The parts, then their scales where the format has such.
    buffer: Buffer,
    packing: Packing,
    scales_at: usize,
    rows: usize,
    cols: usize,
}

impl Matrix {
    pub(super) const fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Where scales begin; the end where there are none.
    pub(super) const fn scales_at(&self) -> usize {
        self.scales_at
    }

    pub(super) const fn rows(&self) -> usize {
        self.rows
    }

    pub(super) const fn cols(&self) -> usize {
        self.cols
    }

    /// The product of rows with it, as kernels are told.
    pub(super) fn product(&self, rows: Rows, out: Out) -> Linear {
        Linear {
            weights: self.buffer.address(),
            x: rows.address,
            row_ids: 0,
            out: out.address,
            weight_scales: self.buffer.at(self.scales_at),
            x_scales: rows.scales,
            num_tokens: rows.num_tokens as i32,
            rows: self.rows as i32,
            cols: self.cols as i32,
            x_stride: rows.stride as i32,
            out_stride: self.rows as i32,
            is_added: i32::from(out.is_added),
        }
    }
}

/// A part of a matrix that is packed on its own.
pub(super) struct Part<'a> {
    pub(super) packing: Packing,
    /// Where it goes, and its scales.
    pub(super) out: u64,
    pub(super) scales: u64,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) gate_or_plain: Source<'a>,
    /// The up rows that are woven in.
    pub(super) up: Option<Source<'a>>,
}

/// What the driver or the emulator refused, as the backend's error.
pub(crate) fn failed(operation: &'static str) -> impl Fn(DeviceError) -> Error {
    move |source| Error::Library {
        operation,
        source: Box::new(source),
    }
}

impl Context {
    pub(super) fn new(
        device: &Arc<dyn Device>,
        geometry: &ModelGeometry,
        format: WeightFormat,
    ) -> Result<Self, Error> {
        check_geometry(geometry)?;
        let formats = Formats::of(format, Some(device.info().target))?;
        let device_failed = failed("preparing the device");
        let kernels = Kernels::find(&**device, formats, geometry).map_err(&device_failed)?;
        let staging = || -> Result<Staging, DeviceError> {
            let largest = geometry
                .hidden
                .max(geometry.ff)
                .max(geometry.num_heads * geometry.head_dim);
            // One strip of both halves at least.
            let bytes = STAGING_BYTES.max(4 * ROWS_ALIGN * largest);
            Ok(Staging {
                stream: Stream::new(device)?,
                pinned: Pinned::new(device, bytes)?,
                rows: Buffer::new(device, bytes)?,
            })
        };
        Ok(Self {
            device: Arc::clone(device),
            geometry: geometry.clone(),
            formats,
            kernels,
            island: Mutex::new(None),
            staging: Mutex::new(staging().map_err(device_failed)?),
        })
    }

    /// From the next step on.
    pub(super) fn join(&self, island: Option<Arc<Island>>) {
        *self.island.lock() = island;
    }

    pub(super) fn island(&self) -> Option<Arc<Island>> {
        self.island.lock().clone()
    }

    pub(super) fn buffer(&self, bytes: usize) -> Result<Buffer, Error> {
        Buffer::new(&self.device, bytes).map_err(failed("reserving memory on the device"))
    }

    pub(super) fn pinned(&self, bytes: usize) -> Result<Pinned, Error> {
        Pinned::new(&self.device, bytes).map_err(failed("reserving pinned memory"))
    }

    pub(super) fn stream(&self) -> Result<Stream, Error> {
        Stream::new(&self.device).map_err(failed("making a stream"))
    }

    /// Copies bytes to a new buffer.
    pub(super) fn upload(&self, bytes: &[u8]) -> Result<Buffer, Error> {
        let buffer = self.buffer(bytes.len())?;
        let staging = self.staging.lock();
        let written = staging.stream.write(&buffer, 0, bytes);
        written.map_err(failed("copying to the device"))?;
        Ok(buffer)
    }

    /// A vector, or a small matrix, as f32.
    pub(super) fn upload_f32(&self, tensor: &HostTensor<'_>) -> Result<Buffer, Error> {
        self.upload(bytemuck::cast_slice(&tensor.to_f32()))
    }

    /// A matrix as rows of bf16, as it is read by rows.
    pub(super) fn upload_bf16(&self, tensor: &HostTensor<'_>) -> Result<Buffer, Error> {
        let buffer = self.buffer(tensor.rows * tensor.cols * 2)?;
        let mut staging = self.staging.lock();
        let rows_max = (staging.pinned.bytes() / 2 / tensor.cols.max(1)).max(1);
        for begin in (0..tensor.rows).step_by(rows_max) {
            let end = (begin + rows_max).min(tensor.rows);
            let Staging { stream, pinned, .. } = &mut *staging;
            let rows = pinned.as_mut_slice::<u16>().chunks_exact_mut(tensor.cols);
            for (row, out) in (begin..end).zip(rows) {
                read_bf16(tensor, row, 0, out);
            }
            let bytes = &pinned.as_slice::<u8>()[..(end - begin) * tensor.cols * 2];
            let written = stream.write(&buffer, begin * tensor.cols * 2, bytes);
            written.map_err(failed("copying to the device"))?;
        }
        Ok(buffer)
    }

    /// Packs a dense matrix whose rows come from several tensors, one below the other.
    pub(super) fn pack_dense(
        &self,
        packing: Packing,
        tensors: &[HostTensor<'_>],
    ) -> Result<Matrix, Error> {
        let rows = tensors.iter().map(|tensor| tensor.rows).sum();
        let cols = tensors.first().map_or(0, |tensor| tensor.cols);
        let matrix = self.empty_dense(packing, rows, cols)?;
        let part_cols = slice::segment_len(cols);
        let full = packing.part_bytes(rows, part_cols);
        for part in 0..cols.div_ceil(part_cols) {
            let scales_at = matrix.scales_at + part * packing.scales_bytes(rows);
            self.pack(&Part {
                packing,
                out: matrix.buffer.at(part * full),
                scales: matrix.buffer.at(scales_at),
                rows,
                cols: part_cols.min(cols - part * part_cols),
                gate_or_plain: Source {
                    tensors,
                    row_begin: 0,
                    col_begin: part * part_cols,
                },
                up: None,
            })?;
        }
        Ok(matrix)
    }

    /// Room for a packed dense matrix: its parts one after the other, each in the room of a full one.
    pub(super) fn empty_dense(
        &self,
        packing: Packing,
        rows: usize,
        cols: usize,
    ) -> Result<Matrix, Error> {
        let part_cols = slice::segment_len(cols);
        let parts = cols.div_ceil(part_cols);
        let scales_at = parts * packing.part_bytes(rows, part_cols);
        Ok(Matrix {
            buffer: self.buffer(scales_at + parts * packing.scales_bytes(rows))?,
            packing,
            scales_at,
            rows,
            cols,
        })
    }

    /// As many rows at a time as the staging memory has room for.
    pub(super) fn pack(&self, part: &Part<'_>) -> Result<(), Error> {
        let mut staging = self.staging.lock();
        let halves = if part.up.is_some() { 2 } else { 1 };
        // Whole groups of strips; 32 rows of each half make one.
        let align = ROWS_ALIGN / halves;
        let fits = staging.pinned.bytes() / (halves * part.packing.staged_bytes(part.cols).max(1));
        let rows_max = (fits / align).max(1) * align;
        for begin in (0..part.rows).step_by(rows_max) {
            let rows = begin..(begin + rows_max).min(part.rows);
            staging
                .pack_rows(&self.kernels, part, rows)
                .map_err(failed("packing weights"))?;
        }
        Ok(())
    }

    /// Queues `out[t] (+)= matrix x[t]` for `tokens` rows of x.
    ///
    /// # Safety
    /// As [`Stream::launch`].
    pub(super) unsafe fn linear(
        &self,
        stream: &Stream,
        matrix: &Matrix,
        rows: Rows,
        out: Out,
    ) -> Result<(), DeviceError> {
        let multiprocessors = self.device.info().multiprocessors.max(1) as usize;
        let linear = self.kernels.linear(matrix.packing);
        let variant = linear.for_matrix(rows.num_tokens, matrix.rows, multiprocessors);
        let shape = variant.shape(rows.num_tokens, matrix.rows, 1);
        let args = matrix.product(rows, out);
        // SAFETY: the arguments are the kernel's; the rest is the caller's promise.
        unsafe { stream.launch(variant.kernel, shape, Args::new().pod(&args)) }
    }
}

/// Rows that a product reads: bf16, or e4m3 where the matrix is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) address: u64,
    pub(super) num_tokens: usize,
    /// Bytes from row to row.
    pub(super) stride: usize,
    /// Of rows of e4m3; otherwise 0.
    pub(super) scales: u64,
}

/// Where a product goes: rows of f32, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) address: u64,
    pub(super) is_added: bool,
}

impl Staging {
    /// Copies rows of a part to the device and packs them; `rows.start` is a multiple of a group of strips.
    fn pack_rows(
        &mut self,
        kernels: &Kernels,
        part: &Part<'_>,
        rows: std::ops::Range<usize>,
    ) -> Result<(), DeviceError> {
        let Part { packing, cols, .. } = *part;
        let is_woven = part.up.is_some();
        let halves = 1 + usize::from(is_woven);
        let lines_at = self.stage(part, rows.clone());
        let half_bytes = lines_at / halves;
        let packed = |n: usize| if is_woven { gate_up_rows(n) } else { n };
        let strips = packed(rows.len()).next_multiple_of(ROWS_ALIGN) / STRIP_ROWS;
        let strips_before = packed(rows.start) / STRIP_ROWS;
        let steps = packing.steps(cols);
        let half = |at: usize| if is_woven { self.rows.at(at) } else { 0 };
        let half_lines = rows.len() * packing.staged_bytes(cols) - half_bytes;
        let args = Pack {
            out: part.out + (strips_before * steps * packing.step_bytes()) as u64,
            scales: part.scales + (strips_before * STRIP_ROWS * size_of::<f32>()) as u64,
            a: self.rows.address(),
            b: half(half_bytes),
            rows: rows.len() as i32,
            cols: cols as i32,
            stride: packing.staged_stride(cols) as i32,
            pad: 0,
            dm_a: self.rows.at(lines_at),
            dm_b: half(lines_at + half_lines),
        };
        let bytes = halves * rows.len() * packing.staged_bytes(cols);
        let (kernel, shape) = kernels.pack(packing, steps, strips);
        // SAFETY: staging memory is not touched before the wait below; `out` and `scales` have room for the part.
        unsafe {
            self.stream.upload(&self.rows, &self.pinned, bytes)?;
            self.stream.launch(kernel, shape, Args::new().pod(&args))?;
        }
        self.stream.synchronize()
    }

    /// Writes rows of both halves as they go up: numbers, then what q4 has beside them. Where the latter begin.
    fn stage(&mut self, part: &Part<'_>, rows: std::ops::Range<usize>) -> usize {
        let Part { packing, cols, .. } = *part;
        let halves: Vec<Source<'_>> = std::iter::once(part.gate_or_plain).chain(part.up).collect();
        let half_len = rows.len() * packing.staged_stride(cols);
        if packing != Packing::Q4 {
            let values = self.pinned.as_mut_slice::<u16>();
            for (half, values) in halves.iter().zip(values.chunks_exact_mut(half_len)) {
                half.stage_bf16(rows.clone(), cols, values);
            }
            return halves.len() * half_len * size_of::<u16>();
        }
        let lines_at = halves.len() * half_len;
        let all = self.pinned.as_mut_slice::<u8>();
        let (nibbles, rest) = all.split_at_mut(lines_at);
        let half_lines = rows.len() * packing.staged_bytes(cols) - half_len;
        let lines = bytemuck::cast_slice_mut(&mut rest[..halves.len() * half_lines]);
        let nibbles = nibbles.chunks_exact_mut(half_len);
        let places = nibbles.zip(lines.chunks_exact_mut(half_lines / size_of::<u32>()));
        for (half, place) in halves.iter().zip(places) {
            half.stage_q4(rows.clone(), cols, place);
        }
        lines_at
    }
}

/// Refuses a shape that contradicts itself, or that there are no kernels for.
///
/// # Errors
/// With the first number that does not fit.
pub fn check_geometry(geometry: &ModelGeometry) -> Result<(), Error> {
    let check =
        |what: &str, expected, got| tramontane_compute::error::check_size(what, expected, got);
    let counts = [
        ("hidden", geometry.hidden),
        ("num_layers", geometry.num_layers),
        ("num_heads", geometry.num_heads),
        ("num_kv_heads", geometry.num_kv_heads),
        ("head_dim", geometry.head_dim),
        ("ff", geometry.ff),
        ("num_experts", geometry.num_experts),
        ("top_k", geometry.top_k),
        ("vocab", geometry.vocab),
        ("max_positions", geometry.max_positions),
        ("sliding_window", geometry.sliding_window.unwrap_or(1)),
    ];
    for (what, count) in counts {
        if count == 0 {
            check(what, 1, 0)?;
        }
    }
    let group = geometry.num_heads / geometry.num_kv_heads;
    check(
        "num_heads modulo num_kv_heads",
        0,
        geometry.num_heads % geometry.num_kv_heads,
    )?;
    check("head_dim modulo 2", 0, geometry.head_dim % 2)?;
    let most = [
        (
            "head_dim on a GPU, at most",
            HEAD_DIM_MAX,
            geometry.head_dim,
        ),
        (
            "query heads of a key head on a GPU, at most",
            WIDE_PAIRS,
            group,
        ),
        (
            "num_experts on a GPU, at most",
            EXPERTS_MAX,
            geometry.num_experts,
        ),
        ("top_k", geometry.num_experts, geometry.top_k),
    ];
    for (what, most, got) in most {
        if got > most {
            check(what, most, got)?;
        }
    }
    Ok(())
}

/// Refuses a tensor that is not `[rows, cols]` or whose bytes do not match its shape.
pub(super) fn check_tensor(
    what: &str,
    tensor: &HostTensor<'_>,
    (rows, cols): (usize, usize),
) -> Result<(), Error> {
    let bytes = tensor.expected_bytes().unwrap_or(usize::MAX);
    let check = tramontane_compute::error::check_size;
    check(&format!("rows of {what}"), rows, tensor.rows)?;
    check(&format!("columns of {what}"), cols, tensor.cols)?;
    check(&format!("bytes of {what}"), bytes, tensor.data.len())
}
