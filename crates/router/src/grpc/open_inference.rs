//! The Open Inference Protocol over gRPC: prompts in tensors become the same request as a completion over HTTP,
//! with the same names and limits of its options.

mod tensors;

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use tonic::{Request, Response, Status};
use tramontane_proto::inference::grpc_inference_service_server::GrpcInferenceService;
use tramontane_proto::inference::infer_parameter::ParameterChoice;
use tramontane_proto::inference::model_infer_response::InferOutputTensor;
use tramontane_proto::inference::model_metadata_response::TensorMetadata;
use tramontane_proto::inference::{self as oip, InferParameter};
use tramontane_runtime::build_info;
use tramontane_types::FinishReason;

use self::tensors::{BYTES, Inputs};
use super::deadline::Deadline;
use super::messages::with_room;
use super::status::{counted, status};
use super::{arrived, start};
use crate::answer::{Answer, Choice};
use crate::error::{ApiError, ErrorKind};
use crate::json_marks::{FIELD_MARKS_MAX, JsonMarks};
use crate::metrics::Route;
use crate::openai::{fingerprint, parse_completion};
use crate::request::prepare;
use crate::run::App;

/// The prompts.
const TEXT_INPUT: &str = "text_input";
/// Options as one JSON object.
const SAMPLING_PARAMETERS: &str = "sampling_parameters";
/// The continuations, one per prompt and answer.
const TEXT_OUTPUT: &str = "text_output";
/// Why each of them ended.
const FINISH_REASON: &str = "finish_reason";
/// Fields of a completion that a message has another place for, or whose effect its answer has no place for.
const NO_PARAMETERS: [&str; 7] = [
    "prompt",
    "model",
    "stream",
    "stream_options",
    "logprobs",
    "prompt_logprobs",
    "include_metrics",
];
/// Longest name of a parameter: errors repeat it.
const NAME_BYTES_MAX: usize = 64;
/// Longest id of a request: it is sent back.
const ID_BYTES_MAX: usize = 256;

/// The service over what all doors share.
#[derive(Debug)]
pub(crate) struct OpenInferenceService {
    app: Arc<App>,
}

impl OpenInferenceService {
    pub(crate) const fn new(app: Arc<App>) -> Self {
        Self { app }
    }

    /// The version that serves, in words.
    fn serving(&self) -> Option<String> {
        self.app
            .cluster
            .serving()
            .map(|version| fingerprint(&version))
    }

    fn check(&self, name: &str, version: &str) -> Result<(), ApiError> {
        self.app.model.check(Some(name))?;
        let serving = self.serving();
        if version.is_empty() || serving.as_deref() == Some(version) {
            return Ok(());
        }
        let serving = serving.as_deref().unwrap_or("none yet");
        let message = format!("the version that serves is {serving}, not the one asked for");
        Err(ApiError::new(ErrorKind::ModelNotFound, message).at("model_version"))
    }

