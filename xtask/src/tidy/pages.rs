//! The reference pages say what the code says: settings, metrics and what the API refuses. Sources are read
//! as text, in the plain form that the code keeps; a source that no longer has that form is a finding.

use std::collections::BTreeSet;
use std::path::Path;

use super::read;

/// The page of settings and the files with their structs.
const SETTINGS_PAGE: &str = "docs/configuration.md";
const SETTINGS_ROOT: &str = "crates/cli/src/settings.rs";
const SETTINGS_SOURCES: [&str; 8] = [
    SETTINGS_ROOT,
    "crates/router/src/auth/config.rs",
    "crates/cli/src/settings/etcd.rs",
    "crates/router/src/config.rs",
    "crates/router/src/tenants/config.rs",
    "crates/worker/src/config.rs",
    "crates/runtime/src/telemetry.rs",
    "crates/runtime/src/tls/mod.rs",
];
/// The page of metrics, and where each process names its own.
const METRICS_PAGE: &str = "docs/metrics.md";
const METRICS_SOURCES: [&str; 2] = [
    "crates/router/src/metrics.rs",
    "crates/worker/src/metrics.rs",
];
/// More of the router's, which are registered under the same prefix.
const TENANT_METRICS: &str = "crates/router/src/metrics/tenants.rs";
/// Every metric's name begins with one of these.
const METRIC_PREFIXES: [&str; 2] = ["tramontane_", "vllm:"];
/// The page of the API, and what it must name: pieces of source between two marks, without their tests.
const API_PAGE: &str = "docs/api.md";
const API_SOURCES: [(&str, &str, &str); 4] = [
    (
        "crates/router/src/openai/options.rs",
        "const REFUSED",
        "\n];",
    ),
    (
        "crates/router/src/routes.rs",
        "Router::new()",
        ".with_state(",
    ),
    ("crates/router/src/error.rs", "fn class(", "fn grpc_code("),
    (
        "crates/router/src/error.rs",
        "fn reason(",
        "/// Why one request",
    ),
];

/// Findings about all reference pages of the repository at `root`.
pub(super) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut settings_sources = Vec::new();
    for source in SETTINGS_SOURCES {
        settings_sources.push(read(root, source)?);
    }
    let settings_root = read(root, SETTINGS_ROOT)?;
    let mut findings = settings(
        &settings_root,
        &settings_sources.concat(),
        &read(root, SETTINGS_PAGE)?,
    );
    let [router, worker] = METRICS_SOURCES;
    let names = [
        router_metrics(&on_one_line(
            &(read(root, router)? + &read(root, TENANT_METRICS)?),
        )),
        worker_metrics(&on_one_line(&read(root, worker)?)),
    ];
    findings.extend(metrics(&names, &read(root, METRICS_PAGE)?));
    let page = read(root, API_PAGE)?;
    for (source, from, to) in API_SOURCES {
        findings.extend(words(source, (from, to), &read(root, source)?, &page));
    }
    Ok(findings)
}

/// Each section of `Settings` has a table with exactly its keys: rows `` | `key` | ... `` below a heading
/// with `` `[section]` ``.
fn settings(root: &str, sources: &str, page: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let sections = fields(root, "Settings");
    if sections.is_empty() {
        findings.push(format!("{SETTINGS_ROOT}: no `struct Settings` was found"));
    }
    for (section, kind) in sections {
        let keys: BTreeSet<String> = fields(sources, &kind)
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        if keys.is_empty() {
            findings.push(format!("{SETTINGS_PAGE}: no `struct {kind}` was found"));
        }
        let written = table_keys(page, &section);
        for key in keys.difference(&written) {
            findings.push(format!(
                "{SETTINGS_PAGE}: no row for `{key}` under `[{section}]`"
            ));
        }
        for key in written.difference(&keys) {
            findings.push(format!(
                "{SETTINGS_PAGE}: `{key}` under `[{section}]` is no setting"
            ));
        }
    }
    findings
}

