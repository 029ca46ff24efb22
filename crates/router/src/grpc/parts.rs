//! The parts of a message and the memory that they take once it is decoded, told from its bytes and the definition of
//! its type alone: an empty part is two bytes on the wire and hundreds in memory. Whatever the decoder would not take is
//! refused here, by the path of its field: the decoder itself calls it a fault of the server.

use std::collections::HashMap;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
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
/// What refusals call a whole message.
const MESSAGE: &str = "message";

const VARINT: u8 = 0;
const EIGHT_BYTES: u8 = 1;
const DELIMITED: u8 = 2;
const GROUP: u8 = 3;
const GROUP_END: u8 = 4;
const FOUR_BYTES: u8 = 5;

/// The types of all messages of our services.
#[derive(Debug)]
pub(super) struct Shapes {
    /// The fields of each type, by number.
    types: Vec<HashMap<u32, Field>>,
    /// The types that methods take, by path.
    methods: HashMap<String, usize>,
}

#[derive(Debug)]
struct Field {
    name: String,
    held: Held,
    is_repeated: bool,
}

#[derive(Clone, Copy, Debug)]
enum Held {
    Text,
    Bytes,
    Message(usize),
    /// A number of this wire type.
    Number(u8),
}

/// What was counted.
#[derive(Debug, Default)]
struct Count {
    parts: usize,
    bytes: usize,
}

/// Why a message is not taken.
#[derive(Debug)]
enum Fault {
    TooMany,
    /// In the field at `path`; in none that is known where it is empty.
    Malformed {
        path: String,
        why: &'static str,
    },
}

