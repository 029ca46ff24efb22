//! Things that prompts must have exactly as Python writes them: JSON and dates.

mod json;
mod strftime;

pub(crate) use json::{JsonStyle, dumps, dumps_styled};
pub(crate) use strftime::strftime;
