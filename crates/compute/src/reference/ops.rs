//! The operations of the paper, each on one row of f32. Keeps no state.

use candle_core::{Device, Storage, Tensor};

use crate::error::check_size;
use crate::{Error, HostTensor};

/// A matrix that multiplies rows: `y = W x`, `W` of `[out, in]`.
#[derive(Debug)]
pub(super) struct Linear {
    weight: Tensor,
}

impl Linear {
    /// The whole of a checkpoint's matrix.
    pub(super) fn load(
        what: &str,
        tensor: &HostTensor<'_>,
        rows: usize,
        cols: usize,
    ) -> Result<Self, Error> {
        check_tensor(what, tensor, rows, cols)?;
        Self::from_values(tensor.to_f32(), rows, cols)
    }

    /// A matrix of the given values, row-major.
    pub(super) fn from_values(values: Vec<f32>, rows: usize, cols: usize) -> Result<Self, Error> {
        let weight = Tensor::from_vec(values, (rows, cols), &Device::Cpu);
        let weight = weight.map_err(|e| library("making a tensor", e))?;
        Ok(Self { weight })
    }

    /// `W x`: one row at a time, so that a product is the same in every batch.
    ///
    /// Not candle's `matmul`: it looks up the number of cores in `/proc/cpuinfo` at every call, which
    /// takes far longer than the product of one row.
    pub(super) fn apply(&self, x: &[f32]) -> Result<Vec<f32>, Error> {
        let what = "multiplying matrices";
        let (storage, _layout) = self.weight.storage_and_layout();
        let Storage::Cpu(values) = &*storage else {
            return Err(library(
                what,
                candle_core::Error::Msg("not on the CPU".to_owned()),
            ));
        };
        let values = values.as_slice::<f32>().map_err(|e| library(what, e))?;
        let row = |row: &[f32]| dot_in_lanes(row, x);
        Ok(values.chunks_exact(x.len().max(1)).map(row).collect())
    }

    /// One row of the matrix itself: an embedding.
    pub(super) fn row(&self, row: usize) -> Result<Vec<f32>, Error> {
        let look_up = || self.weight.get(row)?.to_vec1();
        look_up().map_err(|e| library("looking up a row", e))
    }
}

/// A vector of a checkpoint.
pub(super) fn load_vector(
    what: &str,
    tensor: &HostTensor<'_>,
    len: usize,
) -> Result<Vec<f32>, Error> {
    check_tensor(what, tensor, 1, len)?;
    Ok(tensor.to_f32())
}

/// Refuses a tensor of another shape.
pub(super) fn check_tensor(
    what: &str,
    tensor: &HostTensor<'_>,
    rows: usize,
    cols: usize,
) -> Result<(), Error> {
    let sizes = [
        ("rows", rows, tensor.rows),
        ("columns", cols, tensor.cols),
        (
            "bytes",
            // No number of bytes is right for a row that is no whole number of blocks.
            tensor.expected_bytes().unwrap_or(usize::MAX),
            tensor.data.len(),
        ),
    ];
    for (size, expected, got) in sizes {
        check_size(&format!("{size} of {what}"), expected, got)?;
    }
    Ok(())
}

/// `x / sqrt(mean(x^2) + eps) * weight`.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mean_square = x.iter().map(|x| x * x).sum::<f32>() / x.len() as f32;
    // Squares beyond f32 would make zeros of the row.
    let scale = if mean_square.is_finite() {
        1.0 / (mean_square + eps).sqrt()
    } else {
        f32::NAN
    };
    x.iter().zip(weight).map(|(x, w)| x * scale * w).collect()
}

/// Rotates each head by its position: element `i` of the first half pairs with element `i` of the
/// second half; the angle is `position / theta^(2i / head_dim)`.
pub(super) fn rope(heads: &mut [f32], head_dim: usize, position: u32, theta: f32) {
    let half = head_dim / 2;
    for head in heads.chunks_exact_mut(head_dim) {
        let (first, second) = head.split_at_mut(half);
        for (i, (a, b)) in first.iter_mut().zip(second).enumerate() {
            let inverse_frequency = 1.0 / theta.powf((2 * i) as f32 / head_dim as f32);
            let (sin, cos) = (position as f32 * inverse_frequency).sin_cos();
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// `exp(x) / sum(exp(x))`, shifted by the largest element.
pub(super) fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for x in x.iter_mut() {
        *x = (*x - max).exp();
        sum += *x;
    }
    for x in x.iter_mut() {
        *x /= sum;
    }
}

/// `x * sigmoid(x)`.
pub(super) fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

/// Indices of the `k` largest, ascending by index; of equals the lowest index is taken.
pub(super) fn top_k(x: &[f32], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    // The sort is stable: equals stay in ascending order.
    order.sort_by(|&a, &b| x[b].total_cmp(&x[a]));
    order.truncate(k);
    order.sort_unstable();
    order
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Partial sums of [`dot_in_lanes`]: fixed, because the order of addition decides the bits.
const LANES: usize = 16;

/// Element `i` is added to lane `i % 16`, then the lanes ascending.
fn dot_in_lanes(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

fn library(operation: &'static str, source: candle_core::Error) -> Error {
    Error::Library {
        operation,
        source: Box::new(source),
    }
}