impl Shapes {
    /// Those of encoded definitions.
    pub(super) fn new(descriptors: &[&[u8]]) -> Result<Self, prost::DecodeError> {
        let sets = descriptors
            .iter()
            .map(|set| FileDescriptorSet::decode(*set));
        let sets = sets.collect::<Result<Vec<_>, _>>()?;
        let files = || sets.iter().flat_map(|set| &set.file);
        let mut named = Vec::new();
        for file in files() {
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
        for file in files() {
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
    /// Refused where they cannot be.
    pub(super) fn values_bytes(&self, path: &str, body: &[u8]) -> Result<usize, ApiError> {
        let Some(&shape) = self.methods.get(path) else {
            // Nobody decodes it.
            return Ok(0);
        };
        let mut count = Count::default();
        match self.frames(body, shape, &mut count) {
            Ok(()) => Ok(count.bytes),
            Err(fault) => Err(fault.refusal(count.parts)),
        }
    }

    fn frames(&self, mut body: &[u8], shape: usize, count: &mut Count) -> Result<(), Fault> {
        if body.is_empty() {
            return Err(malformed("a call has one message, got none"));
        }
        while !body.is_empty() {
            let frame = body.split_at_checked(FRAME_BYTES);
            let (frame, rest) = frame.ok_or_else(|| malformed("it ends within its size"))?;
            let size = frame[1..]
                .iter()
                .fold(0, |size, byte| size << 8 | usize::from(*byte));
            let message = rest.split_at_checked(size);
            let (message, rest) = message.ok_or_else(|| malformed("it ends before its size"))?;
            // What is said to be compressed is not decoded: no compression is offered.
            if frame[0] == 0 {
                self.message(message, (shape, DEPTH_MAX), count)?;
            }
            body = rest;
        }
        Ok(())
    }

    /// Refuses as soon as it is no message, or has too much.
    fn message(
        &self,
        mut bytes: &[u8],
        (shape, depth): (usize, usize),
        count: &mut Count,
    ) -> Result<(), Fault> {
        let fields = self.types.get(shape);
        while !bytes.is_empty() {
            let (number, wire) = key(&mut bytes)?;
            let Some(field) = fields.and_then(|fields| fields.get(&number)) else {
                // The decoder keeps nothing of it.
                skip(&mut bytes, (number, wire), depth)?;
                continue;
            };
            count.bytes += NUMBER_BYTES;
            let read = self.field(&mut bytes, (field, wire, depth), count);
            read.map_err(|fault| fault.inside(&field.name))?;
            if count.parts > PARTS_MAX {
                return Err(Fault::TooMany);
            }
        }
        Ok(())
    }

    fn field(
        &self,
        bytes: &mut &[u8],
        (field, wire, depth): (&Field, u8, usize),
        count: &mut Count,
    ) -> Result<(), Fault> {
        if let Held::Number(own) = field.held
            && wire == own
        {
            return number(bytes, own);
        }
        let is_list = field.is_repeated || !matches!(field.held, Held::Number(_));
        if wire != DELIMITED || !is_list {
            return Err(malformed("its wire type is not that of the field"));
        }
        let mut part = delimited(bytes)?;
        count.parts += 1;
        count.bytes += PART_BYTES;
        match field.held {
            Held::Bytes => Ok(()),
            Held::Text => match std::str::from_utf8(part) {
                Ok(_text) => Ok(()),
                Err(_no_text) => Err(malformed("it is not UTF-8")),
            },
            Held::Message(inner) => self.message(part, (inner, below(depth)?), count),
            Held::Number(own) => {
                count.bytes += NUMBER_BYTES * part.len();
                while !part.is_empty() {
                    number(&mut part, own)?;
                }
                Ok(())
            }
        }
    }
}

impl Fault {
    /// The same one, of a message in the field `name`.
    fn inside(self, name: &str) -> Self {
        match self {
            Self::Malformed { path, why } if path.is_empty() => {
                let path = name.to_owned();
                Self::Malformed { path, why }
            }
            Self::Malformed { path, why } => {
                let path = format!("{name}.{path}");
                Self::Malformed { path, why }
            }
            Self::TooMany => self,
        }
    }

    fn refusal(self, num_parts: usize) -> ApiError {
        match self {
            Self::TooMany => {
                let rule = format!("at most {PARTS_MAX} texts, messages and lists");
                let message = format!("the message must have {rule}, got {num_parts} or more");
                ApiError::new(ErrorKind::TooLarge, message)
            }
            Self::Malformed { path, why } => {
                let path = if path.is_empty() { MESSAGE } else { &path };
                ApiError::invalid(path, format!("{path} cannot be decoded: {why}"))
            }
        }
    }
}

fn malformed(why: &'static str) -> Fault {
    let path = String::new();
    Fault::Malformed { path, why }
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

fn fields(message: &DescriptorProto, numbers: &HashMap<&str, usize>) -> HashMap<u32, Field> {
    let mut fields = HashMap::new();
    for field in &message.field {
        let held = match field.r#type() {
            Type::String => Held::Text,
            Type::Bytes => Held::Bytes,
            Type::Message | Type::Group => match numbers.get(field.type_name()) {
                Some(&number) => Held::Message(number),
                None => continue,
            },
            Type::Double | Type::Fixed64 | Type::Sfixed64 => Held::Number(EIGHT_BYTES),
            Type::Float | Type::Fixed32 | Type::Sfixed32 => Held::Number(FOUR_BYTES),
            _ => Held::Number(VARINT),
        };
        let is_repeated = field.label() == Label::Repeated;
        let name = field.name().to_owned();
        let number = u32::try_from(field.number());
        fields.extend(number.map(|number| {
            let field = Field {
                name,
                held,
                is_repeated,
            };
            (number, field)
        }));
    }
    fields
}

/// Number and wire type of a field.
fn key(bytes: &mut &[u8]) -> Result<(u32, u8), Fault> {
    let key = varint(bytes)?;
    let (number, wire) = (key >> 3, (key & 7) as u8);
    match u32::try_from(number) {
        Ok(number) if number > 0 && key <= u32::MAX.into() && wire <= FOUR_BYTES => {
            Ok((number, wire))
        }
        _ => Err(malformed("what should be a field is none")),
    }
}

/// Passes over a field that nobody knows.
fn skip(bytes: &mut &[u8], (field, wire): (u32, u8), depth: usize) -> Result<(), Fault> {
    let inner = below(depth)?;
    match wire {
        DELIMITED => delimited(bytes).map(|_part| ()),
        GROUP => loop {
            match key(bytes)? {
                (ended, GROUP_END) if ended == field => return Ok(()),
                (_, GROUP_END) => return Err(malformed("it ends a group that did not begin")),
                next => skip(bytes, next, inner)?,
            }
        },
        GROUP_END => Err(malformed("it ends a group that did not begin")),
        _ => number(bytes, wire),
    }
}

/// One level further down.
fn below(depth: usize) -> Result<usize, Fault> {
    let inner = depth.checked_sub(1);
    inner.ok_or_else(|| malformed("it is nested more than 100 deep"))
}

fn delimited<'a>(bytes: &mut &'a [u8]) -> Result<&'a [u8], Fault> {
    let size = usize::try_from(varint(bytes)?).unwrap_or(usize::MAX);
    take(bytes, size)
}

fn number(bytes: &mut &[u8], wire: u8) -> Result<(), Fault> {
    match wire {
        EIGHT_BYTES => take(bytes, 8).map(|_number| ()),
        FOUR_BYTES => take(bytes, 4).map(|_number| ()),
        _ => varint(bytes).map(|_number| ()),
    }
}

fn take<'a>(bytes: &mut &'a [u8], size: usize) -> Result<&'a [u8], Fault> {
    let split = bytes.split_at_checked(size);
    let (part, rest) = split.ok_or_else(|| malformed("it reaches beyond the end"))?;
    *bytes = rest;
    Ok(part)
}

