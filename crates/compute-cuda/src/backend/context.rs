//! What both halves of a backend share: the device, the kernels, the model's shape, and the way weights take to the device.

use std::sync::Arc;

use half::bf16;
use parking_lot::Mutex;
use tramontane_compute::{DType, Error, HostTensor};
use tramontane_types::{ModelGeometry, slice};

use super::abi::{Linear, Pack};
use super::island::Island;
use super::kernels::{EXPERTS_MAX, HEAD_DIM_MAX, Kernels, WIDE_PAIRS};
use crate::device::{Args, Buffer, Device, DeviceError, Kernel, Pinned, Shape, Stream};

/// Row-major weights on their way, in bytes: enough to keep the bus busy, little beside the weights.
const STAGING_BYTES: usize = 32 << 20;
/// Packed rows come in strips of 16, their number a multiple of 4.
const ROWS_ALIGN: usize = 64;
/// Columns of one packed step of bf16, and its bytes for a strip; a part has an even number of steps.
const STEP_COLS: usize = 64;
const STEP_BYTES: usize = 2048;
/// Rows of a strip.
const STRIP_ROWS: usize = 16;

/// Shared by a backend, its attention worker and its experts.
pub(crate) struct Context {
    pub(super) device: Arc<dyn Device>,
    pub(super) geometry: ModelGeometry,
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
    buffer: Buffer,
    rows: usize,
    cols: usize,
}

impl Matrix {
    pub(super) const fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}

/// Some rows of a matrix as bf16: row `i` from column `begin` on, as many as `out` has.
pub(super) type ReadRow<'a> = &'a dyn Fn(usize, usize, &mut [u16]);

/// A part of a matrix that is packed on its own.
struct Part<'a> {
    /// Where it goes.
    out: u64,
    rows: usize,
    /// Columns of the source.
    col_begin: usize,
    cols: usize,
    gate_or_plain: ReadRow<'a>,
    /// The up rows that are woven in.
    up: Option<ReadRow<'a>>,
}

/// What the driver or the emulator refused, as the backend's error.
pub(crate) fn failed(operation: &'static str) -> impl Fn(DeviceError) -> Error {
    move |source| Error::Library {
        operation,
        source: Box::new(source),
    }
}

/// Bytes of a packed part.
pub(super) const fn part_bytes(packed_rows: usize, cols: usize) -> usize {
    packed_rows.next_multiple_of(ROWS_ALIGN) / STRIP_ROWS * steps(cols) * STEP_BYTES
}

const fn steps(cols: usize) -> usize {
    cols.div_ceil(2 * STEP_COLS) * 2
}

/// Packed rows of the gate and up halves of `len` columns of ff.
pub(super) const fn gate_up_rows(len: usize) -> usize {
    len.div_ceil(32) * 64
}

