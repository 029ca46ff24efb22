//! One weight file: the places of its tensors, and its bytes where this process has them. Holds none of its data.

use std::collections::BTreeMap;
use std::path::Path;

use crate::source::{Here, Part, Source};
use crate::tensors::{self, Entry};
use crate::{Error, gguf};

/// Longest header of any file, and of all files that are described: the vocabularies that GGUF files carry, many
/// times over.
pub(crate) const HEADER_BYTES_MAX: usize = 512 << 20;
/// What is read of a GGUF file first, as nothing says how long its header is.
const HEADER_BYTES_FIRST: usize = 4 << 20;
/// How much more is read of it when that was not enough.
const HEADER_GROWTH: usize = 8;

/// The kinds of weight files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Beside a `config.json`.
    Safetensors,
    /// With everything inside.
    Gguf,
}

/// One weight file.
#[derive(Debug)]
pub(crate) struct Shard {
    /// File name without its directory.
    pub(crate) name: String,
    /// Bytes of the file.
    pub(crate) len: usize,
    /// Its begin, up to the last tensor's place.
    pub(crate) header: Vec<u8>,
    pub(crate) tensors: BTreeMap<String, Entry>,
    /// `None` when this process does not have the file.
    pub(crate) here: Option<Here>,
}

impl Shard {
    /// Opens a file and reads its header.
    pub(crate) fn open(form: Form, path: &Path, name: &str) -> Result<Self, Error> {
        let (here, len) = Here::open(path)?;
        Self::of(form, name, here, len)
    }

    /// A file of this program.
    pub(crate) fn embedded(name: &str, bytes: &'static [u8]) -> Result<Self, Error> {
        Self::of(Form::Safetensors, name, Here::Embedded(bytes), bytes.len())
    }

    fn of(form: Form, name: &str, here: Here, len: usize) -> Result<Self, Error> {
        let header = read_header(form, name, &here, len)?;
        let tensors = entries(form, name, &header, len)?;
        Ok(Self {
            name: name.to_owned(),
            len,
            header,
            tensors,
            here: Some(here),
        })
    }

    /// A file that is not here, of which somebody gave the header.
    pub(crate) fn elsewhere(
        form: Form,
        name: &str,
        header: Vec<u8>,
        len: usize,
    ) -> Result<Self, Error> {
        let tensors = entries(form, name, &header, len)?;
        Ok(Self {
            name: name.to_owned(),
            len,
            header,
            tensors,
            here: None,
        })
    }

    /// Reads a part of the file: here, or where that is not possible, `elsewhere`.
    pub(crate) fn read(
        &self,
        part: &Part<'_>,
        out: &mut [u8],
        elsewhere: Option<&dyn Source>,
    ) -> Result<(), Error> {
        let failed = match &self.here {
            Some(here) => match here.read(part, out) {
                Ok(()) => return Ok(()),
                Err(error) => Some(error),
            },
            None => None,
        };
        let Some(elsewhere) = elsewhere else {
            return Err(failed.unwrap_or_else(|| Error::NotHere {
                file: part.file.to_owned(),
                tensor: part.tensor.to_owned(),
            }));
        };
        let instead_of = failed.as_ref();
        elsewhere.read(
            &Part {
                instead_of,
                ..*part
            },
            out,
        )
    }
}

/// The begin of a file, up to its data.
fn read_header(form: Form, name: &str, here: &Here, file_len: usize) -> Result<Vec<u8>, Error> {
    let begin = |len: usize| {
        let mut bytes = vec![0; len.min(file_len)];
        let part = Part::whole(name, "header", 0, bytes.len());
        here.read(&part, &mut bytes).map(|()| bytes)
    };
    if form == Form::Safetensors {
        let len = tensors::header_len(name, &begin(tensors::PREFIX_BYTES)?)?;
        return begin(len);
    }
    let mut len = HEADER_BYTES_FIRST;
    loop {
        let mut bytes = begin(len)?;
        match gguf::Header::read(name, &bytes) {
            Ok(header) => {
                let len = header.len;
                bytes.truncate(len);
                bytes.shrink_to_fit();
                return Ok(bytes);
            }
            Err(Error::Truncated { .. }) if bytes.len() < file_len.min(HEADER_BYTES_MAX) => {
                len = len.saturating_mul(HEADER_GROWTH).min(HEADER_BYTES_MAX);
            }
            Err(error) => return Err(error),
        }
    }
}

fn entries(
    form: Form,
    name: &str,
    header: &[u8],
    file_len: usize,
) -> Result<BTreeMap<String, Entry>, Error> {
    match form {
        Form::Safetensors => tensors::read_header(name, header, file_len),
        Form::Gguf => {
            let parsed = gguf::Header::read(name, header)?;
            gguf::tensors::entries(name, &parsed, file_len)
        }
    }
}