fn varint(bytes: &mut &[u8]) -> Result<u64, Fault> {
    let mut value = 0;
    for shift in (0..u64::BITS).step_by(7) {
        let first = bytes.split_first();
        let (byte, rest) = first.ok_or_else(|| malformed("a number in it has no end"))?;
        *bytes = rest;
        // The tenth byte has one bit left.
        if shift == 63 && *byte > 1 {
            break;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(malformed("a number in it has more than 64 bits"))
}

#[cfg(test)]
mod tests {
    use tramontane_proto::{DESCRIPTORS, inference as oip, v1};

    use super::*;
    use crate::random::choice_seed;

    const GENERATE: &str = "/tramontane.v1.Inference/Generate";
    const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

    fn framed(message: &[u8]) -> Vec<u8> {
        let size = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[0], &size[..], message].concat()
    }

    fn values(path: &str, message: &impl prost::Message) -> Result<usize, ApiError> {
        let shapes = Shapes::new(&[DESCRIPTORS]).unwrap();
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
        let shapes = Shapes::new(&[DESCRIPTORS]).unwrap();
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

    /// The path of the field that is refused.
    fn refused(path: &str, body: &[u8]) -> Option<String> {
        let shapes = Shapes::new(&[DESCRIPTORS]).unwrap();
        let refused = shapes.values_bytes(path, body).err()?;
        assert_eq!(refused.kind, ErrorKind::Invalid, "{refused}");
        refused.param
    }

    #[test]
    fn a_message_that_is_cut_off_is_refused_wherever_it_is() {
        let message = conversation(10).encode_to_vec();
        let whole = framed(&message);
        for cut in 0..whole.len() {
            assert!(refused(GENERATE, &whole[..cut]).is_some(), "{cut}");
        }
        for cut in 1..message.len() {
            let param = refused(GENERATE, &framed(&message[..cut]));
            assert_eq!(param.as_deref(), Some("chat"), "{cut}");
        }
        assert_eq!(refused(GENERATE, &whole), None);
    }

    #[test]
    fn what_nobody_knows_is_passed_over_and_takes_nothing() {
        let shapes = Shapes::new(&[DESCRIPTORS]).unwrap();
        // A group begins and ends around a field.
        let grouped = framed(&[0xfb, 1, 0xfa, 1, 0, 0xfc, 1]);
        assert_eq!(shapes.values_bytes(GENERATE, &grouped), Ok(0));
        for open in [&[0xfb, 1][..], &[0xfc, 1], &[0xfb, 1, 0xfc, 2]] {
            let param = refused(GENERATE, &framed(open));
            assert_eq!(param.as_deref(), Some(MESSAGE), "{open:?}");
        }
    }

    /// `message` with some bytes changed, put in or left out.
    fn mutated(message: &[u8], random: &mut impl FnMut() -> u64) -> Vec<u8> {
        let mut bytes = message.to_vec();
        for _ in 0..1 + random() % 3 {
            let at = (random() % (bytes.len() as u64 + 1)) as usize;
            let byte = random() as u8;
            match random() % 4 {
                0 => bytes.insert(at, byte),
                1 => bytes.truncate(at.max(1)),
                _ if at == bytes.len() => bytes.push(byte),
                2 => drop(bytes.remove(at)),
                _ => bytes[at] ^= 1 << (byte % 8),
            }
        }
        bytes
    }

    #[test]
    fn what_is_let_through_can_be_decoded() {
        let shapes = Shapes::new(&[DESCRIPTORS]).unwrap();
        let mut asked = conversation(2);
        asked.model = "żółw".to_owned();
        asked.options = Some(v1::GenerateOptions {
            temperature: Some(0.5),
            seed: Some(-1),
            stop: vec!["a".to_owned(), "漢字".to_owned()],
            stop_token_ids: vec![1, 300, 70_000],
            logit_bias: vec![v1::LogitBias { id: 5, bias: 1.0 }],
            ..v1::GenerateOptions::default()
        });
        let asked = asked.encode_to_vec();
        let parameter = oip::InferParameter {
            parameter_choice: Some(oip::infer_parameter::ParameterChoice::DoubleParam(0.5)),
        };
        let tensors = oip::ModelInferRequest {
            parameters: [("a".to_owned(), parameter)].into(),
            inputs: vec![oip::model_infer_request::InferInputTensor {
                shape: vec![1, -1],
                ..Default::default()
            }],
            raw_input_contents: vec![vec![0xff, 0]],
            ..oip::ModelInferRequest::default()
        };
        let tensors = tensors.encode_to_vec();
        let (mut num_drawn, mut num_decoded) = (0, 0);
        let mut random = || {
            num_drawn += 1;
            choice_seed(7, num_drawn)
        };
        for _ in 0..20_000 {
            let message = mutated(&asked, &mut random);
            let decoded = v1::GenerateRequest::decode(&message[..]);
            let checked = shapes.values_bytes(GENERATE, &framed(&message));
            assert_eq!(
                checked.is_ok(),
                decoded.is_ok(),
                "{message:?} {checked:?} {decoded:?}"
            );
            num_decoded += usize::from(decoded.is_ok());
            let message = mutated(&tensors, &mut random);
            let checked = shapes.values_bytes(INFER, &framed(&message));
            let decoded = oip::ModelInferRequest::decode(&message[..]);
            // The decoder does not look at the wire type of an entry of a map.
            assert!(
                checked.is_err() || decoded.is_ok(),
                "{message:?} {decoded:?}"
            );
        }
        assert!((1000..19_000).contains(&num_decoded), "{num_decoded}");
    }
}
