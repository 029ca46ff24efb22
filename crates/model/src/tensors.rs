//! Safetensors files: the header is checked by us, completely, before a tensor is looked at.
//!
//! Format: 8 bytes little-endian length of a JSON header, the header, then the data; the header maps each
//! name to `{dtype, shape, data_offsets}`. The offsets of all tensors must tile the data without hole or
//! overlap. Duplicate names are refused (JSON libraries keep the last silently).

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{MapAccess, Visitor};
use tramontane_compute::DType;

use crate::Error;

/// Longest header; that of the largest published models is under 1 MiB.
pub const HEADER_BYTES_MAX: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Element type.
    pub dtype: DType,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub begin: usize,
    /// One behind the last byte in the file.
    pub end: usize,
}

/// Bytes that the length of the header takes.
pub(crate) const PREFIX_BYTES: usize = 8;

/// Bytes of a file up to its data, by its first [`PREFIX_BYTES`].
///
/// # Errors
/// When `prefix` is shorter, or the header longer than any.
pub(crate) fn header_len(file: &str, prefix: &[u8]) -> Result<usize, Error> {
    let wrong = |what: String| Error::File {
        file: file.to_owned(),
        what,
    };
    let Some(len) = prefix.first_chunk() else {
        return Err(wrong(format!(
            "has {} bytes, expected at least {PREFIX_BYTES} (safetensors)",
            prefix.len()
        )));
    };
    let len = u64::from_le_bytes(*len);
    if len > HEADER_BYTES_MAX {
        return Err(wrong(format!(
            "header of {len} bytes, expected at most {HEADER_BYTES_MAX}"
        )));
    }
    Ok(PREFIX_BYTES + len as usize)
}

/// Reads and checks the header in `bytes`, the begin of a file of `file_len` bytes.
///
/// # Errors
/// Names the file, the tensor and the numbers that do not fit.
pub fn read_header(
    file: &str,
    bytes: &[u8],
    file_len: usize,
) -> Result<BTreeMap<String, Entry>, Error> {
    let wrong = |what: String| Error::File {
        file: file.to_owned(),
        what,
    };
    let data_begin = header_len(file, bytes)?;
    let Some(header) = bytes.get(PREFIX_BYTES..data_begin) else {
        let (len, got) = (data_begin - PREFIX_BYTES, bytes.len() - PREFIX_BYTES);
        return Err(wrong(format!(
            "is truncated: header of {len} bytes expected, {got} bytes follow"
        )));
    };
    let Header(raw) = serde_json::from_slice(header).map_err(|e| wrong(format!("header: {e}")))?;
    let mut entries = BTreeMap::new();
    for (name, tensor) in raw {
        let entry = tensor.check(file, &name, data_begin)?;
        entries.insert(name, entry);
    }
    tile(file, &entries, data_begin, file_len)?;
    Ok(entries)
}

