//! Where the tensors of a file lie. Looks at no number of theirs.

use std::collections::{BTreeMap, HashSet};

use tramontane_compute::DType;

use crate::Error;
use crate::tensors::Entry;

use super::Header;
use super::cursor::Cursor;

/// Longest name of a tensor.
const NAME_BYTES_MAX: u64 = 255;
/// Most dimensions, by the format.
const DIMENSIONS_MAX: u32 = 4;
/// Most experts in one tensor.
const EXPERTS_MAX: usize = 1024;

/// What the header says of a tensor.
#[derive(Debug)]
pub(crate) struct TensorInfo {
    name: String,
    /// Slowest first: `[rows, cols]`, `[experts, rows, cols]`.
    shape: Vec<u64>,
    dtype: DType,
    /// From the begin of the data.
    offset: u64,
}

pub(super) fn read_infos(cursor: &mut Cursor<'_>, count: u64) -> Result<Vec<TensorInfo>, Error> {
    let file = cursor.file();
    let mut infos = Vec::new();
    let mut seen = HashSet::new();
    for index in 0..count {
        let name = cursor.name(&format!("name of tensor {index}"), NAME_BYTES_MAX)?;
        let wrong = |what: String| tensor_error(file, name, what);
        if !seen.insert(name) {
            return Err(wrong("is listed twice".to_owned()));
        }
        let num_dimensions = cursor.u32(name)?;
        if !(1..=DIMENSIONS_MAX).contains(&num_dimensions) {
            return Err(wrong(format!(
                "has {num_dimensions} dimensions, expected 1 to {DIMENSIONS_MAX}"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..num_dimensions {
            shape.push(cursor.u64(name)?);
        }
        shape.reverse();
        let kind = cursor.u32(name)?;
        let dtype = dtype(kind).map_err(wrong)?;
        infos.push(TensorInfo {
            name: name.to_owned(),
            shape,
            dtype,
            offset: cursor.u64(name)?,
        });
    }
    Ok(infos)
}

/// Types by their number in the file.
fn dtype(number: u32) -> Result<DType, String> {
    const KNOWN: [(u32, DType); 11] = [
        (0, DType::F32),
        (1, DType::F16),
        (2, DType::Q4_0),
        (3, DType::Q4_1),
        (6, DType::Q5_0),
        (7, DType::Q5_1),
        (8, DType::Q8_0),
        (12, DType::Q4K),
        (13, DType::Q5K),
        (14, DType::Q6K),
        (30, DType::Bf16),
    ];
    /// Types that other programs write.
    const OTHERS: [(u32, &str); 18] = [
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
        (40, "NVFP4"),
    ];
    if let Some((_, dtype)) = KNOWN.iter().find(|(n, _)| *n == number) {
        return Ok(*dtype);
    }
    let name = OTHERS.iter().find(|(n, _)| *n == number);
    let name = name.map_or("unknown", |(_, name)| name);
    Err(format!(
        "has type {number} ({name}), expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K"
    ))
}

/// The places of all tensors in the file of `file_len` bytes, by name.
pub(crate) fn entries(
    file: &str,
    header: &Header<'_>,
    file_len: usize,
) -> Result<BTreeMap<String, Entry>, Error> {
    let mut entries = Vec::with_capacity(header.tensors.len());
    for tensor in &header.tensors {
        entries.push((tensor.name.as_str(), tensor.place(file, header, file_len)?));
    }
    entries.sort_by_key(|(_, entry)| (entry.begin, entry.end));
    for pair in entries.windows(2) {
        let [(first, before), (name, after)] = pair else {
            continue;
        };
        if after.begin < before.end {
            let (begin, end) = (after.begin, before.end);
            let what =
                format!("begins at byte {begin}, expected at least {end}, the end of {first}");
            return Err(tensor_error(file, name, what));
        }
    }
    let mut by_name = BTreeMap::new();
    for (name, entry) in entries {
        for (name, entry) in split_experts(file, name, entry)? {
            if by_name.insert(name.clone(), entry).is_some() {
                let what = "is there alone and in a tensor of all experts".to_owned();
                return Err(tensor_error(file, &name, what));
            }
        }
    }
    Ok(by_name)
}

impl TensorInfo {
    fn place(&self, file: &str, header: &Header<'_>, file_len: usize) -> Result<Entry, Error> {
        let wrong = |what: String| tensor_error(file, &self.name, what);
        let too_large = || wrong(format!("shape {:?} overflows", self.shape));
        let mut shape = Vec::with_capacity(self.shape.len());
        for &dimension in &self.shape {
            let dimension = usize::try_from(dimension).map_err(|_large| too_large())?;
            if dimension == 0 {
                return Err(wrong(format!("has shape {:?}, expected no 0", self.shape)));
            }
            shape.push(dimension);
        }
        let cols = shape.last().copied().unwrap_or(1);
        let block = self.dtype.block_len();
        if !cols.is_multiple_of(block) {
            let dtype = self.dtype;
            return Err(wrong(format!(
                "has rows of {cols} numbers, expected a multiple of {block} ({dtype:?})"
            )));
        }
        let mut bytes = self.dtype.row_bytes(cols).ok_or_else(too_large)?;
        for &rows in shape.iter().rev().skip(1) {
            bytes = bytes.checked_mul(rows).ok_or_else(too_large)?;
        }
        let offset = self.offset;
        let offset_in_file = usize::try_from(offset)
            .ok()
            .filter(|offset| offset.is_multiple_of(header.alignment))
            .and_then(|offset| offset.checked_add(header.data_begin));
        let Some(begin) = offset_in_file else {
            let alignment = header.alignment;
            return Err(wrong(format!(
                "has offset {offset}, expected a multiple of {alignment} inside the file"
            )));
        };
        let end = begin.checked_add(bytes).ok_or_else(too_large)?;
        if end > file_len {
            return Err(wrong(format!(
                "file is truncated: tensor ends at byte {end}, expected at most {file_len}"
            )));
        }
        let dtype = self.dtype;
        Ok(Entry {
            dtype,
            shape,
            begin,
            end,
        })
    }
}

/// `blk.N.ffn_gate_exps.weight` of `[experts, rows, cols]` as one `blk.N.ffn_gate.E.weight` for each expert, the
/// names that files of before April 2024 have; any other tensor as it is.
fn split_experts(file: &str, name: &str, entry: Entry) -> Result<Vec<(String, Entry)>, Error> {
    let merged = name
        .strip_suffix("_exps.weight")
        .filter(|stem| stem.starts_with("blk."));
    let (Some(stem), [experts, rows, cols]) = (merged, entry.shape.as_slice()) else {
        return Ok(vec![(name.to_owned(), entry)]);
    };
    if *experts > EXPERTS_MAX {
        let what = format!("holds {experts} experts, expected at most {EXPERTS_MAX}");
        return Err(tensor_error(file, name, what));
    }
    let len = (entry.end - entry.begin) / experts;
    let one = |expert: usize| {
        let begin = entry.begin + expert * len;
        let part = Entry {
            dtype: entry.dtype,
            shape: vec![*rows, *cols],
            begin,
            end: begin + len,
        };
        (format!("{stem}.{expert}.weight"), part)
    };
    Ok((0..*experts).map(one).collect())
}

pub(super) fn tensor_error(file: &str, tensor: &str, what: String) -> Error {
    Error::Tensor {
        file: file.to_owned(),
        tensor: tensor.to_owned(),
        what,
    }
}
