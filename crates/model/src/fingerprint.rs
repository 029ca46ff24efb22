//! A short name of a checkpoint's content, from samples of its files. No proof of every byte.

use sha2::{Digest as _, Sha256};

use crate::shard::Shard;
use crate::source::{Part, Source};
use crate::{Error, ModelConfig};

/// Places of each file that the fingerprint samples.
const SAMPLES: usize = 4;
/// Bytes of each sample.
const SAMPLE_BYTES: usize = 4096;

/// Configuration, places of all tensors, sizes and samples of each file.
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
        hash.update(samples(&shard.name, shard.len, |part, out| {
            shard.read(part, out, elsewhere)
        })?);
    }
    Ok(hash.finalize()[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect())
}

/// The samples of a file, one behind the other.
pub(crate) fn samples(
    name: &str,
    len: usize,
    read: impl Fn(&Part<'_>, &mut [u8]) -> Result<(), Error>,
) -> Result<Vec<u8>, Error> {
    let mut samples = Vec::new();
    for sample in 0..SAMPLES {
        let begin = len / SAMPLES * sample + len / (2 * SAMPLES);
        let (begin, end) = (begin.min(len), (begin + SAMPLE_BYTES).min(len));
        let mut bytes = vec![0; end - begin];
        let part = Part::whole(name, "a sample of it", begin as u64, bytes.len());
        read(&part, &mut bytes)?;
        samples.extend_from_slice(&bytes);
    }
    Ok(samples)
}