/// The tensors must cover the data of the file exactly once.
fn tile(
    file: &str,
    entries: &BTreeMap<String, Entry>,
    begin: usize,
    end: usize,
) -> Result<(), Error> {
    let mut order: Vec<(&String, &Entry)> = entries.iter().collect();
    order.sort_by_key(|(_, entry)| (entry.begin, entry.end));
    let mut next = begin;
    for (name, entry) in order {
        if entry.begin != next {
            let what = format!(
                "begins at byte {}, expected {next} (no hole, no overlap)",
                entry.begin
            );
            return Err(Error::Tensor {
                file: file.to_owned(),
                tensor: name.clone(),
                what,
            });
        }
        if entry.end > end {
            let what = format!(
                "file is truncated: tensor ends at byte {}, expected at most {end}",
                entry.end
            );
            return Err(Error::Tensor {
                file: file.to_owned(),
                tensor: name.clone(),
                what,
            });
        }
        next = entry.end;
    }
    if next != end {
        let what = format!("has {end} bytes, expected {next} by its header");
        return Err(Error::File {
            file: file.to_owned(),
            what,
        });
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl RawTensor {
    fn check(self, file: &str, tensor: &str, data_begin: usize) -> Result<Entry, Error> {
        let wrong = |what: String| Error::Tensor {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            what,
        };
        let dtype = match self.dtype.as_str() {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::Bf16,
            other => {
                return Err(wrong(format!(
                    "has type {other}, expected F32, F16 or BF16"
                )));
            }
        };
        // One number is one block.
        let mut size = dtype.block_bytes() as u64;
        for &dimension in &self.shape {
            size = size
                .checked_mul(dimension)
                .ok_or_else(|| wrong(format!("shape {:?} overflows", self.shape)))?;
        }
        let (begin, end) = self.data_offsets;
        if end.checked_sub(begin) != Some(size) {
            let shape = &self.shape;
            return Err(wrong(format!(
                "bytes {begin}..{end} do not hold {size} bytes (shape {shape:?})"
            )));
        }
        let at = |offset: u64| {
            usize::try_from(offset)
                .ok()
                .and_then(|o| o.checked_add(data_begin))
        };
        let (Some(begin), Some(end)) = (at(begin), at(end)) else {
            return Err(wrong(format!("offset {end} overflows")));
        };
        let shape = self.shape.iter().map(|&d| d as usize).collect();
        Ok(Entry {
            dtype,
            shape,
            begin,
            end,
        })
    }
}

/// A header in file order, with duplicate names refused.
struct Header(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut seen = std::collections::HashSet::new();
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(serde::de::Error::custom(format!(
                    "tensor {name} is listed twice"
                )));
            }
            if name == "__metadata__" {
                map.next_value::<serde::de::IgnoredAny>()?;
            } else {
                let tensor = map.next_value::<RawTensor>();
                let named = |e: A::Error| serde::de::Error::custom(format!("tensor {name}: {e}"));
                tensors.push((name.clone(), tensor.map_err(named)?));
            }
        }
        Ok(Header(tensors))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_whole(file: &str, bytes: &[u8]) -> Result<BTreeMap<String, Entry>, Error> {
        read_header(file, bytes, bytes.len())
    }

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 1);
        bytes
    }

    fn refused(header: &str, data: usize) -> String {
        read_whole("x.safetensors", &file(header, data))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_good_header_is_read() {
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[],"data_offsets":[24,26]}}"#;
        let entries = read_whole("x", &file(header, 26)).unwrap();
        assert_eq!(entries["a"].shape, [2, 3]);
        assert_eq!(entries["b"].end - entries["b"].begin, 2);
    }

    #[test]
    fn hostile_headers_are_refused_with_file_and_tensor() {
        let a = |shape: &str, offsets: &str| {
            format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
        };
        for (text, part) in [
            (refused(&a("[2]", "[0,8]"), 7), "truncated"),
            (refused(&a("[2]", "[0,8]"), 9), "has 71 bytes, expected 70"),
            (refused(&a("[2]", "[4,12]"), 12), "no hole"),
            (refused(&a("[3]", "[0,8]"), 8), "do not hold 12 bytes"),
            (refused(&a("[2]", "[8,0]"), 8), "do not hold"),
            (
                refused(&a("[4294967296,4294967296]", "[0,8]"), 8),
                "overflows",
            ),
            (refused(&a("[-1]", "[0,8]"), 8), "tensor a"),
            (
                refused(
                    r#"{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}"#,
                    8,
                ),
                "type I64",
            ),
            (
                refused(
                    r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                    4,
                ),
                "listed twice",
            ),
            (
                refused(
                    r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}"#,
                    6,
                ),
                "no overlap",
            ),
            (refused("[]", 0), "map of tensors"),
        ] {
            assert!(
                text.contains(part) && text.contains("x.safetensors"),
                "{text:?} does not say {part:?}"
            );
        }
        assert!(read_whole("x", &[1, 2, 3]).is_err());
        assert!(
            read_whole("x", &u64::MAX.to_le_bytes())
                .unwrap_err()
                .to_string()
                .contains("at most")
        );
        assert!(
            read_whole("x", &100_u64.to_le_bytes())
                .unwrap_err()
                .to_string()
                .contains("truncated")
        );
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = read_whole("x", &bytes);
            let mut framed = (bytes.len() as u64).to_le_bytes().to_vec();
            framed.extend_from_slice(&bytes);
            let _ = read_whole("x", &framed);
        }
    }
}