/// Fields and types of `struct name`, which ends with a brace at the beginning of a line; without those that no file
/// can set.
fn fields(source: &str, name: &str) -> Vec<(String, String)> {
    let Some((_, body)) = source.split_once(&format!("struct {name} {{\n")) else {
        return Vec::new();
    };
    let body = body.split("\n}").next().unwrap_or_default();
    let mut fields = Vec::new();
    let mut is_skipped = false;
    for line in body.lines() {
        let line = line.trim().trim_end_matches(',');
        if line == "#[serde(skip)]" {
            is_skipped = true;
            continue;
        }
        let Some(field) = line
            .strip_prefix("pub(crate) ")
            .or_else(|| line.strip_prefix("pub "))
        else {
            continue;
        };
        if std::mem::take(&mut is_skipped) {
            continue;
        }
        if let Some((key, kind)) = field.split_once(": ") {
            fields.push((key.to_owned(), kind.to_owned()));
        }
    }
    fields
}

/// First cells of the table rows below the heading of a section, up to the next heading.
fn table_keys(page: &str, section: &str) -> BTreeSet<String> {
    let heading = format!("`[{section}]`");
    let mut inside = false;
    let mut keys = BTreeSet::new();
    for line in page.lines() {
        if line.starts_with('#') {
            inside = line.contains(&heading);
        }
        let row = line
            .strip_prefix("| `")
            .and_then(|row| row.split_once("` |"));
        if let Some((key, _)) = row.filter(|_| inside) {
            keys.insert(key.to_owned());
        }
    }
    keys
}

/// A source whose calls have their first argument right behind the parenthesis, however they were wrapped.
fn on_one_line(source: &str) -> String {
    let words: Vec<&str> = source.split_whitespace().collect();
    words.join(" ").replace("( ", "(")
}

/// Names that the router registers, as they are scraped, without `_total`.
fn router_metrics(source: &str) -> BTreeSet<String> {
    let prefix = source.split_once("sub_registry_with_prefix(\"");
    let prefix = prefix.and_then(|(_, rest)| rest.split('"').next());
    let own = after_each(source, "own.register(\"").map(|name| match prefix {
        Some(prefix) => format!("{prefix}_{name}"),
        None => name.to_owned(),
    });
    let whole = after_each(source, "self.registry.register(\"").map(str::to_owned);
    let vllm = after_each(source, "\"vllm:").map(|name| format!("vllm:{name}"));
    own.chain(whole).chain(vllm).collect()
}

/// Names that a worker registers, likewise.
fn worker_metrics(source: &str) -> BTreeSet<String> {
    let whole = after_each(source, "register(\"").map(str::to_owned);
    let written = ["out.gauge(\"", "out.counter(\"", "out.seconds(\""];
    let written = written
        .iter()
        .flat_map(|call| after_each(source, call))
        .map(|name| format!("tramontane_{name}"));
    whole.chain(written).collect()
}

/// What stands between each `mark`, which ends with a quote or inside quotes, and the next quote.
fn after_each<'a>(source: &'a str, mark: &'a str) -> impl Iterator<Item = &'a str> {
    source
        .split(mark)
        .skip(1)
        .filter_map(|rest| rest.split('"').next())
}

/// Every metric is on the page in backticks, and every metric on the page exists.
fn metrics(names: &[BTreeSet<String>; 2], page: &str) -> Vec<String> {
    let mut findings = Vec::new();
    for (names, source) in names.iter().zip(METRICS_SOURCES) {
        if names.is_empty() {
            findings.push(format!("{source}: no metric was found"));
        }
        for name in names {
            let written = [format!("`{name}`"), format!("`{name}_total`")];
            if !written.iter().any(|name| page.contains(name)) {
                findings.push(format!(
                    "{METRICS_PAGE}: no `{name}`, which {source} registers"
                ));
            }
        }
    }
    // Every second piece stands between backticks.
    for word in page.split('`').skip(1).step_by(2) {
        let is_metric = METRIC_PREFIXES
            .iter()
            .any(|prefix| word.starts_with(prefix) && word != *prefix);
        let name = word.strip_suffix("_total").unwrap_or(word);
        if is_metric
            && !names
                .iter()
                .any(|names| names.contains(name) || names.contains(word))
        {
            findings.push(format!("{METRICS_PAGE}: `{word}` is no metric"));
        }
    }
    findings
}

