//! Tokenizer files, chat templates, incremental decoding and stop strings.
//! Pure CPU work: this crate never does I/O after loading, and never lets text become a control token.

mod added;
mod chat;
mod chat_template;
mod control;
mod decode_stream;
mod directory;
mod encoder;
mod error;
mod gguf;
mod hugging_face;
mod instruct;
mod python;
mod sentencepiece;
mod stop;
mod tekken;
mod tokenizer;
mod vocabulary;

pub use chat::{ChatMessage, ChatRequest, Role, ToolCall};
pub use decode_stream::{DecodeStart, DecodeStream};
pub use error::Error;
pub use gguf::GgufTokenizer;
pub use instruct::InstructVersion;
pub use stop::{STOP_BYTES_MAX, STOPS_MAX, StopDecoder, StopOutcome};
pub use tokenizer::{ChatFormat, TEXT_BYTES_MAX, Tokenizer};
