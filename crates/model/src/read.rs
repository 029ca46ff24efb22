//! The bytes of tensors between file and backend: read when they are to be packed, dropped right after.

use std::borrow::Cow;
use std::ops::Range;

use tramontane_compute::{
    AttentionLayerWeights, AttentionWeights, DType, ExpertWeights, HostTensor, RowOrder,
};
use tramontane_types::slice::segment_columns;
use tramontane_types::{ExpertId, LayerId, SegmentRange};

use crate::names::{Global, InLayer, Naming};
use crate::shard::Shard;
use crate::source::{Here, Part};
use crate::tensors::Entry;
use crate::{Checkpoint, Error};

/// Rows and columns of a matrix; those behind its end do not count.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl Window {
    /// Every row and column.
    pub(crate) const WHOLE: Self = Self {
        rows: 0..usize::MAX,
        cols: 0..usize::MAX,
    };
}

/// One tensor, or the window of it that was asked for. What lies outside the window is zero, and takes no
/// memory where pages are given out when they are written.
#[derive(Debug)]
pub(crate) struct TensorBytes {
    dtype: DType,
    rows: usize,
    cols: usize,
    order: RowOrder,
    data: Cow<'static, [u8]>,
}

impl TensorBytes {
    pub(crate) fn view(&self) -> HostTensor<'_> {
        HostTensor {
            dtype: self.dtype,
            rows: self.rows,
            cols: self.cols,
            order: self.order,
            data: &self.data,
        }
    }
}

/// Everything but the experts, read and not yet packed.
#[derive(Debug)]
pub struct AttentionBytes {
    embed: TensorBytes,
    layers: Vec<LayerBytes>,
    norm: TensorBytes,
    /// `None` when it is the embedding.
    lm_head: Option<TensorBytes>,
}

#[derive(Debug)]
struct LayerBytes {
    input_norm: TensorBytes,
    q: TensorBytes,
    k: TensorBytes,
    v: TensorBytes,
    o: TensorBytes,
    post_norm: TensorBytes,
    gate: Option<TensorBytes>,
}

impl AttentionBytes {
    /// What a backend packs.
    #[must_use]
    pub fn weights(&self) -> AttentionWeights<'_> {
        let layers = self.layers.iter().map(|layer| AttentionLayerWeights {
            input_norm: layer.input_norm.view(),
            q: layer.q.view(),
            k: layer.k.view(),
            v: layer.v.view(),
            o: layer.o.view(),
            post_norm: layer.post_norm.view(),
            gate: layer.gate.as_ref().map(TensorBytes::view),
        });
        AttentionWeights {
            embed: self.embed.view(),
            layers: layers.collect(),
            norm: self.norm.view(),
            lm_head: self.lm_head.as_ref().unwrap_or(&self.embed).view(),
        }
    }
}

/// Some segments of one expert, read and not yet packed.
#[derive(Debug)]
pub struct ExpertBytes {
    w1: TensorBytes,
    w2: TensorBytes,
    w3: TensorBytes,
}

impl ExpertBytes {
    /// What a backend packs: these segments and no others.
    #[must_use]
    pub fn weights(&self) -> ExpertWeights<'_> {
        ExpertWeights {
            w1: self.w1.view(),
            w2: self.w2.view(),
            w3: self.w3.view(),
        }
    }
}

impl Checkpoint {
    /// Reads everything but the experts.
    ///
    /// # Errors
    /// When a tensor cannot be read, here or elsewhere.
    pub fn attention_weights(&self) -> Result<AttentionBytes, Error> {
        let (g, names) = (self.geometry(), self.naming());
        let pairs = match names {
            Naming::HuggingFace => RowOrder::Plain,
            Naming::Gguf => RowOrder::RotaryPairs {
                head_dim: g.head_dim,
            },
        };
        let read = |name: &str| self.read(name, &Window::WHOLE);
        let mut layers = Vec::with_capacity(g.num_layers);
        for layer in 0..g.num_layers {
            let read = |tensor| read(&names.in_layer(layer, tensor));
            let rotary = |tensor| -> Result<TensorBytes, Error> {
                let order = pairs;
                Ok(TensorBytes {
                    order,
                    ..read(tensor)?
                })
            };
            layers.push(LayerBytes {
                input_norm: read(InLayer::InputNorm)?,
                q: rotary(InLayer::Q)?,
                k: rotary(InLayer::K)?,
                v: read(InLayer::V)?,
                o: read(InLayer::O)?,
                post_norm: read(InLayer::PostNorm)?,
                gate: g.has_gate().then(|| read(InLayer::Gate)).transpose()?,
            });
        }
        let is_tied = self.config().tie_word_embeddings;
        let lm_head = (!is_tied).then(|| read(names.global(Global::LmHead)));
        Ok(AttentionBytes {
            embed: read(names.global(Global::Embed))?,
            layers,
            norm: read(names.global(Global::Norm))?,
            lm_head: lm_head.transpose()?,
        })
    }

