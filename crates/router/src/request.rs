//! The one form of a request, whichever door it came through. A value of these types has been checked.
//!
//! Never does I/O; tokenizing ([`prepare`]) is long CPU work and belongs on a blocking thread.

use std::sync::Arc;

use tramontane_tokenizer::{ChatRequest, StopDecoder, Tokenizer};
use tramontane_types::sampling::BAD_WORDS_MAX;
use tramontane_types::{Constraint, InvalidSampling, SamplingParams, TokenId};

use crate::answer_id::AnswerId;
use crate::bad_words::bad_words;
use crate::error::{ApiError, ErrorKind};
use crate::reported::{ReportNames, Reported};
use crate::run::ServedModel;
use crate::text_limits::{check_prompts, check_words};
use crate::tools::{self, ToolUse};

/// Most answers of one prompt, as in the OpenAI API.
pub(crate) const N_MAX: u32 = 128;
/// Most answers to choose from, as in the OpenAI API.
pub(crate) const BEST_OF_MAX: u32 = 20;
/// Most words that may not appear: each may become two sequences of tokens.
pub(crate) const WORDS_MAX: usize = BAD_WORDS_MAX / 2;
/// Most sequences of one request: prompts times answers.
pub(crate) const CHOICES_MAX: usize = 128;
/// Memory of a request beside its prompts: its task, its connection and its strings, roughly.
const REQUEST_BYTES: usize = 16 << 10;
/// Most classes that a request may ask to be lowered by.
pub(crate) const PRIORITY_MAX: u32 = 2;
/// Tokens of a completion when nobody says, as in the OpenAI API.
pub(crate) const COMPLETION_TOKENS_DEFAULT: u32 = 16;

/// What a constraint is called in messages over gRPC.
pub(crate) const CONSTRAINT_NAME: &str = "options.constraint";

/// What to go on from.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompt {
    /// Plain text, tokenized with a leading beginning-of-sequence.
    Text(String),
    /// A text with a gap after `prompt` and before `suffix`, which the answer fills.
    Infill { prompt: String, suffix: String },
    /// Exactly these tokens.
    Ids(Vec<TokenId>),
    /// A conversation, rendered with the model's chat template. The only prompt of its request.
    Chat(ChatRequest),
}

/// What a client may set, as it came; absent fields take the API's defaults.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Options {
    pub(crate) temperature: Option<f32>,
    pub(crate) top_k: Option<u32>,
    pub(crate) top_p: Option<f32>,
    pub(crate) min_p: Option<f32>,
    pub(crate) presence_penalty: Option<f32>,
    pub(crate) frequency_penalty: Option<f32>,
    pub(crate) repetition_penalty: Option<f32>,
    pub(crate) logit_bias: Vec<(TokenId, f32)>,
    pub(crate) seed: Option<i64>,
    pub(crate) max_tokens: Option<u32>,
    /// Name that the client gave `max_tokens`, when another.
    pub(crate) max_tokens_name: Option<&'static str>,
    pub(crate) min_tokens: Option<u32>,
    pub(crate) stop: Vec<String>,
    pub(crate) stop_token_ids: Vec<TokenId>,
    pub(crate) ignore_eos: Option<bool>,
    pub(crate) logprobs: Option<u32>,
    /// Name that the client gave `logprobs`, when not `top_logprobs`.
    pub(crate) logprobs_name: Option<&'static str>,
    pub(crate) n: Option<u32>,
    /// Answers to make of which the `n` best are given.
    pub(crate) best_of: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
    /// Words that may not appear; tokenized in [`prepare`].
    pub(crate) bad_words: Vec<String>,
    pub(crate) constraint: Option<Arc<Constraint>>,
    /// Name that the client gave `constraint`.
    pub(crate) constraint_name: Option<&'static str>,
    /// The answer begins with the prompt.
    pub(crate) echo: bool,
    /// Classes of priority below the tenant's own.
    pub(crate) priority: Option<u32>,
    pub(crate) tool_use: ToolUse,
}

