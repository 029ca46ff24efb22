//! `tramontane chat`: a conversation in the terminal with any OpenAI-compatible endpoint.

use anyhow::Context as _;
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::args::ChatArgs;
use crate::openai_client::Client;
use crate::output;

/// Runs the conversation until end of input, or answers one message and returns.
pub(crate) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let (client, model) = Client::with_model(&args.url, &args.endpoint).await?;
    let mut messages = Vec::new();
    if let Some(system) = &args.system {
        messages.push(json!({ "role": "system", "content": system }));
    }
    if let Some(text) = &args.message {
        return answer(&client, &model, &args, &mut messages, text).await;
    }
    output::note(&format!(
        "Talking to {model} at {}. An empty line or Ctrl-D ends.",
        args.url
    ));
    loop {
        if output::is_terminal() {
            output::fragment("> ")?;
        }
        let line = tokio::task::spawn_blocking(read_line)
            .await?
            .context("standard input")?;
        if line.trim().is_empty() {
            break;
        }
        answer(&client, &model, &args, &mut messages, &line).await?;
    }
    Ok(())
}

/// The next line of standard input; empty at its end.
fn read_line() -> std::io::Result<String> {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

async fn answer(
    client: &Client,
    model: &str,
    args: &ChatArgs,
    messages: &mut Vec<Value>,
    text: &str,
) -> anyhow::Result<()> {
    messages.push(json!({ "role": "user", "content": text }));
    let mut body = json!({ "model": model, "messages": messages, "stream": true });
    if let Some(temperature) = args.temperature {
        body["temperature"] = json!(temperature);
    }
    if let Some(max_tokens) = args.max_tokens {
        body["max_tokens"] = json!(max_tokens);
    }
    let mut events = client.stream("chat/completions", &body).await?;
    let mut reply = String::new();
    while let Some(event) = events.next().await {
        if let Some(piece) = event?["choices"][0]["delta"]["content"].as_str() {
            output::fragment(piece)?;
            reply.push_str(piece);
        }
    }
    output::line("")?;
    messages.push(json!({ "role": "assistant", "content": reply }));
    Ok(())
}
