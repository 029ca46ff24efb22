//! A short name of a checkpoint's content, from samples of its files. No proof of every byte.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

use crate::shard::Shard;
use crate::source::{Part, Source};
use crate::tensors::Entry;
use crate::{Error, ModelConfig};

/// Bytes that are read of each tensor, from its middle: a version of the weights that differs in some tensors
/// only, as after training an adapter, has another name. A thousand tensors cost a thousand page reads.
const SAMPLE_BYTES: usize = 512;

/// Configuration, sizes of all files, places and samples of all tensors.
pub(crate) fn fingerprint(
    config_text: &str,
    config: &ModelConfig,
    shards: &[Shard],
    elsewhere: Option<&dyn Source>,
) -> Result<String, Error> {
    let mut hash = Sha256::new();
    hash.update(config_text);
    // The window is part of what is computed and may be overridden.
    hash.update(format!("{:?}", config.geometry.sliding_window));
    for shard in shards {
        hash.update(format!("{} {} {:?}", shard.name, shard.len, shard.tensors));
        hash.update(samples(&shard.name, &shard.tensors, |part, out| {
            shard.read(part, out, elsewhere)
        })?);
    }
    Ok(hash.finalize()[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect())
}

/// The samples of a file's tensors, one behind the other.
pub(crate) fn samples(
    name: &str,
    tensors: &BTreeMap<String, Entry>,
    read: impl Fn(&Part<'_>, &mut [u8]) -> Result<(), Error>,
) -> Result<Vec<u8>, Error> {
    let mut samples = Vec::new();
    for (tensor, entry) in tensors {
        let size = entry.end - entry.begin;
        let mut bytes = vec![0; size.min(SAMPLE_BYTES)];
        if bytes.is_empty() {
            continue;
        }
        let begin = entry.begin + (size - bytes.len()) / 2;
        let part = Part::whole(name, tensor, begin as u64, bytes.len());
        read(&part, &mut bytes)?;
        samples.extend_from_slice(&bytes);
    }
    Ok(samples)
}