impl Options {
    /// Whether other answers are made than given: they are chosen when all have ended.
    pub(crate) fn chooses(&self) -> bool {
        chooses(self.n, self.best_of)
    }
}

/// Whether `best_of` asks for other answers to be made than the `n` that are given.
pub(crate) fn chooses(n: Option<u32>, best_of: Option<u32>) -> bool {
    best_of.is_some_and(|made| made != n.unwrap_or(1))
}

/// A request that breaks no rule that can be checked without the tokenizer.
#[derive(Clone, Debug)]
pub(crate) struct GenerationRequest {
    pub(crate) prompts: Vec<Prompt>,
    /// Seed and `max_tokens` are set per sequence, in [`prepare`].
    pub(crate) sampling: SamplingParams,
    pub(crate) seed: Option<i64>,
    pub(crate) max_tokens: Option<u32>,
    pub(crate) max_tokens_name: &'static str,
    pub(crate) constraint_name: &'static str,
    pub(crate) report_names: ReportNames,
    pub(crate) stop: StopDecoder,
    /// Answers to make of each prompt.
    pub(crate) n: u32,
    /// The best of them, which are given.
    pub(crate) kept: u32,
    pub(crate) echo: bool,
    /// Classes of priority below the tenant's own.
    pub(crate) priority: u32,
    pub(crate) bad_words: Vec<String>,
    pub(crate) tool_use: ToolUse,
}

/// One prompt, ready to run.
#[derive(Clone, Debug)]
pub(crate) struct PreparedPrompt {
    pub(crate) ids: Arc<[TokenId]>,
    /// Text that the answer begins with, when asked for.
    pub(crate) echo: Option<Arc<str>>,
    /// Whether the answer starts a text of its own, as in a chat.
    pub(crate) is_chat: bool,
    /// Most tokens of its answers.
    pub(crate) max_tokens: u32,
}

/// A tokenized request: every prompt fits the model's context together with its longest answer.
#[derive(Clone, Debug)]
pub(crate) struct PreparedRequest {
    pub(crate) prompts: Vec<PreparedPrompt>,
    /// Of all sequences; [`Self::params`] puts in what is another for each.
    pub(crate) sampling: SamplingParams,
    /// Whether calls of tools are looked for in the answer.
    pub(crate) reads_calls: bool,
    /// Memory of what the door keeps to repeat it in the answer.
    pub(crate) repeated_bytes: usize,
    /// What the client calls the constraint of all prompts, if they have one.
    pub(crate) constraint_name: &'static str,
    pub(crate) stop: StopDecoder,
    /// Answers to make of each prompt.
    pub(crate) n: u32,
    /// The best of them, which are given when all have ended.
    pub(crate) kept: u32,
    /// Classes of priority below the tenant's own.
    pub(crate) priority: u32,
}

impl PreparedRequest {
    /// Sequences that this request runs.
    pub(crate) fn num_sequences(&self) -> usize {
        self.prompts.len() * self.n as usize
    }

    /// Tokens of all prompts.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.ids.len()).sum()
    }

    /// About the memory that it takes while it waits.
    pub(crate) fn size(&self) -> usize {
        let echoes = self.prompts.iter().filter_map(|p| p.echo.as_deref());
        let echoes: usize = echoes.map(str::len).sum();
        let ids = self.prompt_tokens() * size_of::<TokenId>();
        let prompts = self.prompts.len() * size_of::<PreparedPrompt>() + ids + echoes;
        REQUEST_BYTES + prompts + lists_bytes(&self.sampling) + self.repeated_bytes
    }

    /// How the tokens of one of a prompt's answers are chosen.
    pub(crate) fn params(&self, prompt: &PreparedPrompt, seed: u64) -> SamplingParams {
        SamplingParams {
            seed,
            max_tokens: prompt.max_tokens,
            ..self.sampling.clone()
        }
    }
}

