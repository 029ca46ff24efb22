//! `tramontane config check`: every setting, and which layer set it.

use serde_json::{Map, Value, json};
use tramontane_runtime::config::Source;

use crate::args::ConfigCommand;
use crate::output;
use crate::settings::{self, Flags, misuse};

/// Prints the effective configuration.
pub(crate) fn run(command: ConfigCommand) -> anyhow::Result<()> {
    let ConfigCommand::Check { config, output } = command;
    let loaded = settings::load(config.as_deref(), Flags::default())?;
    let mut worker = loaded.value.worker.clone();
    if worker.id.is_empty() {
        // Its default is the host's name, which only a starting worker looks up.
        worker.id = "host-name".to_owned();
    }
    worker
        .validate()
        .map_err(|e| misuse(format!("worker.{e}")))?;
    loaded.value.etcd.validate()?;
    loaded.value.listen.validate()?;
    loaded.value.telemetry.validate().map_err(misuse)?;
    loaded.value.router().validate().map_err(misuse)?;
    let tree = serde_json::to_value(&loaded.value)?;
    let mut values = Map::new();
    flatten(&tree, "", &mut values);
    let source = |key: &str| match loaded.sources.get(key) {
        None | Some(Source::Default) => "default".to_owned(),
        Some(Source::File(path)) => path.clone(),
        Some(Source::Environment(name)) => name.clone(),
        Some(Source::Flag) => "flag".to_owned(),
    };
    if output.is_data() {
        let rows: Map<String, Value> = values
            .into_iter()
            .map(|(key, value)| {
                let row = json!({ "value": value, "source": source(&key) });
                (key, row)
            })
            .collect();
        return output::data(output, &rows);
    }
    let rows: Vec<Vec<String>> = values
        .iter()
        .map(|(key, value)| vec![key.clone(), shown(value), source(key)])
        .collect();
    Ok(output::table(&["KEY", "VALUE", "SOURCE"], &rows)?)
}

fn shown(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

fn flatten(value: &Value, prefix: &str, into: &mut Map<String, Value>) {
    let Value::Object(object) = value else {
        into.insert(prefix.to_owned(), value.clone());
        return;
    };
    for (key, value) in object {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        flatten(value, &path, into);
    }
}
