//! A small client of any OpenAI-compatible endpoint: what `chat` and `bench` need, nothing more.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use futures::{Stream, StreamExt as _};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{StatusCode, Url};
use serde_json::Value;

use crate::args::EndpointArgs;
use crate::dial::{Public, is_beyond};
use crate::exit::{Exit, refusal};
use crate::settings::misuse;

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest server-sent event that is accepted.
const EVENT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most characters that are shown of an answer that is no JSON.
const SHOWN_CHARS_MAX: usize = 200;

/// An endpoint such as `http://127.0.0.1:8000`, with or without `/v1`.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
}

impl Client {
    /// A client of the endpoint, whose certificate is of the named CA, or of the system's authorities; it says who it is
    /// if there is a key.
    pub(crate) fn new(to: &Public<'_>) -> anyhow::Result<Self> {
        let mut headers = HeaderMap::new();
        if let Some(key) = to.api_key.filter(|key| !key.is_empty()) {
            if !to.insecure {
                refuse_in_the_clear(to.url)?;
            }
            let bearer = HeaderValue::from_str(&format!("Bearer {key}"));
            let mut bearer = bearer.map_err(|_| misuse("--api-key must be visible characters"))?;
            bearer.set_sensitive(true);
            headers.insert(AUTHORIZATION, bearer);
        }
        let base = to
            .url
            .trim_end_matches('/')
            .trim_end_matches("/v1")
            .to_owned();
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .default_headers(headers)
            // Some servers close a connection after an answer without saying so, and the next request
            // on it would be lost.
            .pool_max_idle_per_host(0);
        let http = match (to.ca, base.starts_with("https://")) {
            (Some(ca), _) => http.tls_certs_only(authorities(ca)?),
            (None, true) => http,
            // In the clear nobody is believed: a system without authorities is no obstacle.
            (None, false) => http.tls_certs_only([]),
        };
        let http = http.build().context("http client")?;
        Ok(Self { http, base })
    }

    /// A client of the endpoint, and the model to ask there: the one that is named, or its first.
    pub(crate) async fn with_model(
        url: &str,
        endpoint: &EndpointArgs,
    ) -> anyhow::Result<(Self, String)> {
        let client = Self::new(&Public {
            url,
            ca: endpoint.tls_ca.as_deref(),
            api_key: endpoint.api_key.as_deref(),
            insecure: endpoint.insecure,
        })?;
        let model = match endpoint.model.clone() {
            Some(model) => model,
            None => client.first_model().await?,
        };
        Ok((client, model))
    }

    /// Id of the first model that the endpoint serves.
    async fn first_model(&self) -> anyhow::Result<String> {
        let url = format!("{}/v1/models", self.base);
        let answer = self.http.get(&url).send().await;
        let answer = answer
            .with_context(|| format!("no answer from {url}; is `tramontane serve` running?"))?;
        let status = answer.status();
        let text = answer.text().await.context("list of models")?;
        if !status.is_success() {
            return Err(rejected(&url, status, &text));
        }
        let models: Value = serde_json::from_str(&text)
            .with_context(|| format!("{url} must answer with JSON, got {:?}", words(&text)))?;
        let id = models["data"][0]["id"].as_str();
        Ok(id
            .with_context(|| format!("{url} lists no model"))?
            .to_owned())
    }

    /// Posts a streaming request to `/v1/<path>` and yields the JSON of each event until `[DONE]`.
    pub(crate) async fn stream(
        &self,
        path: &str,
        body: &Value,
    ) -> anyhow::Result<impl Stream<Item = anyhow::Result<Value>> + Unpin + use<>> {
        let url = format!("{}/v1/{path}", self.base);
        let answer = self.http.post(&url).json(body).send().await;
        let answer = answer
            .with_context(|| format!("no answer from {url}; is `tramontane serve` running?"))?;
        let status = answer.status();
        if !status.is_success() {
            let text = answer.text().await.unwrap_or_default();
            return Err(rejected(&url, status, &text));
        }
        let state = Events {
            bytes: answer.bytes_stream().boxed(),
            buffer: Vec::new(),
        };
        let events = futures::stream::unfold(state, |mut state| async move {
            let event = state.next().await.transpose()?;
            Some((event, state))
        });
        Ok(events.boxed())
    }
}

/// An answer that is an error, in the server's own words.
fn rejected(url: &str, status: StatusCode, text: &str) -> anyhow::Error {
    let message = format!("{url} answered {status}: {}", words(text));
    if status == StatusCode::UNAUTHORIZED {
        return refusal(Exit::Failed, message, "--api-key, or OPENAI_API_KEY");
    }
    anyhow!(message)
}

