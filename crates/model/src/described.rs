//! A checkpoint that is opened without its files: somebody who has them describes it, and is asked for the rest.
//!
//! The description is no second format: it has `config.json` and says how long each file and its header are.
//! The headers themselves are read and checked as those of files are, and so is the fingerprint, which is
//! made of them. So whoever describes a checkpoint is trusted with nothing that its files are not.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{Origin, Overrides, Parts, SHARDS_MAX, is_plain_name};
use crate::config::CONFIG_BYTES_MAX;
use crate::fingerprint::samples;
use crate::shard::{Form, HEADER_BYTES_MAX, Shard};
use crate::source::{Here, Part, Source};
use crate::{Checkpoint, Error, ModelConfig, gguf};

/// What somebody must know of a checkpoint to open it without its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// [`Checkpoint::fingerprint`].
    pub fingerprint: String,
    /// What its files are.
    pub form: Form,
    /// `config.json`; empty where the files say it themselves.
    pub config: String,
    /// The window that is computed with.
    pub sliding_window: Option<usize>,
    /// Its weight files, in order.
    pub files: Vec<FileDescription>,
}

/// One weight file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDescription {
    /// Without a directory.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Bytes up to its data.
    pub header_bytes: u64,
    /// Whether who describes it has it.
    pub is_here: bool,
}

impl Checkpoint {
    /// For somebody who wants to open it without its files.
    #[must_use]
    pub fn describe(&self) -> Description {
        let form = self.form();
        let files = self.shards().iter().map(|shard| FileDescription {
            name: shard.name.clone(),
            bytes: shard.len as u64,
            header_bytes: shard.header.len() as u64,
            is_here: shard.here.is_some(),
        });
        Description {
            fingerprint: self.fingerprint().to_owned(),
            form,
            config: match form {
                Form::Safetensors => self.config_text().to_owned(),
                Form::Gguf => String::new(),
            },
            sliding_window: self.geometry().sliding_window,
            files: files.collect(),
        }
    }

    /// Opens what is described. Files of `directory` that are the same are read from there, everything else
    /// from `elsewhere`.
    ///
    /// # Errors
    /// When `elsewhere` does not give what is described, or that is no checkpoint that is computed here.
    pub fn open_described(
        description: &Description,
        directory: Option<&Path>,
        elsewhere: Arc<dyn Source>,
    ) -> Result<Self, Error> {
        check_limits(description)?;
        let form = description.form;
        let mut shards = Vec::new();
        for file in &description.files {
            shards.push(open_file(form, file, directory, &*elsewhere)?);
        }
        let (config, config_text) = match form {
            Form::Safetensors => (
                ModelConfig::parse(&description.config)?,
                description.config.clone(),
            ),
            Form::Gguf => {
                let config = gguf::files::check(&shards)?;
                let text = format!("{config:?}");
                (config, text)
            }
        };
        let checkpoint = Self::assemble(Parts {
            config,
            config_text,
            origin: Origin::Elsewhere(form),
            shards,
            overrides: Overrides {
                sliding_window: Some(description.sliding_window),
            },
            elsewhere: Some(elsewhere),
        })?;
        if checkpoint.fingerprint() == description.fingerprint {
            return Ok(checkpoint);
        }
        Err(Error::Fingerprint {
            expected: description.fingerprint.clone(),
            got: checkpoint.fingerprint().to_owned(),
        })
    }

    /// Weight files that this process can read itself, and how many there are.
    #[must_use]
    pub fn files_here(&self) -> (usize, usize) {
        let here = self.shards().iter().filter(|shard| shard.here.is_some());
        (here.count(), self.shards().len())
    }

    /// Reads a part of a file that is here, and asks nobody else.
    ///
    /// # Errors
    /// [`Error::NotHere`] when it is not; otherwise what is wrong with the part or the file.
    pub fn read_here(&self, part: &Part<'_>, out: &mut [u8]) -> Result<(), Error> {
        let shard = self.shards().iter().find(|shard| shard.name == part.file);
        let Some(shard) = shard else {
            return Err(Error::NotHere {
                file: part.file.to_owned(),
                tensor: part.tensor.to_owned(),
            });
        };
        let end = part.end().filter(|end| *end <= shard.len as u64);
        if part.is_empty() || end.is_none() || part.len() != Some(out.len()) {
            return Err(Error::Tensor {
                file: part.file.to_owned(),
                tensor: part.tensor.to_owned(),
                what: format!(
                    "{} pieces of {} bytes, {} apart from byte {} on, are not {} bytes of a file of {}",
                    part.count,
                    part.piece,
                    part.stride,
                    part.begin,
                    out.len(),
                    shard.len
                ),
            });
        }
        shard.read(part, out, None)
    }
}

/// What is described is memory of ours before it is checked: none of it may be larger than in a real checkpoint.
fn check_limits(description: &Description) -> Result<(), Error> {
    let wrong = |file: &str, what: String| Error::File {
        file: file.to_owned(),
        what,
    };
    let (num_files, config) = (description.files.len(), description.config.len() as u64);
    if num_files == 0 || num_files > SHARDS_MAX {
        let what = format!("{num_files} files, expected 1 to {SHARDS_MAX}");
        return Err(wrong("the description", what));
    }
    if config > CONFIG_BYTES_MAX {
        let what = format!("has {config} bytes, expected at most {CONFIG_BYTES_MAX}");
        return Err(wrong("config.json", what));
    }
    let mut room = HEADER_BYTES_MAX as u64;
    for file in &description.files {
        let (header, max) = (file.header_bytes, file.bytes.min(room));
        if !is_plain_name(&file.name) || header > max {
            let what = format!("with a header of {header} bytes is no weight file, at most {max}");
            return Err(wrong(&file.name, what));
        }
        room -= header;
    }
    Ok(())
}

/// A file of `directory` if it has the header and samples that `elsewhere` has; otherwise the one there.
fn open_file(
    form: Form,
    file: &FileDescription,
    directory: Option<&Path>,
    elsewhere: &dyn Source,
) -> Result<Shard, Error> {
    let len = usize::try_from(file.bytes).map_err(|_large| Error::File {
        file: file.name.clone(),
        what: format!("has {} bytes, more than this machine can count", file.bytes),
    })?;
    // In range: compared with the limit.
    let mut header = vec![0; file.header_bytes as usize];
    let part = Part::whole(&file.name, "header", 0, header.len());
    elsewhere.read(&part, &mut header)?;
    let mut shard = Shard::elsewhere(form, &file.name, header, len)?;
    if let Some(directory) = directory
        && let Ok((here, here_len)) = Here::open(&directory.join(&file.name))
        && here_len == len
        && is_same(&here, &shard, elsewhere)?
    {
        shard.here = Some(here);
    }
    Ok(shard)
}

/// Whether a file has the header and samples of the one elsewhere. One that cannot be read does not.
fn is_same(here: &Here, shard: &Shard, elsewhere: &dyn Source) -> Result<bool, Error> {
    let (name, tensors) = (&shard.name, &shard.tensors);
    let mut own = vec![0; shard.header.len()];
    let part = Part::whole(name, "header", 0, own.len());
    if here.read(&part, &mut own).is_err() || own != shard.header {
        return Ok(false);
    }
    let Ok(own) = samples(name, tensors, |part, out| here.read(part, out)) else {
        return Ok(false);
    };
    Ok(own == samples(name, tensors, |part, out| elsewhere.read(part, out))?)
}