/// Memory of what parameters hold beside their numbers.
fn lists_bytes(sampling: &SamplingParams) -> usize {
    let word = |word: &Vec<TokenId>| size_of_val(word) + size_of_val(&word[..]);
    let words: usize = sampling.bad_words.iter().map(word).sum();
    let constraint = sampling.constraint.as_ref();
    let constraint = constraint.map_or(0, |constraint| constraint.source().len());
    size_of_val(&sampling.logit_bias[..]) + size_of_val(&sampling.stop_ids[..]) + words + constraint
}

impl GenerationRequest {
    /// Checks prompts and options against every limit.
    pub(crate) fn new(
        prompts: Vec<Prompt>,
        options: &Options,
        model: &ServedModel,
    ) -> Result<Self, ApiError> {
        let kept = options.n.unwrap_or(1);
        if !(1..=N_MAX).contains(&kept) {
            return Err(ApiError::invalid(
                "n",
                format!("n must be between 1 and {N_MAX}, got {kept}"),
            ));
        }
        let n = answers_to_make(kept, options.best_of)?;
        if prompts.is_empty() {
            return Err(ApiError::invalid("prompt", "prompt must not be empty"));
        }
        if prompts.len() * n as usize > CHOICES_MAX {
            let message = format!(
                "prompt must list at most {CHOICES_MAX} prompts times n, got {} times {n}",
                prompts.len()
            );
            return Err(ApiError::invalid("prompt", message));
        }
        let priority = options.priority.unwrap_or(0);
        if priority > PRIORITY_MAX {
            let message = format!("priority must be between 0 and {PRIORITY_MAX}, got {priority}");
            return Err(ApiError::invalid("priority", message));
        }
        let stop = StopDecoder::new(&options.stop)?;
        let max_tokens_name = options.max_tokens_name.unwrap_or("max_tokens");
        if options.bad_words.len() > WORDS_MAX {
            let got = options.bad_words.len();
            let message = format!("bad_words must have at most {WORDS_MAX} entries, got {got}");
            return Err(ApiError::invalid("bad_words", message));
        }
        check_words(&options.bad_words)?;
        for prompt in &prompts {
            if let Prompt::Chat(chat) = prompt {
                tools::check(&chat.tools, &options.tool_use)?;
            }
        }
        let mut sampling = sampling(options);
        if options.chooses() {
            // The best ones are found by them.
            sampling.logprobs = sampling.logprobs.or(Some(0));
        }
        sampling.validate(model.vocab).map_err(|error| {
            let renamed = match error.param {
                "max_tokens" => Some(max_tokens_name),
                "top_logprobs" => options.logprobs_name,
                "response_format" => options.constraint_name,
                _ => None,
            };
            refused(&error, renamed)
        })?;
        Ok(Self {
            prompts,
            sampling,
            seed: options.seed,
            max_tokens: options.max_tokens,
            max_tokens_name,
            constraint_name: options.constraint_name.unwrap_or(CONSTRAINT_NAME),
            report_names: report_names(options),
            stop,
            n,
            kept,
            echo: options.echo,
            priority,
            bad_words: options.bad_words.clone(),
            tool_use: options.tool_use.clone(),
        })
    }
}

/// What the client has asked for log probabilities with.
fn report_names(options: &Options) -> ReportNames {
    let logprobs = options.logprobs_name.unwrap_or("top_logprobs");
    let is_echo = options.echo && options.prompt_logprobs == options.logprobs;
    ReportNames {
        // The best answers are found by them, whoever else asks for them.
        sampled: if options.chooses() {
            "best_of"
        } else {
            logprobs
        },
        prompt: if is_echo { logprobs } else { "prompt_logprobs" },
    }
}