impl Context {
    pub(super) fn new(device: &Arc<dyn Device>, geometry: &ModelGeometry) -> Result<Self, Error> {
        check_geometry(geometry)?;
        let device_failed = failed("preparing the device");
        let kernels = Kernels::find(&**device).map_err(&device_failed)?;
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
    pub(super) fn pack_dense(&self, tensors: &[HostTensor<'_>]) -> Result<Matrix, Error> {
        let rows = tensors.iter().map(|tensor| tensor.rows).sum();
        let cols = tensors.first().map_or(0, |tensor| tensor.cols);
        let matrix = self.empty_dense(rows, cols)?;
        let part_cols = slice::segment_len(cols);
        let full = part_bytes(rows, part_cols);
        let read = |row: usize, col: usize, out: &mut [u16]| {
            let mut row = row;
            for tensor in tensors {
                if row < tensor.rows {
                    return read_bf16(tensor, row, col, out);
                }
                row -= tensor.rows;
            }
        };
        for part in 0..cols.div_ceil(part_cols) {
            self.pack(&Part {
                out: matrix.buffer.at(part * full),
                rows,
                col_begin: part * part_cols,
                cols: part_cols.min(cols - part * part_cols),
                gate_or_plain: &read,
                up: None,
            })?;
        }
        Ok(matrix)
    }

    /// Room for a packed dense matrix: its parts one after the other, each in the room of a full one.
    pub(super) fn empty_dense(&self, rows: usize, cols: usize) -> Result<Matrix, Error> {
        let part_cols = slice::segment_len(cols);
        let bytes = cols.div_ceil(part_cols) * part_bytes(rows, part_cols);
        Ok(Matrix {
            buffer: self.buffer(bytes)?,
            rows,
            cols,
        })
    }

    /// Packs the gate and up rows of a segment: `len` rows each, from row 0 of the two sources.
    pub(super) fn pack_gate_up(
        &self,
        out: u64,
        (len, cols): (usize, usize),
        gate: ReadRow<'_>,
        up: ReadRow<'_>,
    ) -> Result<(), Error> {
        self.pack(&Part {
            out,
            rows: len,
            col_begin: 0,
            cols,
            gate_or_plain: gate,
            up: Some(up),
        })
    }

    /// Packs one part that has a place of its own.
    pub(super) fn pack_plain(
        &self,
        out: u64,
        (rows, cols): (usize, usize),
        read: ReadRow<'_>,
    ) -> Result<(), Error> {
        self.pack(&Part {
            out,
            rows,
            col_begin: 0,
            cols,
            gate_or_plain: read,
            up: None,
        })
    }

    /// As many rows at a time as the staging memory has room for.
    fn pack(&self, part: &Part<'_>) -> Result<(), Error> {
        let mut staging = self.staging.lock();
        let halves = if part.up.is_some() { 2 } else { 1 };
        // Whole groups of strips; 32 rows of each half make one.
        let align = ROWS_ALIGN / halves;
        let fits = staging.pinned.bytes() / (halves * part.cols.max(1) * 2);
        let rows_max = (fits / align).max(1) * align;
        for begin in (0..part.rows).step_by(rows_max) {
            let rows = begin..(begin + rows_max).min(part.rows);
            staging
                .pack_rows(self.kernels.pack, part, rows)
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
        let linear = &self.kernels.linear;
        let variant = linear.for_matrix(rows.num_tokens, matrix.rows, multiprocessors);
        let shape = variant.shape(rows.num_tokens, matrix.rows, 1);
        let args = Linear {
            weights: matrix.buffer.address(),
            x: rows.address,
            row_ids: 0,
            out: out.address,
            weight_scales: 0,
            x_scales: 0,
            num_tokens: rows.num_tokens as i32,
            rows: matrix.rows as i32,
            cols: matrix.cols as i32,
            x_stride: rows.stride as i32,
            out_stride: matrix.rows as i32,
            is_added: i32::from(out.is_added),
        };
        // SAFETY: the arguments are the kernel's; the rest is the caller's promise.
        unsafe { stream.launch(variant.kernel, shape, Args::new().pod(&args)) }
    }
}

/// Rows of bf16 that a product reads.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) address: u64,
    pub(super) num_tokens: usize,
    /// Bytes from row to row.
    pub(super) stride: usize,
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
        kernel: Kernel,
        part: &Part<'_>,
        rows: std::ops::Range<usize>,
    ) -> Result<(), DeviceError> {
        let (num_rows, cols) = (rows.len(), part.cols);
        let halves: Vec<ReadRow<'_>> = std::iter::once(part.gate_or_plain).chain(part.up).collect();
        let half_len = num_rows * cols;
        let values = self.pinned.as_mut_slice::<u16>();
        for (read, values) in halves.iter().zip(values.chunks_exact_mut(half_len)) {
            for (row, out) in rows.clone().zip(values.chunks_exact_mut(cols)) {
                read(row, part.col_begin, out);
            }
        }
        let bytes = half_len * 2;
        let is_woven = halves.len() == 2;
        let steps = steps(cols);
        let packed = |n: usize| if is_woven { gate_up_rows(n) } else { n };
        let strips = packed(num_rows).next_multiple_of(ROWS_ALIGN) / STRIP_ROWS;
        let strips_before = packed(rows.start) / STRIP_ROWS;
        let args = Pack {
            out: part.out + (strips_before * steps * STEP_BYTES) as u64,
            scales: 0,
            a: self.rows.address(),
            b: if is_woven { self.rows.at(bytes) } else { 0 },
            rows: num_rows as i32,
            cols: cols as i32,
            stride: cols as i32,
            pad: 0,
            dm_a: 0,
            dm_b: 0,
        };
        let shape = Shape::grid2(steps as u32, strips as u32, 32, 0);
        // SAFETY: staging memory is not touched before the wait below; `out` has room for the part.
        unsafe {
            self.stream
                .upload(&self.rows, &self.pinned, halves.len() * bytes)?;
            self.stream.launch(kernel, shape, Args::new().pod(&args))?;
        }
        self.stream.synchronize()
    }
}

/// Columns of a row as bf16, zeros outside the tensor.
pub(super) fn read_bf16(tensor: &HostTensor<'_>, row: usize, col_begin: usize, out: &mut [u16]) {
    let plain = (tensor.dtype == DType::Bf16)
        .then(|| {
            tensor
                .row_bytes(row)?
                .get(2 * col_begin..)?
                .get(..2 * out.len())
        })
        .flatten();
    if let Some(bytes) = plain {
        for (x, b) in out.iter_mut().zip(bytes.as_chunks().0) {
            *x = u16::from_le_bytes(*b);
        }
        return;
    }
    let mut values = vec![0.0; out.len()];
    tensor.read_row(row, col_begin, &mut values);
    for (x, value) in out.iter_mut().zip(values) {
        *x = bf16::from_f32(value).to_bits();
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
