//! Chat templates of model directories (Jinja, as transformers runs them). A template is foreign code: it gets fuel,
//! an output limit and guarded text, and can not do anything but produce a string.

use std::fmt;
use std::io;
use std::path::Path;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as TemplateValue};
use minijinja::{Environment, ErrorKind};
use minijinja_contrib::pycompat;
use serde_json::{Map, Value, json};
use tramontane_types::TokenId;

use crate::chat::{ChatMessage, ChatRequest, ToolCall};
use crate::control::{ControlTexts, Noncharacters, Stretch};
use crate::directory::NamedTokens;
use crate::encoder::Position;
use crate::python::{JsonStyle, dumps_styled, strftime};
use crate::tokenizer::TEXT_BYTES_MAX;
use crate::{Error, Tokenizer};

/// Instructions and 64-byte units of data one rendering may use, so at most 128 MB; real templates use some 100 per
/// message.
pub(crate) const TEMPLATE_FUEL: u64 = 2_000_000;
/// Longest template source in bytes; the longest known ones have 20 KB.
pub(crate) const TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// Words of the tool format itself. Templates compare them, so they are left as they are; they are not a client's
/// choice and none is the whole of a control token.
const FORMAT_WORDS: [&str; 20] = [
    "type",
    "function",
    "name",
    "description",
    "parameters",
    "properties",
    "required",
    "items",
    "enum",
    "default",
    "strict",
    "title",
    "additionalProperties",
    "object",
    "string",
    "number",
    "integer",
    "boolean",
    "array",
    "null",
];

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// A compiled template and what it may refer to.
#[derive(Debug)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    sources: Vec<String>,
    named: NamedTokens,
}

/// Noncharacters for one rendering.
struct Marks {
    /// Keeps client text from being read as control tokens.
    guard: char,
    /// Ends a message that the model shall continue.
    end: char,
}

