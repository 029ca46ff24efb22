//! Prometheus text and the bucket lists that all processes share. Each process names its metrics in a file of its own.

pub use prometheus_client;
use prometheus_client::registry::Registry;

/// Content type of [`render`]'s text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds from a request to its first token.
pub const TTFT_BUCKETS: [f64; 16] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 40.0, 160.0,
];

/// Seconds between two tokens of one stream.
pub const ITL_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 1.0, 5.0, 20.0,
];

/// Seconds of a whole request.
pub const LATENCY_BUCKETS: [f64; 13] = [
    0.05, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 240.0, 960.0,
];

/// All metrics of a registry in the OpenMetrics text format.
#[must_use]
pub fn render(registry: &Registry) -> String {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, registry) {
        Ok(()) => text,
        // Writing to a String does not fail; an encoder that does must not take the process down.
        Err(error) => format!("# {error}\n# EOF\n"),
    }
}
