//! Opens a GGUF file, or all files of one that was split (`-00001-of-00003.gguf`).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tramontane_types::{ExpertId, LayerId};

use crate::config::Architecture;
use crate::names::{Global, InExpert, InLayer, Naming};
use crate::shard::{Form, Shard};
use crate::tensors::Entry;
use crate::{Error, ModelConfig};

use super::config::Tables;
use super::{Header, Metadata, config, tensors};

/// Most files of one model.
const FILES_MAX: u64 = 1024;

/// Opens `path`; of a split model all files, `path` being the first.
///
/// # Errors
/// When a file is missing or damaged.
pub(crate) fn open(path: &Path) -> Result<Vec<Shard>, Error> {
    let mut shards = vec![Shard::open(Form::Gguf, path, &file_name(path))?];
    let count = count_of(&shards)?;
    for part in 0..count {
        if part > 0 {
            let path = part_path(path, part, count)?;
            shards.push(Shard::open(Form::Gguf, &path, &file_name(&path))?);
        }
        if let Some(last) = shards.last() {
            check_part(last, part, count)?;
        }
    }
    Ok(shards)
}

/// Whether all files are there and belong together, and what model they say that they hold.
///
/// # Errors
/// When they do not, or the model is not one that is computed here.
pub(crate) fn check(shards: &[Shard]) -> Result<ModelConfig, Error> {
    let (count, mut num_tensors) = (count_of(shards)?, 0);
    let (mut promised, mut first_name) = (None, "");
    for (part, shard) in (0..).zip(shards) {
        check_part(shard, part, count)?;
        let header = Header::read(&shard.name, &shard.header)?;
        if part == 0 {
            promised = header.metadata.whole("split.tensors.count")?;
            first_name = &shard.name;
        }
        num_tensors += header.tensors.len() as u64;
    }
    let wrong = |what: String| Error::File {
        file: first_name.to_owned(),
        what,
    };
    if shards.len() as u64 != count {
        let got = shards.len();
        return Err(wrong(format!(
            "is the first of {count} files, {got} are there"
        )));
    }
    if let Some(promised) = promised.filter(|_| count > 1).filter(|n| *n != num_tensors) {
        return Err(wrong(format!(
            "split.tensors.count is {promised}, but all files hold {num_tensors}"
        )));
    }
    let config = read_config(first_name, shards)?;
    refuse_unknown_tensors(&config, shards)?;
    Ok(config)
}

/// Whether a file says that it is this part of so many.
fn check_part(shard: &Shard, part: u64, count: u64) -> Result<(), Error> {
    let metadata = Header::read(&shard.name, &shard.header)?.metadata;
    for (key, expected, default) in [("split.no", part, 0), ("split.count", count, 1)] {
        let got = split_number(&metadata, key, default)?;
        if got != expected {
            return Err(metadata.wrong(key, &expected.to_string(), &got));
        }
    }
    Ok(())
}

/// How many files the first one says that there are.
fn count_of(shards: &[Shard]) -> Result<u64, Error> {
    let Some(first) = shards.first() else {
        return Ok(0);
    };
    let metadata = Header::read(&first.name, &first.header)?.metadata;
    let count = split_number(&metadata, "split.count", 1)?;
    if !(1..=FILES_MAX).contains(&count) {
        let rule = format!("1 to {FILES_MAX}");
        return Err(metadata.wrong("split.count", &rule, &count));
    }
    Ok(count)
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
    let bytes = shards.first().map_or(&[][..], |shard| &shard.header[..]);
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
