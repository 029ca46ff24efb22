//! Where the bytes of weight files come from: a file, this program, or somebody who has them. Never maps a
//! file: one that is cut off while it is served, or that lies on a broken disk, is an error for whoever reads
//! it and not the end of the process.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::Error;

/// Reads parts of weight files. Any number of threads may call it.
pub trait Source: Send + Sync + fmt::Debug {
    /// Fills `out`, of [`Part::len`] bytes, with `part`.
    ///
    /// # Errors
    /// What went wrong with which file and tensor; then `out` holds anything.
    fn read(&self, part: &Part<'_>, out: &mut [u8]) -> Result<(), Error>;
}

/// Pieces of one file, of equal length and at equal distances.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The file's name without its directory.
    pub file: &'a str,
    /// What is read; only for people.
    pub tensor: &'a str,
    /// First byte of the first piece.
    pub begin: u64,
    /// Bytes of each piece.
    pub piece: usize,
    /// From the begin of a piece to the begin of the next; not less than `piece`.
    pub stride: u64,
    /// Pieces.
    pub count: usize,
    /// Why the file that is here was not read, when it should have been.
    pub instead_of: Option<&'a Error>,
}

impl<'a> Part<'a> {
    /// One piece.
    #[must_use]
    pub const fn whole(file: &'a str, tensor: &'a str, begin: u64, len: usize) -> Self {
        Self {
            file,
            tensor,
            begin,
            piece: len,
            stride: len as u64,
            count: 1,
            instead_of: None,
        }
    }

    /// Bytes of all pieces; `None` when nobody can count them.
    #[must_use]
    pub const fn len(&self) -> Option<usize> {
        self.piece.checked_mul(self.count)
    }

    /// Whether there is nothing to read.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.piece == 0 || self.count == 0
    }

    /// One behind the last byte in the file; `None` when nobody can count so far.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        let last = (self.count as u64)
            .checked_sub(1)?
            .checked_mul(self.stride)?;
        self.begin.checked_add(last)?.checked_add(self.piece as u64)
    }

    /// The same bytes in the same order, as parts of at most `bytes_max` in `pieces_max` pieces (none of which
    /// is 0) each.
    pub fn cut(self, bytes_max: usize, pieces_max: usize) -> impl Iterator<Item = Part<'a>> {
        let mut done = 0; // bytes
        let all = if self.is_empty() {
            0
        } else {
            self.piece * self.count
        };
        std::iter::from_fn(move || {
            if done >= all {
                return None;
            }
            let (index, inside) = (done / self.piece, done % self.piece);
            let begin = self.begin + index as u64 * self.stride + inside as u64;
            let whole_pieces = (bytes_max / self.piece).min(pieces_max);
            let (piece, count) = if inside > 0 || whole_pieces == 0 {
                ((self.piece - inside).min(bytes_max), 1)
            } else {
                (self.piece, whole_pieces.min(self.count - index))
            };
            done += piece * count;
            Some(Part {
                begin,
                piece,
                count,
                ..self
            })
        })
    }
}

/// The bytes of a file that this process can read itself.
#[derive(Debug)]
pub(crate) enum Here {
    /// A file, and where it was opened.
    File(File, String),
    /// In this program.
    Embedded(&'static [u8]),
}

impl Here {
    /// Opens a file; its length too.
    pub(crate) fn open(path: &Path) -> Result<(Self, usize), Error> {
        let shown = path.display().to_string();
        let read = |source| Error::Read {
            file: shown.clone(),
            source,
        };
        let file = File::open(path).map_err(read)?;
        let len = file.metadata().map_err(read)?.len();
        let len = usize::try_from(len).map_err(|_large| Error::File {
            file: shown.clone(),
            what: format!("has {len} bytes, more than this machine can count"),
        })?;
        Ok((Self::File(file, shown), len))
    }
}

impl Source for Here {
    fn read(&self, part: &Part<'_>, out: &mut [u8]) -> Result<(), Error> {
        let mut begin = part.begin;
        for piece in out.chunks_mut(part.piece.max(1)) {
            match self {
                Self::File(file, path) => {
                    let read = file.read_exact_at(piece, begin);
                    read.map_err(|source| Error::Read {
                        file: path.clone(),
                        source,
                    })?;
                }
                Self::Embedded(bytes) => {
                    let from = usize::try_from(begin).unwrap_or(usize::MAX);
                    let found = bytes.get(from..from.saturating_add(piece.len()));
                    piece.copy_from_slice(found.ok_or_else(|| Error::Truncated {
                        file: part.file.to_owned(),
                        what: part.tensor.to_owned(),
                        begin: from,
                        len: piece.len() as u64,
                        got: bytes.len().saturating_sub(from),
                    })?);
                }
            }
            begin = begin.saturating_add(part.stride);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz";

    fn read(part: &Part<'_>) -> String {
        let mut out = vec![0; part.len().unwrap()];
        Here::Embedded(ALPHABET).read(part, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_part_that_is_cut_has_the_same_bytes_in_the_same_order() {
        let part = Part {
            piece: 5,
            stride: 7,
            count: 3,
            ..Part::whole("x", "t", 2, 0)
        };
        assert_eq!((part.len(), part.end()), (Some(15), Some(21)));
        assert_eq!(read(&part), "cdefgjklmnqrstu");
        for bytes_max in 1..17 {
            for pieces_max in 1..4 {
                let cut: Vec<Part<'_>> = part.cut(bytes_max, pieces_max).collect();
                let fits = |p: &Part<'_>| p.len().unwrap() <= bytes_max && p.count <= pieces_max;
                assert!(cut.iter().all(fits));
                let joined: String = cut.iter().map(read).collect();
                assert_eq!(joined, read(&part), "cut at {bytes_max}");
            }
        }
        assert_eq!(part.cut(10, 9).count(), 2);
        assert_eq!(Part::whole("x", "t", 2, 0).cut(4, 9).count(), 0);
    }

    #[test]
    fn a_file_that_is_cut_off_after_it_was_opened_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, ALPHABET).unwrap();
        let (here, len) = Here::open(&path).unwrap();
        assert_eq!(len, 26);
        let part = Part::whole("weights", "t", 20, 4);
        let mut out = [0; 4];
        here.read(&part, &mut out).unwrap();
        assert_eq!(&out, b"uvwx");
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(22)
            .unwrap();
        let error = here.read(&part, &mut out).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
    }
}
