//! Which span of another process a span belongs to: W3C's `traceparent`. Nothing else of what a caller says about traces goes
//! any further.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

const TRACEPARENT: &str = "traceparent";

/// Makes `span`, which nothing has happened in yet, part of the span that the caller names, if it names one.
pub fn join(span: &Span, headers: &HeaderMap) {
    let parent = TraceContextPropagator::new().extract(&Said(headers));
    if parent.span().span_context().is_valid() {
        // Refused where no traces are sent.
        let _untraced = span.set_parent(parent);
    }
}

/// Names the current span to whoever is called; nothing where no traces are sent.
pub fn tell(headers: &mut HeaderMap) {
    let context = Span::current().context();
    TraceContextPropagator::new().inject_context(&context, &mut Told(headers));
}

struct Said<'a>(&'a HeaderMap);

impl Extractor for Said<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let value = (key == TRACEPARENT).then(|| self.0.get(TRACEPARENT));
        value.flatten()?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

struct Told<'a>(&'a mut HeaderMap);

impl Injector for Told<'_> {
    fn set(&mut self, key: &str, value: String) {
        if key == TRACEPARENT
            && let Ok(value) = HeaderValue::try_from(value)
        {
            let name = HeaderName::from_static(TRACEPARENT);
            self.0.insert(name, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::TracerProvider as _;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    /// What is told from within a span of a process that sends traces, after a caller has said this.
    fn told_after(said: &[(&'static str, &'static [u8])]) -> HeaderMap {
        // While there is one subscriber only, a span that a test on another thread makes first is off for all threads.
        let _another = tracing::Dispatch::new(tracing_subscriber::registry());
        let tracer = SdkTracerProvider::builder().build().tracer("test");
        let layer = tracing_opentelemetry::layer().with_tracer(tracer);
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || told(said))
    }

    fn told(said: &[(&'static str, &'static [u8])]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in said {
            headers.insert(*name, HeaderValue::from_bytes(value).unwrap());
        }
        let span = tracing::info_span!("asked");
        join(&span, &headers);
        let _within = span.enter();
        let mut told = HeaderMap::new();
        tell(&mut told);
        told
    }

    #[test]
    fn a_trace_goes_on_in_a_span_of_its_own() {
        let parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let told = told_after(&[("traceparent", parent), ("tracestate", b"vendor=secret")]);
        let value = told["traceparent"].to_str().unwrap();
        assert!(value.starts_with(&format!("00-{TRACE}-")), "{value}");
        assert!(value.ends_with("-01"), "{value}");
        assert!(!value.contains("b7ad6b7169203331"), "{value}");
        assert_eq!(told.len(), 1, "{told:?}");
    }

    #[test]
    fn what_is_no_parent_begins_a_trace() {
        for said in [
            &b""[..],
            b"00-00000000000000000000000000000000-0000000000000000-01",
            b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            b"00-0af7651916cd43dd8448eb211c80319c",
            b"\xff\xfe",
        ] {
            let told = told_after(&[("traceparent", said)]);
            let value = told["traceparent"].to_str().unwrap();
            assert!(!value.contains(TRACE), "{value}");
        }
    }

    #[test]
    fn a_process_that_sends_no_traces_tells_nothing() {
        let parent = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(told(&[("traceparent", parent)]).is_empty());
    }
}
