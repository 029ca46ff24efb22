//! The reference backend: plain f32 with candle-core, one row at a time. Slow, and obviously right.
//!
//! It is the specification: every other backend is tested against it, and it against transformers.
//! Never fused, never batched: a row is computed alone, so nothing else can change its bits. Experts
//! are computed segment by segment and summed along the tree of [`tramontane_types::slice`], so
//! slicing cannot either. Only the instruction set can: candle chooses its kernel by it, so bits are
//! compared between machines of one kind.

mod attention;
mod experts;
mod ops;

use std::sync::Arc;

use tramontane_types::{ModelGeometry, slice};

use crate::{Attention, AttentionConfig, AttentionWeights, Backend, Error, Experts, RowFormat};

use attention::ReferenceAttention;
use experts::ReferenceExperts;

/// Computes in f32 on the calling thread; weights of any checkpoint type are kept as f32.
#[derive(Debug)]
pub struct ReferenceBackend {
    geometry: Arc<ModelGeometry>,
}

impl ReferenceBackend {
    /// A backend for one model.
    #[must_use]
    pub fn new(geometry: &ModelGeometry) -> Self {
        Self {
            geometry: Arc::new(geometry.clone()),
        }
    }
}

impl Backend for ReferenceBackend {
    fn numeric_class(&self) -> &str {
        "reference-f32"
    }

    fn row_format(&self) -> RowFormat {
        RowFormat::F32
    }

    fn segment_bytes(&self) -> u64 {
        let numbers = 3 * slice::segment_len(self.geometry.ff) * self.geometry.hidden;
        (numbers * size_of::<f32>()) as u64
    }

    fn attention(
        &self,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Box<dyn Attention>, Error> {
        let geometry = Arc::clone(&self.geometry);
        let attention = ReferenceAttention::new(geometry, weights, config)?;
        Ok(Box::new(attention))
    }

    fn experts(&self) -> Arc<dyn Experts> {
        Arc::new(ReferenceExperts::new(Arc::clone(&self.geometry)))
    }
}

#[cfg(test)]
mod tests;
