//! Reads little-endian numbers and strings one after the other. Never reads behind the end, never allocates.

use crate::Error;

/// Longest string: metadata may carry whole tokenizer files.
pub(super) const STRING_BYTES_MAX: u64 = 64 << 20;

/// A place in a file.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    file: &'a str,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new<'f: 'a>(file: &'f str, bytes: &'a [u8]) -> Self {
        Self {
            file,
            bytes,
            position: 0,
        }
    }

    pub(super) fn file(&self) -> &'a str {
        self.file
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    pub(super) fn wrong(&self, what: String) -> Error {
        Error::File {
            file: self.file.to_owned(),
            what,
        }
    }

    /// What was read since `begin`.
    pub(super) fn since(&self, begin: usize) -> &'a [u8] {
        self.bytes.get(begin..self.position).unwrap_or_default()
    }

    /// The next `len` bytes, which are `what`.
    pub(super) fn take(&mut self, what: &str, len: u64) -> Result<&'a [u8], Error> {
        let end = usize::try_from(len)
            .ok()
            .and_then(|len| self.position.checked_add(len));
        let Some(bytes) = end.and_then(|end| self.bytes.get(self.position..end)) else {
            let (begin, got) = (self.position, self.bytes.len() - self.position);
            return Err(Error::Truncated {
                file: self.file.to_owned(),
                what: what.to_owned(),
                begin,
                len,
                got,
            });
        };
        self.position += bytes.len();
        Ok(bytes)
    }

    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Error> {
        let bytes = self.take(what, N as u64)?;
        // `take` gave N bytes.
        Ok(bytes.first_chunk().copied().unwrap_or([0; N]))
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A number of things, at most `max`.
    pub(super) fn count(&mut self, what: &str, max: u64) -> Result<u64, Error> {
        let count = self.u64(what)?;
        if count > max {
            return Err(self.wrong(format!("{what} is {count}, expected at most {max}")));
        }
        Ok(count)
    }

    /// The bytes of a string of at most `max` bytes.
    pub(super) fn string(&mut self, what: &str, max: u64) -> Result<&'a [u8], Error> {
        let len = self.u64(what)?;
        if len > max {
            return Err(self.wrong(format!("{what} has {len} bytes, expected at most {max}")));
        }
        self.take(what, len)
    }

    /// A name: UTF-8 of at most `max` bytes.
    pub(super) fn name(&mut self, what: &str, max: u64) -> Result<&'a str, Error> {
        let bytes = self.string(what, max)?;
        std::str::from_utf8(bytes).map_err(|_invalid| {
            let shown = String::from_utf8_lossy(bytes).into_owned();
            self.wrong(format!("{what} is {shown:?}, expected UTF-8"))
        })
    }
}
