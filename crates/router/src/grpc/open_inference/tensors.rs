//! Tensors of text: as lists of elements, or raw, each element behind its length in 4 bytes, least significant first.

use tramontane_proto::inference::InferTensorContents;
use tramontane_proto::inference::model_infer_request::InferInputTensor;

use crate::error::ApiError;

/// The data type of text.
pub(super) const BYTES: &str = "BYTES";
/// Most tensors of a request.
const TENSORS_MAX: usize = 16;
/// Bytes before each raw element.
const LENGTH_BYTES: usize = 4;

/// The tensors of a request that nobody took yet.
#[derive(Debug)]
pub(super) struct Inputs(Vec<(InferInputTensor, Option<Vec<u8>>)>);

impl Inputs {
    /// Every tensor with its raw contents, if there are any.
    pub(super) fn of(tensors: Vec<InferInputTensor>, raw: Vec<Vec<u8>>) -> Result<Self, ApiError> {
        if tensors.len() > TENSORS_MAX {
            let got = tensors.len();
            let message = format!("inputs must have at most {TENSORS_MAX} tensors, got {got}");
            return Err(ApiError::invalid("inputs", message));
        }
        if !raw.is_empty() && raw.len() != tensors.len() {
            let (expected, got) = (tensors.len(), raw.len());
            let message = format!(
                "raw_input_contents must have one entry for each of {expected} inputs, got {got}"
            );
            return Err(ApiError::invalid("raw_input_contents", message));
        }
        let mut raw = raw.into_iter();
        let paired = tensors.into_iter().map(|tensor| (tensor, raw.next()));
        Ok(Self(paired.collect()))
    }

    /// The elements of the tensor `name`, if it is there.
    pub(super) fn take_text(&mut self, name: &str) -> Result<Option<Vec<String>>, ApiError> {
        let Some(at) = self.0.iter().position(|(tensor, _)| tensor.name == name) else {
            return Ok(None);
        };
        let (tensor, raw) = self.0.swap_remove(at);
        let path = format!("inputs.{name}");
        let refuse = |message: &str| ApiError::invalid(&path, format!("{path} {message}"));
        if tensor.datatype != BYTES {
            return Err(refuse("must be of data type BYTES"));
        }
        let elements = match (raw, tensor.contents) {
            (Some(raw), None) => split(&raw)
                .ok_or_else(|| refuse("must be elements behind their lengths of 4 bytes"))?,
            (Some(_), Some(contents)) if contents != InferTensorContents::default() => {
                return Err(refuse(
                    "has contents and raw contents, expected one of them",
                ));
            }
            (Some(raw), Some(_)) => split(&raw)
                .ok_or_else(|| refuse("must be elements behind their lengths of 4 bytes"))?,
            (None, contents) => contents.unwrap_or_default().bytes_contents,
        };
        let expected = num_elements(&tensor.shape);
        if expected != Some(elements.len()) {
            let got = elements.len();
            return Err(refuse(&format!(
                "must have as many elements as its shape says, got {got}"
            )));
        }
        let mut texts = Vec::with_capacity(elements.len());
        for (i, element) in elements.into_iter().enumerate() {
            let text = String::from_utf8(element);
            texts.push(
                text.map_err(|_bytes| refuse(&format!("must be UTF-8, element {i} is not")))?,
            );
        }
        Ok(Some(texts))
    }

    /// Refuses what nobody took.
    pub(super) fn refuse_rest(self, known: &[&str]) -> Result<(), ApiError> {
        match self.0.len() {
            0 => Ok(()),
            got => {
                let known = known.join(" and ");
                let message = format!("inputs may have {known}, each once; {got} are others");
                Err(ApiError::invalid("inputs", message))
            }
        }
    }
}

/// The product of a shape.
fn num_elements(shape: &[i64]) -> Option<usize> {
    shape.iter().try_fold(1_usize, |product, &size| {
        product.checked_mul(usize::try_from(size).ok()?)
    })
}

fn split(mut raw: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut elements = Vec::new();
    while !raw.is_empty() {
        let (length, rest) = raw.split_first_chunk::<LENGTH_BYTES>()?;
        let length = u32::from_le_bytes(*length) as usize;
        let (element, rest) = rest.split_at_checked(length)?;
        elements.push(element.to_vec());
        raw = rest;
    }
    Some(elements)
}

/// The raw form of elements, each below 4 GiB.
pub(super) fn raw(elements: &[Vec<u8>]) -> Vec<u8> {
    let mut raw = Vec::new();
    for element in elements {
        raw.extend_from_slice(
            &u32::try_from(element.len())
                .unwrap_or(u32::MAX)
                .to_le_bytes(),
        );
        raw.extend_from_slice(element);
    }
    raw
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_elements_are_read_as_they_are_written() {
        let elements = vec![b"abc".to_vec(), Vec::new(), "é".as_bytes().to_vec()];
        assert_eq!(split(&raw(&elements)), Some(elements));
        assert_eq!(raw(&[b"ab".to_vec()]), [2, 0, 0, 0, b'a', b'b']);
        assert_eq!(split(&[2, 0, 0, 0, b'a']), None);
        assert_eq!(split(&[255, 255, 255, 255, b'a']), None);
        assert_eq!(split(&[0, 0]), None);
    }

    #[test]
    fn a_tensor_that_is_not_what_it_says_is_refused() {
        let tensor = |datatype: &str, shape: Vec<i64>, elements: &[&[u8]]| InferInputTensor {
            name: "t".to_owned(),
            datatype: datatype.to_owned(),
            shape,
            contents: Some(InferTensorContents {
                bytes_contents: elements.iter().map(|e| e.to_vec()).collect(),
                ..InferTensorContents::default()
            }),
            ..InferInputTensor::default()
        };
        let take = |tensor: InferInputTensor, raw: Vec<Vec<u8>>| {
            Inputs::of(vec![tensor], raw).and_then(|mut inputs| inputs.take_text("t"))
        };
        let good = tensor(BYTES, vec![2, 1], &[b"a", b"b"]);
        assert_eq!(take(good.clone(), vec![]).unwrap().unwrap(), ["a", "b"]);
        let bad = [
            take(tensor("INT32", vec![1], &[b"a"]), vec![]),
            take(tensor(BYTES, vec![2], &[b"a"]), vec![]),
            take(tensor(BYTES, vec![-1], &[b"a"]), vec![]),
            take(tensor(BYTES, vec![i64::MAX, i64::MAX], &[b"a"]), vec![]),
            take(tensor(BYTES, vec![1], &[&[0xff]]), vec![]),
            take(good.clone(), vec![raw(&[b"a".to_vec()])]),
            take(good, vec![vec![], vec![]]),
        ];
        for refused in bad {
            assert!(refused.unwrap_err().param.is_some());
        }
    }
}
