//! One weight file: mapped or built in, with the places of its tensors. Copies nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use crate::Error;
use crate::tensors::Entry;

/// One weight file.
#[derive(Debug)]
pub(crate) struct Shard {
    /// File name without its directory.
    pub(crate) name: String,
    pub(crate) bytes: Bytes,
    pub(crate) tensors: BTreeMap<String, Entry>,
}

impl Shard {
    /// Bytes of the file.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.get().len() as u64
    }
}

/// Content of a file: mapped, or built in.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    /// Maps a file.
    pub(crate) fn map(path: &Path) -> Result<Self, Error> {
        let read = |source| Error::Read {
            file: path.display().to_string(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        #[expect(
            unsafe_code,
            reason = "the one memory map: weights are larger than memory may be"
        )]
        // SAFETY: the map is only read. A process that truncates a checkpoint while it is served ends this one
        // with SIGBUS, as it would any program that maps its input; README and docs say not to.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(read)?;
        Ok(Self::Mapped(map))
    }

    pub(crate) fn get(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}