impl ChatTemplate {
    pub(crate) fn new(
        path: &Path,
        source: String,
        tool_source: Option<String>,
        named: NamedTokens,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| template_error(&error))?);
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.set_unknown_method_callback(pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", tojson);
        let mut sources = vec![source];
        sources.extend(tool_source);
        for (name, source) in [DEFAULT, TOOL_USE].into_iter().zip(&sources) {
            if source.len() > TEMPLATE_BYTES_MAX {
                return Err(Error::invalid_file(
                    path,
                    "length of chat_template",
                    format!("at most {TEMPLATE_BYTES_MAX} bytes"),
                    format!("{} bytes", source.len()),
                ));
            }
            environment
                .add_template_owned(name, without_generation_tags(source))
                .map_err(|error| {
                    Error::invalid_file(
                        path,
                        "chat_template",
                        "a Jinja template",
                        error.to_string(),
                    )
                })?;
        }
        Ok(Self {
            environment,
            sources,
            named,
        })
    }

    pub(crate) fn mentions_tools(&self) -> bool {
        self.sources.iter().any(|source| source.contains("tools"))
    }

    pub(crate) fn encode(
        &self,
        tokenizer: &Tokenizer,
        request: &ChatRequest,
        now: SystemTime,
    ) -> Result<Vec<TokenId>, Error> {
        if request.messages.is_empty() {
            return Err(Error::invalid_chat(
                "messages",
                "at least one message",
                "empty",
            ));
        }
        let marks = self.marks(request)?;
        let prompt = self.render(tokenizer.vocabulary().control_texts(), request, &marks, now)?;
        let mut ids = Vec::new();
        for stretch in tokenizer.vocabulary().control_texts().split(&prompt) {
            match stretch {
                Stretch::Control(id) => ids.push(id),
                Stretch::Text { text, is_first } => {
                    let position = if is_first {
                        Position::Start
                    } else {
                        Position::Inside
                    };
                    ids.extend(tokenizer.encode_at(&text.replace(marks.guard, ""), position)?);
                }
            }
        }
        Ok(ids)
    }

    /// Two noncharacters that neither the request nor the template holds.
    fn marks(&self, request: &ChatRequest) -> Result<Marks, Error> {
        let mut used = Noncharacters::default();
        for source in &self.sources {
            used.note(source);
        }
        for message in &request.messages {
            used.note(&message.content);
            used.note(message.tool_call_id.as_deref().unwrap_or_default());
            used.note(message.name.as_deref().unwrap_or_default());
            for call in &message.tool_calls {
                used.note(&call.id);
                used.note(&call.name);
                each_string(&arguments(call), &mut |text| used.note(text));
            }
        }
        for tool in &request.tools {
            each_string(tool, &mut |text| used.note(text));
        }
        let mut unused = used.unused();
        let (Some(guard), Some(end)) = (unused.next(), unused.next()) else {
            return Err(Error::invalid_chat(
                "messages",
                "text without noncharacters",
                "text with nearly all of U+FDD0 to U+FDEF",
            ));
        };
        Ok(Marks { guard, end })
    }

    /// The prompt, client text still guarded.
    fn render(
        &self,
        controls: &ControlTexts,
        request: &ChatRequest,
        marks: &Marks,
        now: SystemTime,
    ) -> Result<String, Error> {
        let continues = request
            .messages
            .last()
            .is_some_and(|message| message.prefix);
        let last = request.messages.len() - 1;
        let messages: Vec<Value> = request
            .messages
            .iter()
            .enumerate()
            .map(|(index, message)| {
                let end = (continues && index == last).then_some(marks.end);
                message_value(controls, message, marks.guard, end)
            })
            .collect();
        let tools: Option<Vec<Value>> = (!request.tools.is_empty()).then(|| {
            request
                .tools
                .iter()
                .map(|tool| guarded(controls, tool, marks.guard))
                .collect()
        });
        let name = if tools.is_some() && self.sources.len() > 1 {
            TOOL_USE
        } else {
            DEFAULT
        };
        let strftime_now = move |format: String| {
            strftime(&format, now)
                .map_err(|text| minijinja::Error::new(ErrorKind::InvalidOperation, text))
        };
        let context = minijinja::context! {
            messages => Serde(messages),
            tools => Serde(tools),
            documents => (),
            add_generation_prompt => !continues,
            strftime_now => TemplateValue::from_function(strftime_now),
            bos_token => self.named.bos.clone(),
            eos_token => self.named.eos.clone(),
            unk_token => self.named.unk.clone(),
            pad_token => self.named.pad.clone(),
        };
        let mut output = BoundedOutput::default();
        let rendered = self
            .environment
            .get_template(name)
            .and_then(|template| template.render_captured_to(context, &mut output).map(drop));
        if let Err(error) = rendered {
            return Err(template_error(&error));
        }
        let mut prompt = String::from_utf8(output.bytes).map_err(|error| Error::Template {
            reason: error.to_string(),
        })?;
        if continues {
            cut_at_end(&mut prompt, marks.end)?;
        }
        Ok(prompt)
    }
}

/// Drops what the template writes after a message that shall be continued, as transformers'
/// `continue_final_message` does: the mark has a space behind it, and where that is gone the template trims.
fn cut_at_end(prompt: &mut String, end: char) -> Result<(), Error> {
    let Some(at) = prompt.rfind(end) else {
        return Err(Error::Template {
            reason: "it leaves out the message to be continued".to_owned(),
        });
    };
    let trims = !prompt[at + end.len_utf8()..].starts_with(' ');
    prompt.truncate(at);
    if trims {
        prompt.truncate(prompt.trim_end().len());
    }
    Ok(())
}