    async fn infer(
        &self,
        request: Request<oip::ModelInferRequest>,
    ) -> Result<Response<oip::ModelInferResponse>, ApiError> {
        let arrived = arrived(&self.app, &request)?;
        let request = request.into_inner();
        self.check(&request.model_name, &request.model_version)?;
        if request.id.len() > ID_BYTES_MAX {
            let got = request.id.len();
            let message = format!("id must be at most {ID_BYTES_MAX} bytes, got {got}");
            return Err(ApiError::invalid("id", message));
        }
        let outputs = wanted_outputs(&request)?;
        let (name, id) = (request.model_name.clone(), request.id.clone());
        let is_raw = !request.raw_input_contents.is_empty();
        let (model, tokenizer) = (Arc::clone(&self.app.model), Arc::clone(&self.app.tokenizer));
        let read = move |answer| {
            let body = completion(request)?;
            let parsed = parse_completion(&body, &model).map_err(in_tensors)?;
            prepare(parsed.request, answer, &tokenizer, &model).map_err(in_tensors)
        };
        let mut answer = start(&self.app, arrived, read, in_tensors).await?;
        let choices = answer.collect().await?;
        let mut response = response(&choices, &answer, &outputs, is_raw);
        (response.model_name, response.id) = (name, id);
        with_room(&self.app, response).await
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for OpenInferenceService {
    async fn server_live(
        &self,
        _request: Request<oip::ServerLiveRequest>,
    ) -> Result<Response<oip::ServerLiveResponse>, Status> {
        Ok(Response::new(oip::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _request: Request<oip::ServerReadyRequest>,
    ) -> Result<Response<oip::ServerReadyResponse>, Status> {
        let ready = self.app.ready.check().is_ok();
        Ok(Response::new(oip::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<oip::ModelReadyRequest>,
    ) -> Result<Response<oip::ModelReadyResponse>, Status> {
        let request = request.into_inner();
        self.check(&request.name, &request.version)
            .map_err(|error| status(&error))?;
        let ready = self.app.ready.check().is_ok();
        Ok(Response::new(oip::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<oip::ServerMetadataRequest>,
    ) -> Result<Response<oip::ServerMetadataResponse>, Status> {
        Ok(Response::new(oip::ServerMetadataResponse {
            name: "tramontane".to_owned(),
            version: build_info::VERSION.to_owned(),
            extensions: Vec::new(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<oip::ModelMetadataRequest>,
    ) -> Result<Response<oip::ModelMetadataResponse>, Status> {
        let request = request.into_inner();
        self.check(&request.name, &request.version)
            .map_err(|error| status(&error))?;
        let tensor = |name: &str, shape: i64| TensorMetadata {
            name: name.to_owned(),
            datatype: BYTES.to_owned(),
            shape: vec![shape],
        };
        Ok(Response::new(oip::ModelMetadataResponse {
            name: request.name,
            versions: self.serving().into_iter().collect(),
            platform: "tramontane".to_owned(),
            inputs: vec![tensor(TEXT_INPUT, -1), tensor(SAMPLING_PARAMETERS, 1)],
            outputs: vec![tensor(TEXT_OUTPUT, -1), tensor(FINISH_REASON, -1)],
        }))
    }

    async fn model_infer(
        &self,
        request: Request<oip::ModelInferRequest>,
    ) -> Result<Response<oip::ModelInferResponse>, Status> {
        let result = match Deadline::of(request.metadata()) {
            Ok(deadline) => deadline.meet(self.infer(request)).await,
            Err(error) => Err(error),
        };
        counted(&self.app.metrics, Route::GrpcModelInfer, result)
    }
}

/// The outputs to send, all that there are when none is named.
fn wanted_outputs(request: &oip::ModelInferRequest) -> Result<Vec<&'static str>, ApiError> {
    let known = [TEXT_OUTPUT, FINISH_REASON];
    if request.outputs.is_empty() {
        return Ok(known.to_vec());
    }
    let mut wanted = Vec::new();
    for (i, output) in request.outputs.iter().enumerate() {
        let found = known.iter().find(|name| **name == output.name);
        let Some(name) = found.filter(|name| !wanted.contains(*name)) else {
            let path = format!("outputs[{i}].name");
            let message = format!("{path} must be {TEXT_OUTPUT} or {FINISH_REASON}, each once");
            return Err(ApiError::invalid(&path, message));
        };
        wanted.push(*name);
    }
    Ok(wanted)
}

/// The body of the same request over HTTP.
pub(crate) fn completion(request: oip::ModelInferRequest) -> Result<Value, ApiError> {
    let mut inputs = Inputs::of(request.inputs, request.raw_input_contents)?;
    let prompts = inputs.take_text(TEXT_INPUT)?.ok_or_else(|| {
        let message = format!("inputs must have a tensor named {TEXT_INPUT} of data type {BYTES}");
        ApiError::invalid("inputs", message)
    })?;
    let mut body = Map::new();
    if let Some(texts) = inputs.take_text(SAMPLING_PARAMETERS)? {
        body = options_of(&texts)?;
    }
    inputs.refuse_rest(&[TEXT_INPUT, SAMPLING_PARAMETERS])?;
    for (name, parameter) in request.parameters {
        if name.len() > NAME_BYTES_MAX {
            let got = name.len();
            let message =
                format!("names of parameters must be at most {NAME_BYTES_MAX} bytes, got {got}");
            return Err(ApiError::invalid("parameters", message));
        }
        let path = format!("parameters.{name}");
        let value = parameter_value(parameter, &path)?;
        if body.insert(name, value).is_some() {
            let message = format!("{path} is also in the tensor {SAMPLING_PARAMETERS}");
            return Err(ApiError::invalid(&path, message));
        }
    }
    for name in NO_PARAMETERS {
        if body.contains_key(name) {
            let message = format!("{name} is no parameter of ModelInfer");
            return Err(ApiError::invalid(&format!("parameters.{name}"), message));
        }
    }
    body.insert("prompt".to_owned(), prompts.into());
    Ok(Value::Object(body))
}

fn options_of(texts: &[String]) -> Result<Map<String, Value>, ApiError> {
    let parsed = match texts {
        [text] => {
            let mut marks = JsonMarks::at_most(FIELD_MARKS_MAX);
            marks.count_text(text, SAMPLING_PARAMETERS)?;
            serde_json::from_str(text).ok()
        }
        _ => None,
    };
    parsed.ok_or_else(|| {
        let path = format!("inputs.{SAMPLING_PARAMETERS}");
        ApiError::invalid(&path, format!("{path} must hold one JSON object"))
    })
}

fn parameter_value(parameter: InferParameter, path: &str) -> Result<Value, ApiError> {
    let value = match parameter.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => json!(value),
        Some(ParameterChoice::Int64Param(value)) => json!(value),
        Some(ParameterChoice::Uint64Param(value)) => json!(value),
        Some(ParameterChoice::StringParam(value)) => json!(value),
        // JSON has no other numbers.
        Some(ParameterChoice::DoubleParam(value)) if value.is_finite() => json!(value),
        Some(ParameterChoice::DoubleParam(value)) => {
            let message = format!("{path} must be a finite number, got {value}");
            return Err(ApiError::invalid(path, message));
        }
        None => {
            let message = format!("{path} must have a value, got none");
            return Err(ApiError::invalid(path, message));
        }
    };
    Ok(value)
}

/// The path of a field as it is in the message instead of in an HTTP body.
fn in_tensors(mut error: ApiError) -> ApiError {
    error.param = error.param.map(|param| match param.strip_prefix("prompt") {
        Some(rest) if rest.is_empty() || rest.starts_with('[') => {
            format!("inputs.{TEXT_INPUT}{rest}")
        }
        _ => format!("parameters.{param}"),
    });
    error
}

fn response(
    choices: &[Choice],
    answer: &Answer,
    wanted: &[&str],
    is_raw: bool,
) -> oip::ModelInferResponse {
    let mut response = oip::ModelInferResponse {
        model_version: fingerprint(answer.version()),
        parameters: counts(answer),
        ..oip::ModelInferResponse::default()
    };
    for name in wanted {
        let mut texts = Vec::with_capacity(choices.len());
        for choice in choices {
            texts.push(match *name {
                TEXT_OUTPUT => choice.text.clone().into_bytes(),
                _ => finish(choice.finish).into(),
            });
        }
        let mut output = InferOutputTensor {
            name: (*name).to_owned(),
            datatype: BYTES.to_owned(),
            shape: vec![i64::try_from(texts.len()).unwrap_or(i64::MAX)],
            ..InferOutputTensor::default()
        };
        if is_raw {
            response.raw_output_contents.push(tensors::raw(&texts));
        } else {
            output.contents = Some(oip::InferTensorContents {
                bytes_contents: texts,
                ..oip::InferTensorContents::default()
            });
        }
        response.outputs.push(output);
    }
    response
}

fn counts(answer: &Answer) -> HashMap<String, InferParameter> {
    let usage = answer.usage();
    let count = |name: &str, count: u32| {
        let value = ParameterChoice::Int64Param(count.into());
        let parameter = InferParameter {
            parameter_choice: Some(value),
        };
        (name.to_owned(), parameter)
    };
    HashMap::from([
        count("prompt_tokens", usage.prompt_tokens),
        count("completion_tokens", usage.completion_tokens),
    ])
}

const fn finish(reason: Option<FinishReason>) -> &'static str {
    match reason {
        Some(FinishReason::Stop) => "stop",
        _ => "length",
    }
}

#[cfg(test)]
mod tests {
    use tramontane_proto::inference::model_infer_request::InferInputTensor;

    use super::*;

    fn text(name: &str, texts: &[&str]) -> InferInputTensor {
        InferInputTensor {
            name: name.to_owned(),
            datatype: BYTES.to_owned(),
            shape: vec![texts.len() as i64],
            contents: Some(oip::InferTensorContents {
                bytes_contents: texts.iter().map(|t| t.as_bytes().to_vec()).collect(),
                ..oip::InferTensorContents::default()
            }),
            ..InferInputTensor::default()
        }
    }

    fn request(
        inputs: Vec<InferInputTensor>,
        parameters: Vec<(&str, ParameterChoice)>,
    ) -> oip::ModelInferRequest {
        let parameter = |(name, value): (&str, ParameterChoice)| {
            let parameter_choice = Some(value);
            (name.to_owned(), InferParameter { parameter_choice })
        };
        oip::ModelInferRequest {
            inputs,
            parameters: parameters.into_iter().map(parameter).collect(),
            ..oip::ModelInferRequest::default()
        }
    }

    #[test]
    fn tensors_and_parameters_are_one_completion() {
        let inputs = vec![
            text(TEXT_INPUT, &["a", "b"]),
            text(SAMPLING_PARAMETERS, &[r#"{"top_k": 3}"#]),
        ];
        let parameters = vec![
            ("max_tokens", ParameterChoice::Int64Param(5)),
            ("temperature", ParameterChoice::DoubleParam(0.5)),
            ("stop", ParameterChoice::StringParam("x".to_owned())),
        ];
        let body = completion(request(inputs, parameters)).unwrap();
        let expected = json!({
            "top_k": 3, "max_tokens": 5, "temperature": 0.5, "stop": "x", "prompt": ["a", "b"]
        });
        assert_eq!(body, expected);
    }

    #[test]
    fn what_is_no_completion_is_refused_by_name() {
        let prompt = || text(TEXT_INPUT, &["a"]);
        let flag = |name| vec![(name, ParameterChoice::BoolParam(true))];
        let cases = [
            (request(vec![], vec![]), "inputs"),
            (request(vec![prompt(), text("x", &["a"])], vec![]), "inputs"),
            (request(vec![prompt(), prompt()], vec![]), "inputs"),
            (
                request(vec![prompt(), text(SAMPLING_PARAMETERS, &["[]"])], vec![]),
                "inputs.sampling_parameters",
            ),
            (
                request(
                    vec![prompt(), text(SAMPLING_PARAMETERS, &[r#"{"echo": true}"#])],
                    flag("echo"),
                ),
                "parameters.echo",
            ),
            (request(vec![prompt()], flag("stream")), "parameters.stream"),
            (request(vec![prompt()], flag("prompt")), "parameters.prompt"),
            (
                request(vec![prompt()], flag("prompt_logprobs")),
                "parameters.prompt_logprobs",
            ),
            (
                request(
                    vec![prompt()],
                    vec![("top_p", ParameterChoice::DoubleParam(f64::NAN))],
                ),
                "parameters.top_p",
            ),
        ];
        for (request, param) in cases {
            let error = completion(request).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{error}");
        }
        let error = in_tensors(ApiError::invalid("prompt[1]", "too long"));
        assert_eq!(error.param.as_deref(), Some("inputs.text_input[1]"));
        let error = in_tensors(ApiError::invalid("top_p", "too large"));
        assert_eq!(error.param.as_deref(), Some("parameters.top_p"));
    }
}