/// What the server says: the message of an OpenAI error, or how its answer begins.
fn words(text: &str) -> String {
    let body = serde_json::from_str::<Value>(text).unwrap_or_default();
    if let Some(message) = body["error"]["message"].as_str() {
        return message.to_owned();
    }
    // On one line, and nothing that a terminal would obey.
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(SHOWN_CHARS_MAX).map(plain).collect()
}

/// Whoever is on the way would read the key.
fn refuse_in_the_clear(url: &str) -> anyhow::Result<()> {
    let Some(plain) = Url::parse(url).ok().filter(|url| url.scheme() == "http") else {
        return Ok(());
    };
    // A name that means nothing fails when it is connected to.
    let found = plain.socket_addrs(|| None);
    if found.is_ok_and(|found| is_beyond(&found)) {
        let message = format!(
            "{url} is beyond this machine: the API key (--api-key, OPENAI_API_KEY) would go there in the clear"
        );
        let next = "https://, --insecure, or --api-key \"\" to send none";
        return Err(refusal(Exit::Misused, message, next));
    }
    Ok(())
}

fn authorities(path: &Path) -> anyhow::Result<Vec<reqwest::Certificate>> {
    let read = || format!("CA {}", path.display());
    let pem = std::fs::read(path).with_context(read)?;
    let found = reqwest::Certificate::from_pem_bundle(&pem).with_context(read)?;
    if found.is_empty() {
        bail!(
            "CA {} must be PEM with certificates, got none",
            path.display()
        );
    }
    Ok(found)
}

/// Cuts a byte stream into server-sent events.
struct Events {
    bytes: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    buffer: Vec<u8>,
}

impl Events {
    /// The next event's JSON; `None` after `[DONE]`. A stream that ends without `[DONE]` is an error.
    async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            while let Some(end) = self.buffer.iter().position(|&b| b == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                let Some(data) = line.trim().strip_prefix("data:") else {
                    continue;
                };
                if data.trim() == "[DONE]" {
                    return Ok(None);
                }
                let event: Value = serde_json::from_str(data).context("event is not JSON")?;
                if let Some(message) = event["error"]["message"].as_str() {
                    bail!("the server gave up: {message}");
                }
                return Ok(Some(event));
            }
            if self.buffer.len() > EVENT_BYTES_MAX {
                bail!("an event is longer than {EVENT_BYTES_MAX} bytes");
            }
            match self.bytes.next().await {
                Some(chunk) => self
                    .buffer
                    .extend_from_slice(&chunk.context("connection broke")?),
                None => bail!("the stream ended without [DONE]"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    #[test]
    fn an_error_is_told_in_the_words_of_the_server() {
        let error = |status, text| rejected("http://a/v1/models", status, text).to_string();
        let no_key = error(
            StatusCode::UNAUTHORIZED,
            r#"{"error": {"message": "who asks?"}}"#,
        );
        assert!(no_key.contains("401 Unauthorized: who asks?"), "{no_key}");
        assert!(no_key.contains("--api-key"), "{no_key}");
        let plain = error(StatusCode::BAD_REQUEST, "this port speaks TLS\u{1b}[2J");
        assert!(plain.ends_with(": this port speaks TLS [2J"), "{plain}");
        assert_eq!(words(&"é".repeat(300)), "é".repeat(SHOWN_CHARS_MAX));
    }

    #[test]
    fn a_key_goes_beyond_this_machine_with_tls_or_when_somebody_insists() {
        tramontane_runtime::tls::install_provider();
        let made = |url, api_key, insecure| {
            Client::new(&Public {
                url,
                ca: None,
                api_key,
                insecure,
            })
        };
        for (url, key, insecure) in [
            ("http://127.0.0.1:8000/v1", Some("k"), false),
            ("http://[::1]:8000", Some("k"), false),
            ("http://localhost:8000", Some("k"), false),
            ("http://192.0.2.2:8000", None, false),
            ("http://192.0.2.2:8000", Some(""), false),
            ("http://192.0.2.2:8000", Some("k"), true),
        ] {
            made(url, key, insecure).unwrap();
        }
        for url in [
            "http://192.0.2.2:8000/v1",
            "http://192.0.2.2",
            "HTTP://192.0.2.2:1",
        ] {
            let error = made(url, Some("hunter2"), false).unwrap_err();
            assert_eq!(exit::of(&error), Exit::Misused);
            let text = error.to_string();
            assert!(text.contains(url) && text.contains("--insecure"), "{text}");
            assert!(!text.contains("hunter2"), "{text}");
        }
    }
}
