//! A model of any size with weights that mean nothing, made on the device: for measuring. Reads no checkpoint.

use std::sync::Arc;

use half::bf16;
use tramontane_compute::quant::{E4M3_MAX, Q4_MAX, e4m3_from_f32};
use tramontane_compute::{Attention, AttentionConfig, Error, Experts, WeightFormat};
use tramontane_types::ModelGeometry;

use super::attention::CudaAttention;
use super::context::{Context, Matrix, failed};
use super::core::Core;
use super::experts::{CudaExperts, segment_bytes};
use super::format::Packing;
use super::weights::{LayerWeights, Weights, angles};
use crate::device::{Buffer, Device, Stream};

/// Whole packed steps of every format, of 2048 and of 640 bytes.
const STEPS_BYTES: usize = 10_240;
/// Random numbers that are made in a format; everything larger repeats them from different places.
const PATTERN_BYTES: usize = 6_500 * STEPS_BYTES;
/// From place to place; no divisor in common, so that all of them come before one comes again.
const PHASE_BYTES: usize = 97 * STEPS_BYTES;
/// Weights are uniform up to this: the usual standard deviation of initial weights is 0.02.
const WEIGHT_MAX: f32 = 0.035;

/// Both halves of a worker, with random weights.
#[derive(Debug)]
pub struct RandomModel {
    /// With a KV cache of zeros.
    pub attention: Box<dyn Attention>,
    /// All experts.
    pub experts: Arc<dyn Experts>,
    /// What a step reads of it.
    pub bytes: WeightBytes,
}

/// Bytes of packed weights, scales included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightBytes {
    /// The dense matrices of a layer.
    pub layer: usize,
    /// One expert.
    pub expert: usize,
    /// The LM head.
    pub head: usize,
}

struct Patterns {
    context: Arc<Context>,
    stream: Stream,
    /// Packed weights in each format that was asked for.
    made: Vec<(Packing, Buffer)>,
    phase: usize,
}

/// Xorshift (Marsaglia, 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In -1..1.
    fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Random packed weights.
fn pattern(packing: Packing) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    match packing {
        Packing::Bf16 => (0..PATTERN_BYTES / 2)
            .flat_map(|_| bf16::from_f32(random.uniform() * WEIGHT_MAX).to_le_bytes())
            .collect(),
        // Scales lie beside them.
        Packing::E4m3 => (0..PATTERN_BYTES)
            .map(|_| e4m3_from_f32(random.uniform() * E4M3_MAX))
            .collect(),
        Packing::Q4 => (0..PATTERN_BYTES / packing.step_bytes())
            .flat_map(|_| q4_step(&mut random))
            .collect(),
    }
}

/// A step of q4 (`kernels/README.md`): nibbles, then scales and minima of 32 blocks.
fn q4_step(random: &mut Random) -> Vec<u8> {
    let [scale, min] = [2.0 * WEIGHT_MAX / Q4_MAX, -WEIGHT_MAX].map(bf16::from_f32);
    let line = [scale.to_le_bytes(), min.to_le_bytes()].concat();
    let nibbles = (0..64).flat_map(|_| random.next().to_le_bytes());
    nibbles.chain(line.repeat(32)).collect()
}

impl Patterns {
    fn new(context: &Arc<Context>) -> Result<Self, Error> {
        Ok(Self {
            stream: context.stream()?,
            made: Vec::new(),
            phase: 0,
            context: Arc::clone(context),
        })
    }

    /// Which of `made` has a format.
    fn find(&mut self, packing: Packing) -> Result<usize, Error> {
        if let Some(at) = self.made.iter().position(|(made, _)| *made == packing) {
            return Ok(at);
        }
        let buffer = self.context.upload(&pattern(packing))?;
        self.made.push((packing, buffer));
        Ok(self.made.len() - 1)
    }

    /// Fills a buffer with packed weights, and from `scales_at` on with scales.
    fn fill(&mut self, packing: Packing, buffer: &Buffer, scales_at: usize) -> Result<(), Error> {
        // Another place each time: equal weights would make all experts one.
        self.phase = (self.phase + PHASE_BYTES) % PATTERN_BYTES;
        let at = self.find(packing)?;
        let (_, pattern) = &self.made[at];
        let num_scales = (buffer.bytes() - scales_at) / size_of::<f32>();
        let scales = vec![WEIGHT_MAX / E4M3_MAX; num_scales];
        let filled = self.stream.fill_with(buffer, pattern, self.phase);
        let scaled = filled.and_then(|()| {
            let bytes = bytemuck::cast_slice(&scales);
            self.stream.write(buffer, scales_at, bytes)
        });
        scaled.map_err(failed("making random weights"))
    }

    fn matrix(&mut self, packing: Packing, rows: usize, cols: usize) -> Result<Matrix, Error> {
        let matrix = self.context.empty_dense(packing, rows, cols)?;
        self.fill(packing, matrix.buffer(), matrix.scales_at())?;
        Ok(matrix)
    }

    fn rows(&mut self, rows: usize, cols: usize) -> Result<Buffer, Error> {
        let buffer = self.context.buffer(rows * cols * 2)?;
        self.fill(Packing::Bf16, &buffer, buffer.bytes())?;
        Ok(buffer)
    }

    fn layer(&mut self) -> Result<LayerWeights, Error> {
        let g = self.context.geometry.clone();
        let q = g.num_heads * g.head_dim;
        let ones = vec![1.0_f32; g.hidden];
        let dense = self.context.formats.dense;
        // Every expert is chosen as often as the others, more or less.
        let gate: Vec<f32> = (0..g.num_experts * g.hidden)
            .map(|i| ((i * 7919 + self.phase) % 1009) as f32 / 1009.0 - 0.5)
            .collect();
        Ok(LayerWeights {
            input_norm: self.context.upload(bytemuck::cast_slice(&ones))?,
            qkv: self.matrix(dense, q + 2 * g.num_kv_heads * g.head_dim, g.hidden)?,
            o: self.matrix(dense, g.hidden, q)?,
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
        format: WeightFormat,
    ) -> Result<Self, Error> {
        let context = Arc::new(Context::new(device, geometry, format)?);
        let mut patterns = Patterns::new(&context)?;
        let ones = vec![1.0_f32; geometry.hidden];
        let weights = Weights {
            embed: patterns.rows(geometry.vocab, geometry.hidden)?,
            layers: (0..geometry.num_layers)
                .map(|_| patterns.layer())
                .collect::<Result<_, _>>()?,
            norm: context.upload(bytemuck::cast_slice(&ones))?,
            lm_head: patterns.matrix(Packing::Bf16, geometry.vocab, geometry.hidden)?,
            angles: context.upload(bytemuck::cast_slice(&angles(geometry)))?,
        };
        let experts = CudaExperts::new(Arc::clone(&context));
        let packing = context.formats.experts;
        experts.load_all(&mut |buffer, scales_at| patterns.fill(packing, buffer, scales_at))?;
        let of_layer = |layer: &LayerWeights| layer.qkv.buffer().bytes() + layer.o.buffer().bytes();
        let bytes = WeightBytes {
            layer: weights.layers.first().map_or(0, of_layer),
            expert: usize::from(geometry.num_segments()) * segment_bytes(&context),
            head: weights.lm_head.buffer().bytes(),
        };
        let core = Core::with_weights(Arc::clone(&context), weights, config)?;
        core.clear_cache()?;
        Ok(Self {
            attention: Box::new(CudaAttention::with_core(core)?),
            experts: Arc::new(experts),
            bytes,
        })
    }
}