    /// Reads segments of one expert; of the feed-forward block for expert 0 of a dense model.
    ///
    /// # Errors
    /// When the expert does not exist, or a tensor cannot be read, here or elsewhere.
    pub fn expert_weights(
        &self,
        layer: LayerId,
        expert: ExpertId,
        range: SegmentRange,
    ) -> Result<ExpertBytes, Error> {
        let [w1, w2, w3] = self.expert_names(layer, expert)?;
        let ff = self.geometry().ff;
        let columns = segment_columns(ff, range.begin()).start
            ..segment_columns(ff, range.end().saturating_sub(1)).end;
        let rows = Window {
            rows: columns.clone(),
            ..Window::WHOLE
        };
        let cols = Window {
            cols: columns,
            ..Window::WHOLE
        };
        Ok(ExpertBytes {
            w1: self.read(&w1, &rows)?,
            w2: self.read(&w2, &cols)?,
            w3: self.read(&w3, &rows)?,
        })
    }

    /// Reads a tensor whose shape was checked.
    fn read(&self, name: &str, window: &Window) -> Result<TensorBytes, Error> {
        let (shard, entry) = self.find(name)?;
        self.read_entry(shard, name, entry, window)
    }

    pub(crate) fn read_entry(
        &self,
        shard: &Shard,
        name: &str,
        entry: &Entry,
        window: &Window,
    ) -> Result<TensorBytes, Error> {
        let len = entry.end - entry.begin;
        let cols = entry.shape.last().copied().unwrap_or(1).max(1);
        // In range: whole rows were compared with the length.
        let row_bytes = entry.dtype.row_bytes(cols).unwrap_or(len).max(1);
        let tensor = |data| TensorBytes {
            dtype: entry.dtype,
            rows: len / row_bytes,
            cols,
            order: RowOrder::Plain,
            data,
        };
        if let Some(Here::Embedded(bytes)) = &shard.here
            && let Some(data) = bytes.get(entry.begin..entry.end)
        {
            return Ok(tensor(Cow::Borrowed(data)));
        }
        let rows = window.rows.start.min(len / row_bytes)..window.rows.end.min(len / row_bytes);
        let in_row = bytes_in_row(entry.dtype, cols, &window.cols);
        let mut data = vec![0; len];
        let part = Part {
            piece: in_row.len(),
            stride: row_bytes as u64,
            count: rows.len(),
            ..Part::whole(
                &shard.name,
                name,
                (entry.begin + rows.start * row_bytes + in_row.start) as u64,
                0,
            )
        };
        if in_row.len() == row_bytes {
            // Rows without a gap are one piece.
            let filled = &mut data[rows.start * row_bytes..rows.end * row_bytes];
            let part = Part::whole(&shard.name, name, part.begin, filled.len());
            if !part.is_empty() {
                shard.read(&part, filled, self.elsewhere())?;
            }
        } else if !part.is_empty() {
            let mut packed = vec![0; part.piece * part.count];
            shard.read(&part, &mut packed, self.elsewhere())?;
            for (row, piece) in rows.zip(packed.chunks_exact(part.piece)) {
                let begin = row * row_bytes + in_row.start;
                data[begin..begin + piece.len()].copy_from_slice(piece);
            }
        }
        Ok(tensor(Cow::Owned(data)))
    }
}

/// The bytes of a row that hold some of its columns: whole blocks.
fn bytes_in_row(dtype: DType, cols: usize, wanted: &Range<usize>) -> Range<usize> {
    let block = dtype.block_len();
    let first = wanted.start.min(cols) / block;
    let last = wanted.end.min(cols).div_ceil(block);
    let bytes = dtype.block_bytes();
    first * bytes..last.max(first) * bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_row_are_read_as_whole_blocks() {
        for (dtype, wanted, expected) in [
            (DType::Bf16, 0..usize::MAX, 0..1024),
            (DType::Bf16, 32..64, 64..128),
            (DType::Q8_0, 32..96, 34..102),
            (DType::Q4K, 32..96, 0..144),
            (DType::Q4K, 224..288, 0..288),
            (DType::F32, 512..512, 2048..2048),
        ] {
            assert_eq!(bytes_in_row(dtype, 512, &wanted), expected, "{dtype:?}");
        }
    }
}
