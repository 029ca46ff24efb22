//! A model of a few integers: every token depends on all tokens before it, on every segment of the experts
//! that it chose, and on the version of the weights. A lost, repeated or changed token or segment changes all
//! that follows, and so does one of another version.

use std::sync::Arc;

use tramontane_coordination::Version;
use tramontane_types::{ExpertId, LayerId, ModelGeometry, SEGMENTS_PER_EXPERT, TokenId};

use crate::rng::mix;

/// Layers.
pub const NUM_LAYERS: usize = 2;
/// Experts per layer.
pub const NUM_EXPERTS: usize = 4;
/// Experts per token and layer.
pub const TOP_K: usize = 2;
/// Token ids are below this and above [`TOKEN_MIN`]: none of them ends an answer.
const TOKEN_SPAN: u64 = 200;
/// The first ids of a vocabulary are control tokens.
const TOKEN_MIN: u64 = 20;
/// Sums of so small integers are exact in f32.
const OUTPUT_SPAN: u64 = 1 << 12;

/// The shape that exchange and experts see.
#[must_use]
pub const fn geometry() -> ModelGeometry {
    ModelGeometry {
        hidden: 1,
        num_layers: NUM_LAYERS,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 2,
        ff: 256,
        num_experts: NUM_EXPERTS,
        top_k: TOP_K,
        vocab: 256,
        rope_theta: 1e4,
        rms_eps: 1e-5,
        sliding_window: None,
        max_positions: 1024,
    }
}

/// Versions of the weights that there are.
pub const NUM_VERSIONS: u8 = 2;

/// The name of a version.
#[must_use]
pub fn version(number: u8) -> Version {
    Version {
        model: Arc::from(format!("sim{number}")),
        numeric_class: Arc::from("simulated"),
    }
}

/// All tokens so far, under one version of the weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    state: u64,
    version: u8,
}

impl Prefix {
    /// Nothing yet, of a sequence with this seed.
    #[must_use]
    pub const fn new(seed: u64, version: u8) -> Self {
        Self {
            state: mix(seed ^ 0x5eed),
            version,
        }
    }

    /// With one more token.
    #[must_use]
    pub const fn with(self, token: TokenId) -> Self {
        Self {
            state: mix(self.state ^ mix(token as u64 + 1)),
            version: self.version,
        }
    }

    /// The version of the weights.
    #[must_use]
    pub const fn version(self) -> u8 {
        self.version
    }

    /// The row that goes to the experts of a layer: 32 bits.
    #[must_use]
    pub const fn row(self, layer: LayerId) -> u32 {
        mix(self.state ^ (layer.0 as u64 + 77)) as u32
    }

    /// The token that follows, given what the experts returned in all layers.
    #[must_use]
    pub fn token(self, outputs: u64) -> TokenId {
        (TOKEN_MIN + mix(self.state ^ mix(outputs)) % TOKEN_SPAN) as TokenId
    }

    /// The token that follows, computed without a cluster.
    #[must_use]
    pub fn next_token(self) -> TokenId {
        let mut outputs = 0;
        for layer in (0..NUM_LAYERS as u16).map(LayerId) {
            let row = self.row(layer);
            let experts = chosen(row);
            let of = |expert| {
                (0..SEGMENTS_PER_EXPERT)
                    .map(move |s| segment(self.version, (layer, expert, s), row))
            };
            let sum: u64 = experts.into_iter().flat_map(of).sum();
            outputs = fold(outputs, sum);
        }
        self.token(outputs)
    }
}

/// The experts that a row chooses, ascending.
#[must_use]
pub const fn chosen(row: u32) -> [ExpertId; TOP_K] {
    let first = mix(row as u64) % NUM_EXPERTS as u64;
    let second = (first + 1 + mix(row as u64 ^ 9) % (NUM_EXPERTS as u64 - 1)) % NUM_EXPERTS as u64;
    if first < second {
        [ExpertId(first as u16), ExpertId(second as u16)]
    } else {
        [ExpertId(second as u16), ExpertId(first as u16)]
    }
}

/// What one segment of an expert of a version returns for a row.
#[must_use]
pub const fn segment(version: u8, place: (LayerId, ExpertId, u8), row: u32) -> u64 {
    let (layer, expert, segment) = place;
    let layer = (version as u64) << 16 | layer.0 as u64;
    let place = layer << 32 | (expert.0 as u64) << 16 | segment as u64;
    mix(mix(place + 1) ^ row as u64) % OUTPUT_SPAN
}

/// The outputs of all layers in one number.
#[must_use]
pub const fn fold(outputs: u64, layer: u64) -> u64 {
    mix(outputs ^ mix(layer + 3))
}
