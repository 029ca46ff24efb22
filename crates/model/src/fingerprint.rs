//! A short name of a checkpoint's content, from samples of its files. No proof of every byte.

use sha2::{Digest as _, Sha256};

use crate::ModelConfig;
use crate::shard::Shard;

/// Places of each file that the fingerprint samples.
const SAMPLES: usize = 4;
/// Bytes of each sample.
const SAMPLE_BYTES: usize = 4096;

/// Configuration, places of all tensors, sizes and samples of each file.
pub(crate) fn fingerprint(config_text: &str, config: &ModelConfig, shards: &[Shard]) -> String {
    let mut hash = Sha256::new();
    hash.update(config_text);
    // The window is part of what is computed and may be overridden.
    hash.update(format!("{:?}", config.geometry.sliding_window));
    for shard in shards {
        let bytes = shard.bytes.get();
        hash.update(format!(
            "{} {} {:?}",
            shard.name,
            bytes.len(),
            shard.tensors
        ));
        for sample in 0..SAMPLES {
            let begin = bytes.len() / SAMPLES * sample + bytes.len() / (2 * SAMPLES);
            hash.update(&bytes[begin.min(bytes.len())..(begin + SAMPLE_BYTES).min(bytes.len())]);
        }
    }
    hash.finalize()[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}
