//! Opens a GGUF file, or all files of one that was split (`-00001-of-00003.gguf`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tramontane_types::{ExpertId, LayerId};

use crate::config::Architecture;
use crate::names::{Global, InExpert, InLayer, Naming};
use crate::shard::{Bytes, Shard};
use crate::tensors::Entry;
use crate::{Error, ModelConfig};

use super::config::Tables;
use super::{Header, Metadata, config, tensors};

/// Most files of one model.
const FILES_MAX: u64 = 1024;

/// Everything that a GGUF file and its continuations say.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) config: ModelConfig,
    pub(crate) shards: Vec<Shard>,
}

/// Opens `path`; of a split model, the first file.
///
/// # Errors
/// When a file is missing or damaged, or the model is not one that is computed here.
pub(crate) fn open(path: &Path) -> Result<Opened, Error> {
    let first_name = file_name(path);
    let first = Bytes::map(path)?;
    let header = Header::read(&first_name, first.get())?;
    let count = split_number(&header.metadata, "split.count", 1)?;
    if !(1..=FILES_MAX).contains(&count) {
        let rule = format!("1 to {FILES_MAX}");
        return Err(header.metadata.wrong("split.count", &rule, &count));
    }
    let promised = header.metadata.whole("split.tensors.count")?;
    let shard = |name: &str, bytes: Bytes, part: u64| {
        let header = Header::read(name, bytes.get())?;
        for (key, expected, default) in [("split.no", part, 0), ("split.count", count, 1)] {
            let got = split_number(&header.metadata, key, default)?;
            if got != expected {
                return Err(header.metadata.wrong(key, &expected.to_string(), &got));
            }
        }
        let tensors = tensors::entries(name, &header, bytes.get().len())?;
        let name = name.to_owned();
        Ok((
            header.tensors.len() as u64,
            Shard {
                name,
                bytes,
                tensors,
            },
        ))
    };
    drop(header);
    let (mut num_tensors, first) = shard(&first_name, first, 0)?;
    let mut shards = vec![first];
    for part in 1..count {
        let path = part_path(path, part, count)?;
        let (tensors, shard) = shard(&file_name(&path), Bytes::map(&path)?, part)?;
        num_tensors += tensors;
        shards.push(shard);
    }
    if let Some(promised) = promised.filter(|_| count > 1).filter(|n| *n != num_tensors) {
        return Err(Error::File {
            file: first_name,
            what: format!("split.tensors.count is {promised}, but all files hold {num_tensors}"),
        });
    }
    let config = read_config(&first_name, &shards)?;
    refuse_unknown_tensors(&config, &shards)?;
    Ok(Opened { config, shards })
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or(path.as_os_str());
    name.to_string_lossy().into_owned()
}

fn split_number(metadata: &Metadata<'_>, key: &str, default: u64) -> Result<u64, Error> {
    Ok(metadata.whole(key)?.unwrap_or(default))
}

/// Part `part`, counted from 0, beside the first one.
fn part_path(first: &Path, part: u64, count: u64) -> Result<PathBuf, Error> {
    let name = file_name(first);
    let ending = format!("-00001-of-{count:05}.gguf");
    let Some(stem) = name.strip_suffix(&ending) else {
        let what = format!("is the first of {count} files, expected a name that ends in {ending}");
        return Err(Error::File { file: name, what });
    };
    Ok(first.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", part + 1)))
}

fn read_config(file: &str, shards: &[Shard]) -> Result<ModelConfig, Error> {
    let find = |tensor| -> Option<&Entry> {
        let name = Naming::Gguf.global(tensor);
        shards.iter().find_map(|shard| shard.tensors.get(name))
    };
    let embed = find(Global::Embed).ok_or_else(|| Error::Missing {
        tensor: Naming::Gguf.global(Global::Embed).to_owned(),
        files: file.to_owned(),
    })?;
    let tables = Tables {
        vocab: embed.shape.first().copied().unwrap_or(0),
        is_tied: find(Global::LmHead).is_none(),
    };
    let bytes = shards.first().map_or(&[][..], |shard| shard.bytes.get());
    config::read(&Header::read(file, bytes)?.metadata, tables)
}

/// A tensor that nobody reads would change the result in a program that does: a bias, factors of RoPE.
fn refuse_unknown_tensors(config: &ModelConfig, shards: &[Shard]) -> Result<(), Error> {
    let known = known_tensors(config);
    for shard in shards {
        if let Some(name) = shard.tensors.keys().find(|name| !known.contains(*name)) {
            let what = "is no tensor of a Mistral or Mixtral model".to_owned();
            return Err(tensors::tensor_error(&shard.name, name, what));
        }
    }
    Ok(())
}

fn known_tensors(config: &ModelConfig) -> BTreeSet<String> {
    let names = Naming::Gguf;
    let globals = [Global::Embed, Global::Norm, Global::LmHead];
    let mut known: BTreeSet<String> = globals.map(|g| names.global(g).to_owned()).into();
    for layer in 0..config.geometry.num_layers {
        let tensors = [
            InLayer::InputNorm,
            InLayer::Q,
            InLayer::K,
            InLayer::V,
            InLayer::O,
            InLayer::PostNorm,
        ];
        known.extend(tensors.map(|tensor| names.in_layer(layer, tensor)));
        if config.architecture == Architecture::MixtralForCausalLM {
            // Of a Mixtral of one expert it decides nothing, but it is there.
            known.insert(names.in_layer(layer, InLayer::Gate));
        }
        for expert in 0..config.geometry.num_experts {
            // In range: the configuration bounds both below 2^16.
            let place = (LayerId(layer as u16), ExpertId(expert as u16));
            let matrices = [InExpert::W1, InExpert::W2, InExpert::W3];
            known.extend(matrices.map(|m| names.in_expert(config.architecture, place, m)));
        }
    }
    known
}
