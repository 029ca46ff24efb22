//! `GET /v1/models`: the one model that is served, and its other names.

use serde_json::{Value, json};
use tramontane_coordination::Version;

use super::fingerprint;
use crate::run::ServedModel;

/// The list of models.
pub(crate) fn models(served: &ServedModel, serving: Option<&Version>, created: u64) -> Value {
    let ids = std::iter::once(&served.id).chain(&served.aliases);
    let data: Vec<Value> = ids
        .map(|id| model((served, serving), id, created))
        .collect();
    json!({ "object": "list", "data": data })
}

/// One model under one of its names, with the weights that new requests begin with.
pub(crate) fn model(
    (served, serving): (&ServedModel, Option<&Version>),
    id: &str,
    created: u64,
) -> Value {
    json!({
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "tramontane",
        "root": served.id,
        "max_model_len": served.context_length,
        "system_fingerprint": serving.map(fingerprint),
    })
}
