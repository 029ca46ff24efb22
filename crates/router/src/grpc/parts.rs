//! The parts of a message and the memory that they take once it is decoded, told from its bytes and the definition of
//! its type alone: an empty part is two bytes on the wire and hundreds in memory. Never says whether a message is
//! well-formed; what it cannot read, the decoder refuses at the same place.

use std::collections::HashMap;

use prost::Message as _;
use prost_types::field_descriptor_proto::Type;
use prost_types::{DescriptorProto, FileDescriptorSet};

use crate::error::{ApiError, ErrorKind};

/// Most texts, messages and lists in one call: the longest conversations and the largest batches many times over.
pub(super) const PARTS_MAX: usize = 64 << 10;
/// Memory that one of them takes at most beside its bytes: the largest is a tensor, and a list that grows holds room
/// for two to three times what is in it.
const PART_BYTES: usize = 1536;
/// Memory per byte of a list of numbers, likewise: eight bytes where the wire has one.
const NUMBER_BYTES: usize = 24;
/// What stands before a message: whether it is compressed, and its size.
pub(super) const FRAME_BYTES: usize = 5;
/// Messages in messages, as the decoder has it.
const DEPTH_MAX: usize = 100;

/// The types of all messages of our services.
#[derive(Debug)]
pub(super) struct Shapes {
    /// What fields of each type hold, where that is not text.
    types: Vec<HashMap<u64, Field>>,
    /// The types that methods take, by path.
    methods: HashMap<String, usize>,
}

#[derive(Clone, Copy, Debug)]
enum Field {
    Message(usize),
    Numbers,
}

/// What was counted.
#[derive(Debug, Default)]
struct Count {
    parts: usize,
    bytes: usize,
}

impl Shapes {
    /// Those of encoded definitions.
    pub(super) fn new(descriptors: &[u8]) -> Result<Self, prost::DecodeError> {
        let set = FileDescriptorSet::decode(descriptors)?;
        let mut named = Vec::new();
        for file in &set.file {
            for message in &file.message_type {
                collect(&format!(".{}", file.package()), message, &mut named);
            }
        }
        let numbers: HashMap<&str, usize> = named
            .iter()
            .enumerate()
            .map(|(number, (name, _))| (name.as_str(), number))
            .collect();
        let types = named.iter().map(|(_, message)| fields(message, &numbers));
        let mut methods = HashMap::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                    methods.extend(numbers.get(method.input_type()).map(|&n| (path, n)));
                }
            }
        }
        let types = types.collect();
        Ok(Self { types, methods })
    }

    /// Memory that the messages in a body of a call of `path` take once they are decoded, beside their own bytes.
    pub(super) fn values_bytes(&self, path: &str, mut body: &[u8]) -> Result<usize, ApiError> {
        let Some(&shape) = self.methods.get(path) else {
            // Nobody decodes it.
            return Ok(0);
        };
        let mut count = Count::default();
        while let Some((frame, rest)) = body.split_at_checked(FRAME_BYTES) {
            let size = frame[1..]
                .iter()
                .fold(0, |size, byte| size << 8 | usize::from(*byte));
            let (message, rest) = rest.split_at(size.min(rest.len()));
            let _malformed = self.count(message, (shape, DEPTH_MAX), &mut count);
            body = rest;
        }
        if count.parts > PARTS_MAX {
            let rule = format!("at most {PARTS_MAX} texts, messages and lists");
            let message = format!("the message must have {rule}, got {} or more", count.parts);
            return Err(ApiError::new(ErrorKind::TooLarge, message));
        }
        Ok(count.bytes)
    }

    /// `None` as soon as it is no message, or has too much.
    fn count(
        &self,
        mut bytes: &[u8],
        (shape, depth): (usize, usize),
        count: &mut Count,
    ) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            count.bytes += NUMBER_BYTES;
            match key & 7 {
                0 => {
                    varint(&mut bytes)?;
                }
                1 => bytes = bytes.get(8..)?,
                5 => bytes = bytes.get(4..)?,
                2 => {
                    let size = usize::try_from(varint(&mut bytes)?).ok()?;
                    let (part, rest) = bytes.split_at_checked(size)?;
                    bytes = rest;
                    count.parts += 1;
                    count.bytes += PART_BYTES;
                    match self.types.get(shape)?.get(&(key >> 3)) {
                        Some(Field::Message(inner)) => self.count(part, (*inner, depth), count)?,
                        Some(Field::Numbers) => count.bytes += NUMBER_BYTES * size,
                        None => {}
                    }
                }
                // Begin and end of a group, which decoders skip: what is in it looks like fields, and counts as such.
                _ => {}
            }
            if count.parts > PARTS_MAX {
                return None;
            }
        }
        Some(())
    }
}

