//! `tramontane model ...`, and opening a model's files for the processes.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use tramontane_grammar::Vocabulary;
use tramontane_model::checkpoint::Overrides;
use tramontane_model::{self as model, Checkpoint, Inspection, demo, gguf, manifest};
use tramontane_router::ServedModel;
use tramontane_tokenizer::{self as tokenizer, GgufTokenizer, Tokenizer};
use tramontane_types::TokenId;

use crate::args::{ModelArgs, ModelCommand};
use crate::output;
use crate::settings::misuse;

/// Runs `model inspect` or `model verify`.
pub(crate) fn run(command: ModelCommand) -> anyhow::Result<()> {
    match command {
        ModelCommand::Inspect { dir, output } => {
            let inspection = open(dir.as_deref(), Overrides::default())?.inspect();
            if output.is_data() {
                return output::data(output, &inspection);
            }
            Ok(print_inspection(&inspection)?)
        }
        ModelCommand::Verify {
            dir,
            write_manifest,
        } => verify(dir.as_deref(), write_manifest),
    }
}

fn print_inspection(i: &Inspection) -> std::io::Result<()> {
    let g = &i.geometry;
    let row = |key: &str, value: String| vec![key.to_owned(), value];
    let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
    let millions = |n: u64| format!("{:.1} M", n as f64 / 1e6);
    let window = g
        .sliding_window
        .map_or("none".to_owned(), |w| w.to_string());
    let files: u64 = i.files.iter().map(|(_, bytes)| bytes).sum();
    let rows = [
        row("architecture", format!("{:?}", i.architecture)),
        row("fingerprint", i.fingerprint.clone()),
        row(
            "parameters",
            format!(
                "{} ({} per token)",
                millions(i.parameters),
                millions(i.parameters_active)
            ),
        ),
        row("layers", g.num_layers.to_string()),
        row("hidden", g.hidden.to_string()),
        row(
            "heads",
            format!(
                "{} of {}, {} for keys and values",
                g.num_heads, g.head_dim, g.num_kv_heads
            ),
        ),
        row(
            "experts",
            format!(
                "{} of {} columns, {} per token",
                g.num_experts, g.ff, g.top_k
            ),
        ),
        row("vocabulary", g.vocab.to_string()),
        row(
            "positions",
            format!("{}, sliding window {window}", g.max_positions),
        ),
        row(
            "experts in memory",
            format!(
                "bf16 {}, q8 {}, q4 {}",
                gib(i.expert_bytes.bf16),
                gib(i.expert_bytes.q8),
                gib(i.expert_bytes.q4)
            ),
        ),
        row(
            "keys and values",
            format!("{} bytes per token", i.kv_bytes_per_token),
        ),
        row("files", format!("{}, {}", i.files.len(), gib(files))),
    ];
    output::table(&["", ""], &rows)
}