/// Answers of each prompt: all that are asked for, or more to choose from.
fn answers_to_make(n: u32, best_of: Option<u32>) -> Result<u32, ApiError> {
    let Some(best_of) = best_of else {
        return Ok(n);
    };
    if best_of < n || best_of > BEST_OF_MAX.max(n) {
        let message = format!("best_of must be between n ({n}) and {BEST_OF_MAX}, got {best_of}");
        return Err(ApiError::invalid("best_of", message));
    }
    Ok(best_of)
}

fn sampling(options: &Options) -> SamplingParams {
    let defaults = SamplingParams::default();
    SamplingParams {
        temperature: options.temperature.unwrap_or(defaults.temperature),
        top_k: options.top_k.unwrap_or(defaults.top_k),
        top_p: options.top_p.unwrap_or(defaults.top_p),
        min_p: options.min_p.unwrap_or(defaults.min_p),
        presence_penalty: options
            .presence_penalty
            .unwrap_or(defaults.presence_penalty),
        frequency_penalty: options
            .frequency_penalty
            .unwrap_or(defaults.frequency_penalty),
        repetition_penalty: options
            .repetition_penalty
            .unwrap_or(defaults.repetition_penalty),
        logit_bias: options.logit_bias.clone(),
        seed: defaults.seed,
        // Without a limit the context is the limit; it is known after tokenizing.
        max_tokens: options.max_tokens.unwrap_or(u32::MAX),
        min_tokens: options.min_tokens.unwrap_or(defaults.min_tokens),
        stop_ids: options.stop_token_ids.clone(),
        ignore_eos: options.ignore_eos.unwrap_or(defaults.ignore_eos),
        logprobs: options.logprobs,
        prompt_logprobs: options.prompt_logprobs,
        // Tokenized later.
        bad_words: Vec::new(),
        constraint: options.constraint.clone(),
    }
}

fn refused(error: &InvalidSampling, renamed: Option<&str>) -> ApiError {
    let param = renamed.unwrap_or(error.param);
    ApiError::invalid(
        param,
        format!("{param} must be {}, got {}", error.rule, error.got),
    )
}

/// Tokenizes and checks every prompt against the model's context. Long CPU work. The answer is asked for
/// as `id`, which decides what a request without a seed says.
pub(crate) fn prepare(
    request: GenerationRequest,
    id: AnswerId,
    tokenizer: &Tokenizer,
    model: &ServedModel,
) -> Result<PreparedRequest, ApiError> {
    let mut sampling = SamplingParams {
        seed: request.seed.map_or(id.seed(), i64::cast_unsigned),
        ..request.sampling.clone()
    };
    check_prompts(&request.prompts, tokenizer, model)?;
    let mut prompts = Vec::with_capacity(request.prompts.len());
    for (i, prompt) in request.prompts.iter().enumerate() {
        let param = prompt_name(&request.prompts, i);
        let ids = tokenize(prompt, &param, tokenizer, model)?;
        let max_tokens = fit(&request, prompt, ids.len(), &param, model)?;
        if sampling.min_tokens > max_tokens {
            let message = format!(
                "min_tokens must be at most {max_tokens}, what the context leaves, got {}",
                sampling.min_tokens
            );
            return Err(ApiError::invalid("min_tokens", message));
        }
        let echo = request.echo.then(|| match prompt {
            Prompt::Text(text) | Prompt::Infill { prompt: text, .. } => text.as_str().into(),
            Prompt::Ids(_) | Prompt::Chat(_) => tokenizer.decode(&ids, true).into(),
        });
        prompts.push(PreparedPrompt {
            ids: ids.into(),
            echo,
            is_chat: matches!(prompt, Prompt::Chat(_)),
            max_tokens,
        });
    }
    sampling.bad_words = bad_words(&request.bad_words, tokenizer)?;
    Reported::of(&sampling, request.n).check(&prompts, request.report_names)?;
    let mut reads_calls = false;
    if let Some(Prompt::Chat(chat)) = request.prompts.first() {
        let constraint = sampling.constraint.take();
        let tools = tools::prepare(chat, &request.tool_use, tokenizer, constraint)?;
        let banned = tools.banned.iter().map(|&id| vec![id]);
        sampling.bad_words.extend(banned);
        sampling.constraint = tools.constraint;
        reads_calls = tools.reads_calls;
    }
    // Once more, with what only the tokenizer could tell.
    sampling
        .validate(model.vocab)
        .map_err(|error| refused(&error, None))?;
    // Without one of the client's it is that of its tools.
    let constraint_name = match request.sampling.constraint {
        Some(_) => request.constraint_name,
        None => "tools",
    };
    Ok(PreparedRequest {
        prompts,
        sampling,
        reads_calls,
        repeated_bytes: 0,
        constraint_name,
        stop: request.stop,
        n: request.n,
        kept: request.kept,
        priority: request.priority,
    })
}

