//! A short name of a checkpoint's content, from samples of its files. No proof of every byte.

use sha2::{Digest as _, Sha256};

use crate::ModelConfig;
use crate::shard::Shard;

/// Bytes that are read of each tensor, from its middle: a version of the weights that differs in some tensors
/// only, as after training an adapter, has another name. A thousand tensors cost a thousand page reads.
const SAMPLE_BYTES: usize = 512;

/// Configuration, sizes of all files, places and samples of all tensors.
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
        for tensor in shard.tensors.values() {
            let size = tensor.end - tensor.begin;
            let begin = tensor.begin + size.saturating_sub(SAMPLE_BYTES) / 2;
            let end = begin + size.min(SAMPLE_BYTES);
            // In range: the header was checked against the file.
            hash.update(bytes.get(begin..end).unwrap_or_default());
        }
    }
    hash.finalize()[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}