fn verify(dir: Option<&Path>, write_manifest: bool) -> anyhow::Result<()> {
    let checkpoint = open(dir, Overrides::default())?;
    let bar = progress_bar("verifying", "{bytes} of {total_bytes}");
    let report = checkpoint.verify(&|done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report?;
    for (file, digest) in &report.digests {
        output::line(&format!("{digest}  {file}"))?;
    }
    if write_manifest {
        let path = checkpoint.manifest_path().ok_or_else(|| {
            misuse("--write-manifest needs a directory or a GGUF file; the demo is built in")
        })?;
        manifest::write(&path, &report.digests)?;
        output::note(&format!("wrote {}", path.display()));
    }
    output::note(&format!(
        "{} tensors, {} bytes, all numbers finite",
        report.tensors, report.bytes
    ));
    Ok(())
}

/// A model's weights and what clients call it.
pub(crate) fn open_model(args: &ModelArgs) -> anyhow::Result<(Arc<Checkpoint>, String)> {
    let overrides = Overrides {
        sliding_window: args.sliding_window.map(|keys| (keys > 0).then_some(keys)),
    };
    let checkpoint = open(args.model.as_deref(), overrides)?;
    Ok((Arc::new(checkpoint), model_name(args)))
}

/// A model's tokenizer, and what the router tells clients of it.
pub(crate) fn open_tokenizer(
    args: &ModelArgs,
    checkpoint: &Checkpoint,
) -> anyhow::Result<(Arc<Tokenizer>, ServedModel)> {
    let tokenizer = match &args.model {
        Some(path) => tokenizer_of(path, checkpoint)
            .with_context(|| format!("tokenizer of {}", path.display()))?,
        None => embedded_tokenizer().context("tokenizer of the embedded demo")?,
    };
    let geometry = checkpoint.geometry();
    anyhow::ensure!(
        tokenizer.vocab_size() <= geometry.vocab,
        "the tokenizer has {} tokens, the model's vocabulary {}: they do not belong together",
        tokenizer.vocab_size(),
        geometry.vocab
    );
    let model = ServedModel {
        id: model_name(args),
        aliases: Vec::new(),
        // `config.json` bounds it far below.
        context_length: geometry.max_positions as u32,
        vocab: geometry.vocab,
    };
    Ok((Arc::new(tokenizer), model))
}

/// What the tokens of a worker's model stand for. A worker needs no tokenizer but for constraints, so without one it
/// serves everything else.
pub(crate) fn vocabulary_of(args: &ModelArgs, checkpoint: &Checkpoint) -> Option<Vocabulary> {
    let made = open_tokenizer(args, checkpoint)
        .and_then(|(tokenizer, _)| Ok(tramontane_router::vocabulary(&tokenizer)?));
    made.inspect_err(|error| {
        output::note(&format!(
            "no tokenizer, requests with a constraint are refused by this worker: {error:#}"
        ));
    })
    .ok()
}

fn open(dir: Option<&Path>, overrides: Overrides) -> anyhow::Result<Checkpoint> {
    match dir {
        Some(dir) => Checkpoint::open_with(dir, overrides)
            .with_context(|| format!("checkpoint {}", dir.display())),
        None => Checkpoint::from_embedded().context("embedded demo model"),
    }
}

/// The tokenizer of a directory; of a GGUF file its own or, where that is not supported, the one beside it.
fn tokenizer_of(path: &Path, checkpoint: &Checkpoint) -> anyhow::Result<Tokenizer> {
    let Some(metadata) = checkpoint.metadata()? else {
        return Ok(Tokenizer::from_dir(path)?);
    };
    let own = match Tokenizer::from_gguf(path, &gguf_tokenizer(&metadata)?) {
        Ok(tokenizer) => return Ok(tokenizer),
        Err(error) => error,
    };
    let beside = path.with_file_name("");
    match Tokenizer::from_dir(if beside.as_os_str().is_empty() {
        Path::new(".")
    } else {
        &beside
    }) {
        Err(tokenizer::Error::NoTokenizer { .. }) => Err(own.into()),
        beside => Ok(beside?),
    }
}

/// The keys of a GGUF file that belong to its tokenizer.
fn gguf_tokenizer<'a>(metadata: &gguf::Metadata<'a>) -> anyhow::Result<GgufTokenizer<'a>> {
    // The model's configuration has checked them.
    let id = |key| Ok::<_, model::Error>(metadata.whole(key)?.and_then(|id| id.try_into().ok()));
    let mut eos: Vec<TokenId> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        let end = id(key)?;
        eos.extend(end.filter(|id| !eos.contains(id)));
    }
    let removes_spaces = metadata.flag("tokenizer.ggml.remove_extra_whitespaces")?;
    let maps_characters = metadata
        .get("tokenizer.ggml.precompiled_charsmap")
        .is_some();
    Ok(GgufTokenizer {
        model: metadata.text("tokenizer.ggml.model")?,
        pre: metadata.text("tokenizer.ggml.pre")?,
        tokens: metadata.texts("tokenizer.ggml.tokens")?.unwrap_or_default(),
        scores: metadata
            .numbers("tokenizer.ggml.scores")?
            .unwrap_or_default(),
        types: metadata
            .wholes("tokenizer.ggml.token_type")?
            .unwrap_or_default(),
        merges: metadata.texts("tokenizer.ggml.merges")?.unwrap_or_default(),
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos,
        unk: id("tokenizer.ggml.unknown_token_id")?,
        adds_bos: metadata.flag("tokenizer.ggml.add_bos_token")?,
        adds_space_prefix: metadata.flag("tokenizer.ggml.add_space_prefix")?,
        normalizes: removes_spaces == Some(true) || maps_characters,
        chat_template: metadata.text("tokenizer.chat_template")?,
    })
}

fn embedded_tokenizer() -> anyhow::Result<Tokenizer> {
    let folder = tempfile::tempdir().context("a temporary directory for the tokenizer")?;
    for (name, bytes) in demo::TOKENIZER_FILES {
        std::fs::write(folder.path().join(name), bytes).context(name)?;
    }
    Ok(Tokenizer::from_dir(folder.path())?)
}

fn model_name(args: &ModelArgs) -> String {
    let of_directory = || {
        let name = args.model.as_ref()?.file_name()?.to_str()?;
        Some(name.strip_suffix(".gguf").unwrap_or(name).to_owned())
    };
    args.model_name
        .clone()
        .or_else(of_directory)
        .unwrap_or_else(|| demo::NAME.to_owned())
}

/// A bar on standard error; nothing where that is no terminal.
pub(crate) fn progress_bar(what: &str, counts: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(&format!("{what:>12} [{{bar:40}}] {counts}"));
    let bar = ProgressBar::new(0);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
