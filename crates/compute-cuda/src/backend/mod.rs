//! The CUDA backend on the seam of [`device`](crate::device): checks the model's shape once and makes the two halves.
//!
//! Weights are packed once at load ([`context`]). A step is queued on one stream: layer by layer with the host in
//! between when rows go to other workers ([`attention`]), or whole, as a graph where it is short, when all experts
//! are here ([`step`]). The kernels give a row the same bits either way.

mod abi;
mod attention;
mod call;
mod combine;
mod context;
mod core;
mod experts;
mod format;
mod input;
mod island;
mod kernels;
mod memory;
mod norms;
mod outputs;
mod panels;
mod plan;
mod products;
mod random;
mod round;
mod step;
mod weights;

use std::sync::Arc;

use tramontane_compute::{
    Attention, AttentionConfig, AttentionWeights, Backend, Error, Experts, RowFormat, WeightFormat,
};
use tramontane_types::ModelGeometry;

use crate::device::Device;
use crate::target::Target;
use attention::CudaAttention;
use context::Context;
pub use context::check_geometry;
use experts::CudaExperts;
use format::Formats;
pub use island::{Island, Lead, RankStep, rank_segments};
pub use memory::working_bytes;
pub use random::{RandomModel, WeightBytes};

/// Computes on a GPU.
#[derive(Debug)]
pub struct CudaBackend {
    context: Arc<Context>,
    class: String,
}

impl CudaBackend {
    /// A backend for one model.
    ///
    /// # Errors
    /// When the geometry contradicts itself or there are no kernels for it or for the format, or the device has no memory left.
    pub fn new(
        device: &Arc<dyn Device>,
        geometry: &ModelGeometry,
        format: WeightFormat,
    ) -> Result<Self, Error> {
        let context = Arc::new(Context::new(device, geometry, format)?);
        let class = device.info().target.class(context.formats.class);
        let name = &device.info().name;
        tracing::info!(name, class, "cuda backend ready");
        Ok(Self { context, class })
    }

    /// Whom steps are computed with from the next one on; `None`: nobody.
    pub fn join(&self, island: Option<Arc<Island>>) {
        self.context.join(island);
    }

    /// The attention of a rank that follows.
    ///
    /// # Errors
    /// As [`Backend::attention`].
    pub fn follower(
        &self,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<RankAttention, Error> {
        let attention = CudaAttention::new(Arc::clone(&self.context), weights, config)?;
        Ok(RankAttention(attention))
    }
}

/// The stateful half of a rank that follows: it computes what it is told, and no logits.
#[derive(Debug)]
pub struct RankAttention(CudaAttention);

impl RankAttention {
    /// Computes one step together with the ranks of the island that the backend has joined.
    ///
    /// # Errors
    /// When it cannot be computed here, or a rank is lost; the ranks have parted then.
    pub fn follow(&mut self, step: RankStep<'_>, experts: &dyn Experts) -> Result<(), Error> {
        self.0.follow(step, experts)
    }
}

/// Refuses a format that there are no kernels for on a target, or on any.
///
/// # Errors
/// With those that there are.
pub fn check_format(format: WeightFormat, target: Option<Target>) -> Result<(), Error> {
    Formats::of(format, target).map(|_| ())
}

impl Backend for CudaBackend {
    fn numeric_class(&self) -> &str {
        &self.class
    }

    fn row_format(&self) -> RowFormat {
        RowFormat::Bf16
    }

    fn segment_bytes(&self) -> u64 {
        experts::segment_bytes(&self.context) as u64
    }

    fn attention(
        &self,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Box<dyn Attention>, Error> {
        let attention = CudaAttention::new(Arc::clone(&self.context), weights, config)?;
        Ok(Box::new(attention))
    }

    fn experts(&self) -> Arc<dyn Experts> {
        Arc::new(CudaExperts::new(Arc::clone(&self.context)))
    }
}
