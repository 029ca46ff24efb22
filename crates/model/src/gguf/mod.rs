//! GGUF files: header, metadata and tensors, checked by us before anything is used. Never trusts a length.
//!
//! Format (versions 2 and 3, little-endian): `GGUF`, version, number of tensors, number of metadata
//! entries; the entries (key, type, value); for each tensor its name, dimensions (fastest first), type and
//! offset; padding to the alignment; data. What a file says of the model is read in `config`, where its
//! tensors lie in `tensors`.

pub(crate) mod config;
mod cursor;
pub(crate) mod files;
pub mod metadata;
pub(crate) mod tensors;

pub use metadata::{Array, Metadata, Value};

use crate::Error;
use cursor::Cursor;
use tensors::TensorInfo;

/// What a file begins with.
const MAGIC: &[u8; 4] = b"GGUF";
/// Most metadata entries; published files have about 40.
pub const ENTRIES_MAX: u64 = 1 << 16;
/// Most tensors; a Mixtral 8x22B with one tensor per expert has under 2,000.
pub const TENSORS_MAX: u64 = 1 << 18;
/// Alignment of the data of a file that does not say.
const ALIGNMENT_DEFAULT: u64 = 32;
/// Largest alignment.
const ALIGNMENT_MAX: u64 = 1 << 16;
/// Key of the alignment.
const ALIGNMENT: &str = "general.alignment";

/// The checked header of one file.
#[derive(Debug)]
pub(crate) struct Header<'a> {
    pub(crate) metadata: Metadata<'a>,
    /// In file order, with distinct names; offsets count from `data_begin`.
    pub(crate) tensors: Vec<TensorInfo>,
    /// Bytes up to the last tensor's place.
    pub(crate) len: usize,
    /// First byte of the data; the last tensor's place may end the file.
    pub(crate) data_begin: usize,
    /// Every tensor begins at a multiple of it.
    pub(crate) alignment: usize,
}

impl<'a> Header<'a> {
    /// Reads the header in `bytes`, the begin of `file`.
    ///
    /// # Errors
    /// Names the file, the key or tensor, what was expected and what came; [`Error::Truncated`] when more bytes
    /// may help.
    pub(crate) fn read(file: &'a str, bytes: &'a [u8]) -> Result<Self, Error> {
        let mut cursor = Cursor::new(file, bytes);
        check_version(&mut cursor)?;
        let num_tensors = cursor.count("number of tensors", TENSORS_MAX)?;
        let num_entries = cursor.count("number of metadata entries", ENTRIES_MAX)?;
        let metadata = Metadata::read(&mut cursor, num_entries)?;
        let tensors = tensors::read_infos(&mut cursor, num_tensors)?;
        let alignment = alignment(&metadata)?;
        let len = cursor.position();
        Ok(Self {
            metadata,
            tensors,
            len,
            data_begin: len.next_multiple_of(alignment),
            alignment,
        })
    }
}

fn check_version(cursor: &mut Cursor<'_>) -> Result<(), Error> {
    let magic: [u8; 4] = cursor.array("magic")?;
    if magic != *MAGIC {
        return Err(cursor.wrong(format!("begins with {magic:?}, expected \"GGUF\"")));
    }
    let version = u32::from_le_bytes(cursor.array("version")?);
    match version {
        2 | 3 => Ok(()),
        v if matches!(v.swap_bytes(), 1..=3) => {
            Err(cursor.wrong("is big-endian, expected a little-endian GGUF".to_owned()))
        }
        v => Err(cursor.wrong(format!("has GGUF version {v}, expected 2 or 3"))),
    }
}

fn alignment(metadata: &Metadata<'_>) -> Result<usize, Error> {
    let alignment = metadata.whole(ALIGNMENT)?.unwrap_or(ALIGNMENT_DEFAULT);
    if !alignment.is_multiple_of(8) || !(8..=ALIGNMENT_MAX).contains(&alignment) {
        let rule = format!("a multiple of 8, at most {ALIGNMENT_MAX}");
        return Err(metadata.wrong(ALIGNMENT, &rule, &alignment));
    }
    // In range: at most 2^16.
    Ok(alignment as usize)
}

#[cfg(test)]
mod tests;
