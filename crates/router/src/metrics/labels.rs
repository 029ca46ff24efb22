//! The labels of metrics. Never text of a client.

use prometheus_client::encoding::EncodeLabelSet;
use tramontane_coordination::Version;

/// Why a worker could not go on with a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum LossReason {
    /// It has no room.
    Busy,
    /// The connection or the stream broke.
    Broken,
    /// It said nothing for too long.
    Silent,
    /// It ended the sequence by itself.
    Aborted,
    /// It said something that makes no sense.
    Confused,
    /// It does not take a sequence that another worker took.
    Refused,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RequestLabels {
    pub(super) route: &'static str,
    pub(super) code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct RefusalLabels {
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct LossLabels {
    pub(super) reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct OutcomeLabels {
    pub(super) finished_reason: &'static str,
}

/// The version that takes new requests, one series: an operator's choice, never a client's.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct WeightsLabels {
    version: String,
    numeric_class: String,
}

impl WeightsLabels {
    pub(super) fn of(version: &Version) -> Self {
        Self {
            version: plain(&version.model),
            numeric_class: plain(&version.numeric_class),
        }
    }
}

/// Text from the store: whatever it says, the page stays readable.
fn plain(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    text.chars()
        .map(|c| if is_plain(c) { c } else { '_' })
        .collect()
}

/// A door that requests come through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Route {
    ChatCompletions,
    Completions,
    Responses,
    Tokenize,
    Detokenize,
    GrpcGenerate,
    GrpcGenerateOnce,
    GrpcTokenize,
    GrpcDetokenize,
    GrpcModelInfer,
}

impl Route {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::ChatCompletions => "chat_completions",
            Self::Completions => "completions",
            Self::Responses => "responses",
            Self::Tokenize => "tokenize",
            Self::Detokenize => "detokenize",
            Self::GrpcGenerate => "grpc_generate",
            Self::GrpcGenerateOnce => "grpc_generate_once",
            Self::GrpcTokenize => "grpc_tokenize",
            Self::GrpcDetokenize => "grpc_detokenize",
            Self::GrpcModelInfer => "grpc_model_infer",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_version_cannot_break_the_page() {
        let version = Version {
            model: "f\"} 1\nfake 2\n{\\".into(),
            numeric_class: "cpu-q8".into(),
        };
        let labels = WeightsLabels::of(&version);
        assert_eq!(labels.version, "f___1_fake_2___");
        assert_eq!(labels.numeric_class, "cpu-q8");
    }
}