/// Every string between two marks of a source stands on the page of the API in backticks.
fn words(name: &str, (from, to): (&str, &str), source: &str, page: &str) -> Vec<String> {
    let piece = source.split_once(from).map_or("", |(_, rest)| rest);
    let piece = piece.split_once(to).map_or("", |(piece, _)| piece);
    let mut findings = Vec::new();
    let strings: Vec<&str> = piece.split('"').skip(1).step_by(2).collect();
    if strings.is_empty() {
        findings.push(format!("{name}: no strings between `{from}` and `{to}`"));
    }
    for word in strings {
        // `/v1/models/{*id}` of the router is `/v1/models/{id}` to a reader.
        let word = word.replace("{*", "{");
        let written = [format!("`{word}`"), format!(" {word}`")];
        if !written.iter().any(|word| page.contains(word)) {
            findings.push(format!("{API_PAGE}: no `{word}`, which is in {name}"));
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: &str = "pub(crate) struct Settings {\n    /// One.\n    pub(crate) a: A,\n    pub(crate) b: B,\n}\n";
    const SECTIONS: &str = "pub struct A {\n    pub id: String,\n    #[serde(with = \"x\")]\n    pub wait: Duration,\n}\n\
                            struct B {\n    pub(crate) id: Option<u64>,\n}\n";

    #[test]
    fn a_setting_without_a_row_and_a_row_without_a_setting_are_found() {
        let page = "## `[a]`\n| `id` | x |\n| `wait` | x |\n## `[b]`\n| `id` | x |\n";
        assert_eq!(settings(SETTINGS, SECTIONS, page), Vec::<String>::new());
        let page = "## `[a]`\n| `id` | x |\n## `[b]`\nsee `id`\n| `wait` | x |\n";
        assert_eq!(
            settings(SETTINGS, SECTIONS, page),
            [
                "docs/configuration.md: no row for `wait` under `[a]`",
                "docs/configuration.md: no row for `id` under `[b]`",
                "docs/configuration.md: `wait` under `[b]` is no setting",
            ]
        );
        let renamed = settings(SETTINGS, "", page);
        assert!(renamed.contains(&"docs/configuration.md: no `struct A` was found".to_owned()));
        assert_eq!(settings("", SECTIONS, page).len(), 1);
    }

    #[test]
    fn a_metric_that_the_page_lacks_or_invents_is_found() {
        let router = "sub_registry_with_prefix(\"tramontane_router\");\nown.register(\n    \"moves\",\n    \"x\", y);\n\
                      [(\"vllm:tokens\", \"x\")]";
        let worker = "registry.register(\"tramontane_rows\", \"x\");\nout.seconds(\"wait_seconds\", \"x\", 1)?;";
        let names = [router_metrics(&on_one_line(router)), worker_metrics(worker)];
        let page = "`tramontane_router_moves_total` `vllm:tokens` `tramontane_rows` `tramontane_wait_seconds_total`";
        assert_eq!(metrics(&names, page), Vec::<String>::new());
        let page =
            "`tramontane_router_moves_total` `vllm:tokens` `tramontane_rows` `tramontane_gone`";
        assert_eq!(
            metrics(&names, page),
            [
                "docs/metrics.md: no `tramontane_wait_seconds`, which crates/worker/src/metrics.rs registers",
                "docs/metrics.md: `tramontane_gone` is no metric",
            ]
        );
        assert_eq!(
            metrics(&[BTreeSet::new(), worker_metrics(worker)], "").len(),
            3
        );
    }

    #[test]
    fn a_refused_field_that_the_page_does_not_name_is_found() {
        let source =
            "const REFUSED: X = [\n    (\"tools\", a),\n    (\"/v1/{*id}\", a),\n];\n\"other\"";
        let marks = ("const REFUSED", "\n];");
        assert_eq!(
            words("o.rs", marks, source, "`tools`, `GET /v1/{id}`"),
            Vec::<String>::new()
        );
        assert_eq!(
            words("o.rs", marks, source, "tools, `/v1/{id}`"),
            ["docs/api.md: no `tools`, which is in o.rs"]
        );
        assert_eq!(words("o.rs", marks, "", "`tools`").len(), 1);
    }
}
