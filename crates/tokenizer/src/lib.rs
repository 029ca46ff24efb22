//! Tokenizer files, chat templates, incremental decoding, stop strings and calls of tools.
//! Pure CPU work: this crate never does I/O after loading, and never lets text become a control token.

mod added;
mod chat;
mod chat_template;
mod control;
mod decode_stream;
mod directory;
mod encoder;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod gguf;
mod hugging_face;
mod instruct;
mod python;
mod sentencepiece;
mod stop;
mod tekken;
mod tokenizer;
mod tool_calls;
mod vocabulary;

pub use chat::{ChatMessage, ChatRequest, Role, ToolCall};
pub use decode_stream::{DecodeStart, DecodeStream};
pub use error::Error;
pub use gguf::GgufTokenizer;
pub use instruct::InstructVersion;
pub use stop::{STOP_BYTES_MAX, STOPS_MAX, StopDecoder, StopOutcome};
pub use tokenizer::{ChatFormat, TEXT_BYTES_MAX, Tokenizer};
pub use tool_calls::{
    CALL_ID_LEN, CallPiece, CallTokens, FUNCTION_NAME_MAX, ToolCallParser, is_call_id,
    is_function_name,
};