/// A message as templates know it: the OpenAI form, with arguments parsed.
fn message_value(
    controls: &ControlTexts,
    message: &ChatMessage,
    guard: char,
    end: Option<char>,
) -> Value {
    let mut content = controls.guard(&message.content, guard);
    if let Some(end) = end {
        content.push(end);
        content.push(' ');
    }
    let mut value = json!({"role": message.role.as_str(), "content": content});
    if !message.tool_calls.is_empty() {
        if message.content.is_empty() {
            value["content"] = Value::Null;
        }
        let calls = message.tool_calls.iter().map(|call| {
            // Only what the client wrote is guarded; a key such as "name" may be part of a control token.
            json!({
                "id": controls.guard(&call.id, guard),
                "type": "function",
                "function": {
                    "name": controls.guard(&call.name, guard),
                    "arguments": guarded(controls, &arguments(call), guard),
                },
            })
        });
        value["tool_calls"] = calls.collect();
    }
    if let Some(id) = &message.tool_call_id {
        value["tool_call_id"] = controls.guard(id, guard).into();
    }
    if let Some(name) = &message.name {
        value["name"] = controls.guard(name, guard).into();
    }
    value
}

/// `value` with every string in it guarded, keys too.
fn guarded(controls: &ControlTexts, value: &Value, guard: char) -> Value {
    match value {
        Value::String(text) => Value::String(guarded_word(controls, text, guard)),
        Value::Array(items) => items
            .iter()
            .map(|item| guarded(controls, item, guard))
            .collect(),
        Value::Object(entries) => {
            let entries = entries.iter().map(|(key, value)| {
                (
                    guarded_word(controls, key, guard),
                    guarded(controls, value, guard),
                )
            });
            Value::Object(entries.collect::<Map<String, Value>>())
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
    }
}

fn guarded_word(controls: &ControlTexts, word: &str, guard: char) -> String {
    if FORMAT_WORDS.contains(&word) {
        return word.to_owned();
    }
    controls.guard(word, guard)
}

/// The arguments of a call as templates know them: a value if they are JSON, else the text.
fn arguments(call: &ToolCall) -> Value {
    serde_json::from_str(&call.arguments).unwrap_or_else(|_| Value::String(call.arguments.clone()))
}

fn each_string(value: &Value, visit: &mut dyn FnMut(&str)) {
    match value {
        Value::String(text) => visit(text),
        Value::Array(items) => items.iter().for_each(|item| each_string(item, visit)),
        Value::Object(entries) => {
            for (key, value) in entries {
                visit(key);
                each_string(value, visit);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// transformers' `{% generation %}` marks what to train on; here it is a block that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        // Behind what opens the tag: `{%}` opens one and closes none.
        let inside = &rest[start + 2..];
        let Some(length) = inside.find("%}") else {
            break;
        };
        let tag = &inside[..length];
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..start + 2]);
        match word {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        out.push_str("%}");
        rest = &inside[length + 2..];
    }
    out.push_str(rest);
    out
}

/// The template's own words, carried through the engine's error.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(message: String) -> Result<TemplateValue, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception");
    Err(error.with_source(Refusal(message)))
}

fn template_error(error: &minijinja::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(refusal) = current.downcast_ref::<Refusal>() {
            return Error::TemplateRefused {
                message: refusal.0.clone(),
            };
        }
        cause = current.source();
    }
    Error::Template {
        reason: error.to_string(),
    }
}

/// transformers' `tojson`: nothing escaped for HTML, and the arguments of `json.dumps`.
#[expect(
    clippy::needless_pass_by_value,
    reason = "minijinja hands keyword arguments over by value"
)]
fn tojson(value: &TemplateValue, kwargs: Kwargs) -> Result<TemplateValue, minijinja::Error> {
    let style = JsonStyle {
        indent: kwargs.get::<Option<usize>>("indent")?,
        separators: kwargs
            .get::<Option<Vec<String>>>("separators")?
            .and_then(|pair| <[String; 2]>::try_from(pair).ok())
            .map(|[items, keys]| (items, keys)),
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(value).map_err(|error| {
        minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(error)
    })?;
    Ok(TemplateValue::from_safe_string(dumps_styled(
        &value, &style,
    )))
}

/// Takes at most [`TEXT_BYTES_MAX`] bytes.
#[derive(Default)]
struct BoundedOutput {
    bytes: Vec<u8>,
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > TEXT_BYTES_MAX {
            return Err(io::Error::other(format!(
                "output has more than {TEXT_BYTES_MAX} bytes"
            )));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
