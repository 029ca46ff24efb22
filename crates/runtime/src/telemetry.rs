//! Logs and traces. Prompt and output text never go through here.

use std::fmt::{self, Write as _};
use std::io::IsTerminal as _;

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::{Deserialize, Serialize};
use tracing::field::Field;
use tracing_subscriber::field::MakeExt as _;
use tracing_subscriber::fmt::format::{Writer, debug_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// How logs are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For a person at a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Where logs and traces go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetryConfig {
    /// Filter such as `info,tramontane_engine=debug`.
    pub log: String,
    /// Text or JSON lines, on standard error.
    pub log_format: LogFormat,
    /// OTLP gRPC endpoint of a trace collector; unset sends no traces.
    pub otlp_endpoint: Option<String>,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log: "info".to_owned(),
            log_format: LogFormat::Text,
            otlp_endpoint: None,
        }
    }
}

/// Why telemetry could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error("telemetry.log: {filter:?} is not a log filter such as \"info,tramontane=debug\"")]
    Filter {
        /// What was given.
        filter: String,
        /// What the parser said.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// The exporter refuses its endpoint.
    #[error("telemetry.otlp_endpoint: {endpoint:?} cannot be used")]
    Otlp {
        /// What was given.
        endpoint: String,
        /// What the exporter said.
        #[source]
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// Another subscriber is installed.
    #[error("telemetry was started twice")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// Flushes pending spans when dropped.
#[derive(Debug, Default)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown()
        {
            tracing::debug!(%error, "trace exporter did not stop cleanly");
        }
    }
}

impl TelemetryConfig {
    /// Checks the filter.
    ///
    /// # Errors
    /// When it does not parse.
    pub fn validate(&self) -> Result<(), TelemetryError> {
        self.filter().map(drop)
    }

    fn filter(&self) -> Result<EnvFilter, TelemetryError> {
        EnvFilter::try_new(&self.log).map_err(|source| TelemetryError::Filter {
            filter: self.log.clone(),
            source,
        })
    }
}

/// Starts logs and, when an endpoint is given, traces. Call once, inside the tokio runtime.
///
/// # Errors
/// When the filter or the endpoint cannot be used, or telemetry runs already.
pub fn start(config: &TelemetryConfig, service: &'static str) -> Result<Telemetry, TelemetryError> {
    let filter = config.filter()?;
    let text = tracing_subscriber::fmt::layer()
        .fmt_fields(debug_fn(one_line).delimited(" "))
        .with_writer(std::io::stderr)
        .with_target(false)
        // A log file wants no colours.
        .with_ansi(std::io::stderr().is_terminal());
    let logs = match config.log_format {
        LogFormat::Text => text.boxed(),
        LogFormat::Json => text.json().flatten_event(true).boxed(),
    };
    let provider = config
        .otlp_endpoint
        .as_deref()
        .map(|e| otlp(e, service))
        .transpose()?;
    let traces = provider
        .as_ref()
        .map(|p| tracing_opentelemetry::layer().with_tracer(p.tracer(service)));
    tracing_subscriber::registry()
        .with(filter)
        .with(logs)
        .with(traces)
        .try_init()?;
    Ok(Telemetry { provider })
}

/// Writes a field so that nothing in it ends the line or speaks to a terminal: much of what is logged comes from elsewhere.
fn one_line(writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug) -> fmt::Result {
    if field.name() != "message" {
        write!(writer, "{}=", field.name())?;
    }
    write!(OneLine(writer), "{value:?}")
}

struct OneLine<'a, 'w>(&'a mut Writer<'w>);

impl fmt::Write for OneLine<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for char in text.chars() {
            if char.is_control() {
                write!(self.0, "{}", char.escape_default())?;
            } else {
                self.0.write_char(char)?;
            }
        }
        Ok(())
    }
}

fn otlp(endpoint: &str, service: &'static str) -> Result<SdkTracerProvider, TelemetryError> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()
        .map_err(|source| TelemetryError::Otlp {
            endpoint: endpoint.to_owned(),
            source,
        })?;
    let resource = opentelemetry_sdk::Resource::builder()
        .with_service_name(service)
        .build();
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource)
        .build())
}
