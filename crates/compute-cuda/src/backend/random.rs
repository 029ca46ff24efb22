//! A model of any size with weights that mean nothing, made on the device: for measuring. Reads no checkpoint.

use std::sync::Arc;

use half::bf16;
use tramontane_compute::{Attention, AttentionConfig, Error, Experts};
use tramontane_types::ModelGeometry;

use super::attention::CudaAttention;
use super::context::{Context, Matrix, failed};
use super::core::Core;
use super::experts::CudaExperts;
use super::weights::{LayerWeights, Weights, angles};
use crate::device::{Buffer, Device, Stream};

/// Random numbers that are made; everything larger repeats them from different places.
const PATTERN_BYTES: usize = 64 << 20;
/// Weights are uniform up to this: the usual standard deviation of initial weights is 0.02.
const WEIGHT_MAX: f32 = 0.035;

/// Both halves of a worker, with random weights.
#[derive(Debug)]
pub struct RandomModel {
    /// With a KV cache of zeros.
    pub attention: Box<dyn Attention>,
    /// All experts.
    pub experts: Arc<dyn Experts>,
}

struct Pattern {
    context: Arc<Context>,
    stream: Stream,
    buffer: Buffer,
    phase: usize,
}

impl Pattern {
    fn new(context: &Arc<Context>) -> Result<Self, Error> {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            // Xorshift (Marsaglia, 2003).
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let uniform = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
            bf16::from_f32(uniform * WEIGHT_MAX).to_bits()
        };
        let numbers: Vec<u16> = (0..PATTERN_BYTES / 2).map(|_| next()).collect();
        Ok(Self {
            stream: context.stream()?,
            buffer: context.upload(bytemuck::cast_slice(&numbers))?,
            phase: 0,
            context: Arc::clone(context),
        })
    }

    fn fill(&mut self, buffer: &Buffer) -> Result<(), Error> {
        // Another place each time: equal weights would make all experts one.
        self.phase = (self.phase + 1_000_448) % PATTERN_BYTES;
        let filled = self.stream.fill_with(buffer, &self.buffer, self.phase);
        filled.map_err(failed("making random weights"))
    }

    fn matrix(&mut self, rows: usize, cols: usize) -> Result<Matrix, Error> {
        let matrix = self.context.empty_dense(rows, cols)?;
        self.fill(matrix.buffer())?;
        Ok(matrix)
    }

    fn rows(&mut self, rows: usize, cols: usize) -> Result<Buffer, Error> {
        let buffer = self.context.buffer(rows * cols * 2)?;
        self.fill(&buffer)?;
        Ok(buffer)
    }

    fn layer(&mut self) -> Result<LayerWeights, Error> {
        let g = self.context.geometry.clone();
        let q = g.num_heads * g.head_dim;
        let ones = vec![1.0_f32; g.hidden];
        // Every expert is chosen as often as the others, more or less.
        let gate: Vec<f32> = (0..g.num_experts * g.hidden)
            .map(|i| ((i * 7919 + self.phase) % 1009) as f32 / 1009.0 - 0.5)
            .collect();
        Ok(LayerWeights {
            input_norm: self.context.upload(bytemuck::cast_slice(&ones))?,
            qkv: self.matrix(q + 2 * g.num_kv_heads * g.head_dim, g.hidden)?,
            o: self.matrix(g.hidden, q)?,
            post_norm: self.context.upload(bytemuck::cast_slice(&ones))?,
            gate: match g.has_gate() {
                true => Some(self.context.upload(bytemuck::cast_slice(&gate))?),
                false => None,
            },
        })
    }
}

impl RandomModel {
    /// Fills a device with a model of this shape.
    ///
    /// # Errors
    /// When there are no kernels for the shape, or the device has not so much memory.
    pub fn new(
        device: &Arc<dyn Device>,
        geometry: &ModelGeometry,
        config: AttentionConfig,
    ) -> Result<Self, Error> {
        let context = Arc::new(Context::new(device, geometry)?);
        let mut pattern = Pattern::new(&context)?;
        let ones = vec![1.0_f32; geometry.hidden];
        let weights = Weights {
            embed: pattern.rows(geometry.vocab, geometry.hidden)?,
            layers: (0..geometry.num_layers)
                .map(|_| pattern.layer())
                .collect::<Result<_, _>>()?,
            norm: context.upload(bytemuck::cast_slice(&ones))?,
            lm_head: pattern.matrix(geometry.vocab, geometry.hidden)?,
            angles: context.upload(bytemuck::cast_slice(&angles(geometry)))?,
        };
        let experts = CudaExperts::new(Arc::clone(&context));
        experts.load_all(&mut |buffer| pattern.fill(buffer))?;
        let core = Core::with_weights(Arc::clone(&context), weights, config)?;
        core.clear_cache()?;
        Ok(Self {
            attention: Box::new(CudaAttention::with_core(core)?),
            experts: Arc::new(experts),
        })
    }
}