/// This type and those inside it, by name.
fn collect<'a>(
    parent: &str,
    message: &'a DescriptorProto,
    named: &mut Vec<(String, &'a DescriptorProto)>,
) {
    let name = format!("{parent}.{}", message.name());
    for nested in &message.nested_type {
        collect(&name, nested, named);
    }
    named.push((name, message));
}

fn fields(message: &DescriptorProto, numbers: &HashMap<&str, usize>) -> HashMap<u64, Field> {
    let mut fields = HashMap::new();
    for field in &message.field {
        let held = match field.r#type() {
            Type::String | Type::Bytes => continue,
            Type::Message | Type::Group => match numbers.get(field.type_name()) {
                Some(&number) => Field::Message(number),
                None => continue,
            },
            _ => Field::Numbers,
        };
        fields.extend(u64::try_from(field.number()).map(|number| (number, held)));
    }
    fields
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use tramontane_proto::{DESCRIPTORS, inference as oip, v1};

    use super::*;

    const GENERATE: &str = "/tramontane.v1.Inference/Generate";
    const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

    fn framed(message: &[u8]) -> Vec<u8> {
        let size = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[0], &size[..], message].concat()
    }

    fn values(path: &str, message: &impl prost::Message) -> Result<usize, ApiError> {
        let shapes = Shapes::new(DESCRIPTORS).unwrap();
        shapes.values_bytes(path, &framed(&message.encode_to_vec()))
    }

    fn conversation(num_messages: usize) -> v1::GenerateRequest {
        let chat = v1::ChatMessages {
            messages: vec![v1::ChatMessage::default(); num_messages],
            ..v1::ChatMessages::default()
        };
        v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Chat(chat)),
            ..v1::GenerateRequest::default()
        }
    }

    #[test]
    fn the_largest_part_is_smaller_than_is_counted_for_it() {
        let sizes = [
            size_of::<v1::ChatMessage>(),
            size_of::<v1::Tool>(),
            size_of::<v1::ToolCall>(),
            size_of::<v1::GenerateOptions>(),
            size_of::<oip::model_infer_request::InferInputTensor>(),
            size_of::<(String, oip::InferParameter)>(),
        ];
        let largest = sizes.into_iter().max().unwrap();
        assert!(largest * 3 <= PART_BYTES, "{sizes:?}");
    }

    #[test]
    fn empty_parts_count_wherever_they_are() {
        assert!(values(GENERATE, &conversation(PARTS_MAX - 1)).is_ok());
        let error = values(GENERATE, &conversation(PARTS_MAX)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::TooLarge);
        assert_eq!(
            error.message,
            "the message must have at most 65536 texts, messages and lists, got 65537 or more"
        );
        let tensors = oip::ModelInferRequest {
            inputs: vec![Default::default(); PARTS_MAX + 1],
            ..oip::ModelInferRequest::default()
        };
        assert!(values(INFER, &tensors).is_err());
        // In a second message of the same call too.
        let shapes = Shapes::new(DESCRIPTORS).unwrap();
        let many = framed(&conversation(PARTS_MAX).encode_to_vec());
        let two = [framed(&[]), many.clone()].concat();
        assert!(shapes.values_bytes(GENERATE, &two).is_err());
        assert_eq!(shapes.values_bytes("/no.Such/Method", &many), Ok(0));
    }

    #[test]
    fn text_is_one_part_whatever_it_says_and_numbers_are_counted_by_their_bytes() {
        let text = |prompt| v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Prompt(prompt)),
            ..v1::GenerateRequest::default()
        };
        // Read as a message it would be a hundred thousand empty parts.
        let short = values(GENERATE, &text("\n".to_owned())).unwrap();
        assert_eq!(values(GENERATE, &text("\n\0".repeat(100_000))), Ok(short));
        let ids = |num_ids| v1::GenerateRequest {
            input: Some(v1::generate_request::Input::PromptIds(v1::TokenIds {
                ids: vec![1; num_ids],
            })),
            ..v1::GenerateRequest::default()
        };
        let (few, many) = (values(GENERATE, &ids(1)), values(GENERATE, &ids(32_768)));
        assert_eq!(many.unwrap() - few.unwrap(), 32_767 * NUMBER_BYTES);
    }

    #[test]
    fn what_is_no_message_is_counted_as_far_as_it_goes() {
        let shapes = Shapes::new(DESCRIPTORS).unwrap();
        let whole = framed(&conversation(10).encode_to_vec());
        for cut in 0..whole.len() {
            assert!(shapes.values_bytes(GENERATE, &whole[..cut]).is_ok());
        }
        // A group begins and ends around a field.
        let grouped = framed(&[0xfb, 1, 0xfa, 1, 0, 0xfc, 1]);
        assert_eq!(
            shapes.values_bytes(GENERATE, &grouped),
            Ok(PART_BYTES + 3 * NUMBER_BYTES)
        );
    }
}