/// What clients call the prompt at `index`.
pub(crate) fn prompt_name(prompts: &[Prompt], index: usize) -> String {
    match prompts.get(index) {
        Some(Prompt::Chat(_)) => "messages".to_owned(),
        _ if prompts.len() == 1 => "prompt".to_owned(),
        _ => format!("prompt[{index}]"),
    }
}

fn tokenize(
    prompt: &Prompt,
    param: &str,
    tokenizer: &Tokenizer,
    model: &ServedModel,
) -> Result<Vec<TokenId>, ApiError> {
    let named = |error: tramontane_tokenizer::Error| {
        let error = ApiError::from(error);
        if error.kind == ErrorKind::Invalid && error.param.is_none() {
            error.at(param)
        } else {
            error
        }
    };
    let ids = match prompt {
        Prompt::Text(text) => tokenizer.encode_with_bos(text).map_err(named)?,
        Prompt::Infill { prompt, suffix } => {
            tokenizer.encode_infill(prompt, suffix).map_err(named)?
        }
        Prompt::Chat(chat) => tokenizer.encode_chat(chat).map_err(named)?,
        Prompt::Ids(ids) => ids.clone(),
    };
    if ids.is_empty() {
        return Err(ApiError::invalid(
            param,
            format!("{param} must have at least one token"),
        ));
    }
    if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab) {
        let message = format!(
            "{param} must hold token ids below {}, got {id}",
            model.vocab
        );
        return Err(ApiError::invalid(param, message));
    }
    Ok(ids)
}

/// Most tokens to sample after `prompt_tokens`, or why they do not fit.
fn fit(
    request: &GenerationRequest,
    prompt: &Prompt,
    prompt_tokens: usize,
    param: &str,
    model: &ServedModel,
) -> Result<u32, ApiError> {
    let context = model.context_length as usize;
    let too_long = |message: String, param: &str| {
        Err(ApiError::new(ErrorKind::ContextLength, message).at(param))
    };
    if prompt_tokens >= context {
        let message = format!(
            "this model's context is {context} tokens, the prompt has {prompt_tokens} and leaves no room for an answer"
        );
        return too_long(message, param);
    }
    // In range: the context is a u32.
    let room = u32::try_from(context - prompt_tokens).unwrap_or(u32::MAX);
    match request.max_tokens {
        Some(asked) if asked > room => {
            let name = request.max_tokens_name;
            let message = format!(
                "this model's context is {context} tokens, the prompt has {prompt_tokens} and {name} is {asked}, together {}",
                prompt_tokens as u64 + u64::from(asked)
            );
            too_long(message, name)
        }
        Some(asked) => Ok(asked),
        None if matches!(prompt, Prompt::Chat(_)) => {
            let reported = Reported::of(&request.sampling, request.n);
            Ok(room.min(reported.tokens_max(prompt_tokens)))
        }
        None => Ok(room.min(COMPLETION_TOKENS_DEFAULT.max(request.sampling.min_tokens))),
    }
}
