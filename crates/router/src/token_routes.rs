//! The small HTTP routes: ids of texts and back, whether requests can be served, how many run, and what there is.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::{Value, json};

use tramontane_types::TokenId;

use crate::answer_room::json_response;
use crate::body::{read_body, throw_away};
use crate::error::ApiError;
use crate::metrics::Route;
use crate::openai::{self, error_response};
use crate::routes::check_media_type;
use crate::run::App;
use crate::tenants::Caller;

/// All routes with their limits.
const OPENAPI: &str = include_str!("openapi.json");

pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let model = Arc::clone(&app.model);
    let tokenizer = Arc::clone(&app.tokenizer);
    let work = move |body: &Value| {
        let asked = openai::parse_tokenize(body, &model)?;
        asked.answer(&tokenizer, &model)
    };
    answer(&app, &caller, (Route::Tokenize, request), work).await
}

pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Response {
    let model = Arc::clone(&app.model);
    let tokenizer = Arc::clone(&app.tokenizer);
    let work = move |body: &Value| {
        let asked = openai::parse_detokenize(body, &model)?;
        asked.answer(&tokenizer)
    };
    answer(&app, &caller, (Route::Detokenize, request), work).await
}

/// Reads the body and has `work` done where it holds up nobody. Its answer takes the place of the body in memory.
async fn answer(
    app: &Arc<App>,
    caller: &Caller,
    (route, request): (Route, Request),
    work: impl FnOnce(&Value) -> Result<Vec<u8>, ApiError> + Send + 'static,
) -> Response {
    let answered = async {
        check_media_type(request.headers())?;
        if let Err(error) = app.dispatcher.knock(caller) {
            throw_away(app, request.into_body());
            return Err(error);
        }
        let (body, room) = read_body(app, request).await?;
        let arrival = app.dispatcher.arrive(caller)?;
        let work = move || {
            // Until the body has become an answer.
            let _arrival = arrival;
            let answer = work(&openai::parse_json(&body)?)?;
            Ok((answer, room))
        };
        // Until the answer has room of its own.
        let (answer, _room) = app.dispatcher.prepare(&caller.tenant, work).await?;
        app.answer_room.hold(answer).await
    };
    let response = match answered.await {
        Ok(answer) => json_response(answer),
        Err(error) => error_response(&error),
    };
    app.metrics.answered(route, response.status());
    response
}

/// The texts of the tokens with a role, for clients that count on a tokenizer's own file.
pub(crate) async fn tokenizer_info(State(app): State<Arc<App>>) -> Json<Value> {
    let tokenizer = &app.tokenizer;
    let text = |id: TokenId| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        String::from_utf8_lossy(bytes).into_owned()
    };
    let eos = tokenizer.eos_ids().first().copied();
    Json(json!({
        "bos_token": tokenizer.bos_id().map(text),
        "eos_token": eos.map(text),
    }))
}

/// As `/health/ready`, for those who look at the status alone.
pub(crate) async fn health(State(app): State<Arc<App>>) -> StatusCode {
    match app.ready.check() {
        Ok(()) => StatusCode::OK,
        Err(_) => StatusCode::SERVICE_UNAVAILABLE,
    }
}

/// Requests that run or wait here.
pub(crate) async fn load(State(app): State<Arc<App>>) -> Json<Value> {
    let admission = &app.dispatcher.admission;
    Json(json!({ "server_load": admission.running() + admission.waiting() }))
}

pub(crate) async fn openapi() -> Response {
    let mut response = OPENAPI.into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_document_has_every_route_and_no_other() {
        let source: String = include_str!("routes.rs").split_whitespace().collect();
        let (routes, _others) = source.split_once(".fallback(").unwrap();
        let mut served = BTreeSet::new();
        for route in routes.split(".route(\"").skip(1) {
            let (path, handlers) = route.split_once('"').unwrap();
            for method in ["get", "post"] {
                if handlers.contains(&format!("{method}(")) {
                    served.insert(format!("{method} {}", path.replace("{*", "{")));
                }
            }
        }
        assert!(served.contains("post /v1/responses") && served.contains("post /ping"));
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut documented = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            let methods = item
                .as_object()
                .unwrap()
                .keys()
                .filter(|k| *k != "parameters");
            documented.extend(methods.map(|method| format!("{method} {path}")));
        }
        assert_eq!(served, documented);
    }

    #[test]
    fn the_document_has_the_limits_of_the_code() {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let schemas = &document["components"]["schemas"];
        let chat = &schemas["ChatRequest"]["properties"];
        assert_eq!(chat["messages"]["maxItems"], openai::MESSAGES_MAX);
        assert_eq!(chat["tools"]["maxItems"], crate::tools::TOOLS_MAX);
        assert_eq!(chat["n"]["maximum"], crate::request::N_MAX);
        assert_eq!(chat["bad_words"]["maxItems"], crate::request::WORDS_MAX);
        let word = &chat["bad_words"]["items"];
        assert_eq!(word["maxLength"], crate::text_limits::WORD_BYTES_MAX);
        let sampling = tramontane_types::sampling::TEMPERATURE_MAX;
        assert_eq!(chat["temperature"]["maximum"], f64::from(sampling));
        let completion = &schemas["CompletionRequest"]["properties"];
        assert_eq!(
            completion["best_of"]["maximum"],
            crate::request::BEST_OF_MAX
        );
    }
}
