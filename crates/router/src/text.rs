//! The text and the calls of one answer as its tokens come. Never lets out half a character, the text of an end
//! token, or anything from a stop string on. Stop strings are looked for in text, not in calls, cut off or whole.

use tramontane_tokenizer::{
    CallPiece, DecodeStart, DecodeStream, StopDecoder, Tokenizer, ToolCall, ToolCallParser,
};
use tramontane_types::{Constraint, SamplingParams, TokenId};

use crate::answer_id::AnswerId;

/// Turns the sampled tokens of one answer into text and calls.
#[derive(Debug)]
pub(crate) struct AnswerText {
    reader: Reader,
    stop: StopDecoder,
    /// Tokens that end the answer and are no part of its text.
    end_ids: Vec<TokenId>,
}

#[derive(Debug)]
enum Reader {
    Text(DecodeStream),
    Calls(Box<CallReader>),
}

/// Finds calls and gives ids to those that have none.
#[derive(Debug)]
struct CallReader {
    parser: ToolCallParser,
    answer: AnswerId,
    choice: usize,
}

/// What one token adds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Added {
    /// Before the calls.
    pub(crate) text: String,
    pub(crate) calls: Vec<CallDelta>,
    /// Whether the answer ends here, and how.
    pub(crate) end: Option<TextEnd>,
}

/// Something new of one call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallDelta {
    /// Which call of the answer.
    pub(crate) index: usize,
    /// Id and name, when it begins.
    pub(crate) begins: Option<CallHead>,
    /// The next piece of its arguments.
    pub(crate) arguments: String,
}

/// What a call begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallHead {
    pub(crate) id: String,
    pub(crate) name: String,
}

impl CallDelta {
    /// Bytes of text in it.
    pub(crate) fn size(&self) -> usize {
        let head = self.begins.as_ref();
        self.arguments.len() + head.map_or(0, |head| head.id.len() + head.name.len())
    }

    /// Adds it to the calls so far.
    pub(crate) fn add_to(&self, calls: &mut Vec<ToolCall>) {
        if let Some(head) = &self.begins {
            calls.push(ToolCall {
                id: head.id.clone(),
                name: head.name.clone(),
                arguments: String::new(),
            });
        }
        if let Some(call) = calls.get_mut(self.index) {
            call.arguments.push_str(&self.arguments);
        }
    }
}

/// Why no text can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextEnd {
    /// A stop string was completed.
    StopString,
    /// End-of-sequence or a stop id.
    EndToken,
}

impl AnswerText {
    /// For a chat the answer is a text of its own; otherwise it continues the prompt. What has to match an expression or
    /// a grammar is given out as it was matched; to JSON a first space makes no difference.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        params: &SamplingParams,
        stop: StopDecoder,
        is_chat: bool,
    ) -> Self {
        let constraint = params.constraint.as_deref();
        let is_verbatim = matches!(constraint, Some(Constraint::Regex(_) | Constraint::Lark(_)));
        let start = if is_chat && !is_verbatim {
            DecodeStart::Text
        } else {
            DecodeStart::Continuation
        };
        let mut end_ids = params.stop_ids.clone();
        if !params.ignore_eos {
            end_ids.extend_from_slice(tokenizer.eos_ids());
        }
        Self {
            reader: Reader::Text(DecodeStream::new(tokenizer, start, true)),
            stop,
            end_ids,
        }
    }

    /// Looks for calls too, where the model has tokens for them. The grammars made for them let a text begin with a
    /// space, which is no part of it, as in any chat.
    pub(crate) fn with_calls(
        mut self,
        tokenizer: &Tokenizer,
        answer: AnswerId,
        choice: usize,
    ) -> Self {
        if let Some(parser) = ToolCallParser::new(tokenizer, DecodeStart::Text) {
            self.reader = Reader::Calls(Box::new(CallReader {
                parser,
                answer,
                choice,
            }));
        }
        self
    }

    /// Takes the next token.
    pub(crate) fn push(&mut self, id: TokenId) -> Added {
        if self.is_end(id) {
            return Added {
                end: Some(TextEnd::EndToken),
                ..Added::default()
            };
        }
        let pieces = self.reader.push(id);
        self.add(pieces, true)
    }

    /// What was held back when the answer ends, and whether a stop string was completed in it.
    pub(crate) fn finish(&mut self) -> Added {
        // What is left of a call that was cut off comes out as text, and is none in which the client wants to stop.
        let has_stops = !self.reader.is_in_call();
        let pieces = self.reader.finish();
        let mut added = self.add(pieces, has_stops);
        if added.end.is_none() {
            added.text.push_str(&self.stop.finish());
        }
        added
    }

    /// Whether the worker ends the sequence at this token.
    pub(crate) fn is_end(&self, id: TokenId) -> bool {
        self.end_ids.contains(&id)
    }

    fn add(&mut self, pieces: Vec<CallPiece>, has_stops: bool) -> Added {
        let mut added = Added::default();
        for piece in pieces {
            match piece {
                CallPiece::Text(text) if !has_stops => {
                    added.text.push_str(&self.stop.finish());
                    added.text.push_str(&text);
                }
                CallPiece::Text(text) => {
                    let outcome = self.stop.push(&text);
                    added.text.push_str(&outcome.emit);
                    if outcome.stopped {
                        added.end = Some(TextEnd::StopString);
                        return added;
                    }
                }
                CallPiece::Begin { index, id, name } => {
                    // No stop string goes on behind the beginning of a call.
                    added.text.push_str(&self.stop.finish());
                    let id = id.unwrap_or_else(|| self.reader.call_id(index));
                    added.calls.push(CallDelta {
                        index,
                        begins: Some(CallHead { id, name }),
                        arguments: String::new(),
                    });
                }
                CallPiece::Arguments { index, text } => match added.calls.last_mut() {
                    Some(last) if last.index == index => last.arguments.push_str(&text),
                    _ => added.calls.push(CallDelta {
                        index,
                        begins: None,
                        arguments: text,
                    }),
                },
            }
        }
        added
    }
}

impl Reader {
    fn push(&mut self, id: TokenId) -> Vec<CallPiece> {
        match self {
            Self::Text(decoder) => decoder.push(id).map(CallPiece::Text).into_iter().collect(),
            Self::Calls(calls) => calls.parser.push(id),
        }
    }

    fn finish(&mut self) -> Vec<CallPiece> {
        match self {
            Self::Text(decoder) => decoder.finish().map(CallPiece::Text).into_iter().collect(),
            Self::Calls(calls) => calls.parser.finish(),
        }
    }

    fn is_in_call(&self) -> bool {
        match self {
            Self::Text(_) => false,
            Self::Calls(calls) => calls.parser.is_in_call(),
        }
    }

    fn call_id(&self, index: usize) -> String {
        match self {
            Self::Text(_) => String::new(),
            Self::Calls(calls) => calls.answer.call_id(calls.choice, index),
        }
    }
}
