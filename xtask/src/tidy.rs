//! Rules of the repository that a machine can check. Each returns its findings as `file: what`.

mod links;
mod lock;
mod pages;
mod ports;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Longest source file, tests not counted.
const LINES_MAX: usize = 500;

/// Row of each crate in the table of ARCHITECTURE.md: a crate may use only crates of lower rows.
const ROWS: [(&str, u8); 17] = [
    ("types", 0),
    ("grammar", 1),
    ("testkit", 1),
    ("runtime", 1),
    ("proto", 1),
    ("compute", 1),
    ("tokenizer", 2),
    ("coordination", 2),
    ("model", 2),
    ("compute-cpu", 2),
    ("compute-cuda", 2),
    ("exchange", 3),
    ("engine", 4),
    ("router", 5),
    ("worker", 5),
    ("cli", 6),
    ("sim", 6),
];

/// Each big dependency has its doors: only these crates may name it (tests may use any).
const DOORS: [(&str, &[&str]); 8] = [
    ("llguidance", &["grammar"]),
    ("toktrie", &["grammar"]),
    ("etcd-client", &["coordination"]),
    ("axum", &["router", "runtime"]),
    ("opentelemetry", &["runtime"]),
    ("candle-core", &["compute", "model"]),
    ("cudarc", &["compute-cuda"]),
    ("anyhow", &["cli", "testkit"]),
];

/// Crates that may contain `unsafe`.
const UNSAFE: [&str; 2] = ["compute-cpu", "compute-cuda"];

/// All findings in the repository at `root`.
pub(crate) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut findings = Vec::new();
    for file in rust_files(root)? {
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let name = file
            .strip_prefix(root)
            .unwrap_or(&file)
            .display()
            .to_string();
        findings.extend(
            source(&name, &text)
                .into_iter()
                .map(|f| format!("{name}: {f}")),
        );
    }
    findings.extend(layers(root)?);
    findings.extend(pages::check(root)?);
    findings.extend(ports::check(root)?);
    findings.extend(links::check(root)?);
    findings.extend(lock::check(root)?);
    Ok(findings)
}

/// The text of a file of the repository.
fn read(root: &Path, name: &str) -> anyhow::Result<String> {
    std::fs::read_to_string(root.join(name)).with_context(|| name.to_owned())
}

fn rust_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![root.join("crates"), root.join("xtask")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Findings in one source file.
fn source(name: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !text.starts_with("//!") {
        findings.push("does not open with `//!`: what it is, what it never does".to_owned());
    }
    let lines = text
        .lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .count();
    if lines > LINES_MAX && !name.contains("/tests/") {
        findings.push(format!(
            "{lines} lines outside tests, expected at most {LINES_MAX}"
        ));
    }
    let marker = concat!("TO", "DO");
    let unnumbered = |line: &&str| line.contains(marker) && !line.contains(concat!("TO", "DO(#"));
    for line in text.lines().filter(unnumbered) {
        findings.push(format!(
            "a {marker} without an issue number: {}",
            line.trim()
        ));
    }
    if text
        .chars()
        .any(|c| c.is_control() && c != '\n' && c != '\t')
    {
        findings.push("contains a control character".to_owned());
    }
    let in_kernels = UNSAFE
        .iter()
        .any(|c| name.starts_with(&format!("crates/{c}/")));
    if !in_kernels && text.contains(concat!("unsafe", " {")) {
        findings.push(format!("unsafe outside {}", UNSAFE.join(", ")));
    }
    findings
}

/// A crate uses only crates of lower rows, and big dependencies only through their doors.
fn layers(root: &Path) -> anyhow::Result<Vec<String>> {
    let rows: BTreeMap<&str, u8> = ROWS.into();
    let mut findings = Vec::new();
    for entry in std::fs::read_dir(root.join("crates"))? {
        let folder = entry?.path();
        let krate = folder
            .file_name()
            .and_then(|n| n.to_str())
            .unwrap_or_default()
            .to_owned();
        let manifest = folder.join("Cargo.toml");
        let text =
            std::fs::read_to_string(&manifest).with_context(|| manifest.display().to_string())?;
        let table: toml::Table = text
            .parse()
            .with_context(|| manifest.display().to_string())?;
        let Some(&row) = rows.get(krate.as_str()) else {
            findings.push(format!(
                "crates/{krate}: has no row in xtask and ARCHITECTURE.md"
            ));
            continue;
        };
        let dependencies = table.get("dependencies").and_then(toml::Value::as_table);
        for dependency in dependencies.into_iter().flat_map(toml::Table::keys) {
            findings.extend(edge(&krate, row, dependency, &rows));
        }
    }
    Ok(findings)
}

fn edge(krate: &str, row: u8, dependency: &str, rows: &BTreeMap<&str, u8>) -> Option<String> {
    if let Some(other) = dependency.strip_prefix("tramontane-") {
        let theirs = *rows.get(other)?;
        let allowed = theirs < row && other != "testkit";
        return (!allowed)
            .then(|| format!("crates/{krate} (row {row}) uses {other} (row {theirs})"));
    }
    let (_, doors) = DOORS.iter().find(|(name, _)| dependency == *name)?;
    (!doors.contains(&krate)).then(|| {
        format!(
            "crates/{krate} uses {dependency}, whose doors are {}",
            doors.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_must_say_what_it_is() {
        assert_eq!(
            source("crates/x/src/a.rs", "//! A.\nfn a() {}\n"),
            Vec::<String>::new()
        );
        assert_eq!(source("crates/x/src/a.rs", "fn a() {}\n").len(), 1);
        let note = format!("//! A.\n// {}: later\n", concat!("TO", "DO"));
        assert_eq!(source("crates/x/src/a.rs", &note).len(), 1);
        let long = format!("//! A.\n{}", "x\n".repeat(LINES_MAX));
        assert_eq!(source("crates/x/src/a.rs", &long).len(), 1);
        assert!(source("crates/x/tests/a.rs", &long).is_empty());
    }

    #[test]
    fn arrows_point_down_and_doors_are_kept() {
        let rows: BTreeMap<&str, u8> = ROWS.into();
        assert_eq!(edge("engine", 4, "tramontane-exchange", &rows), None);
        assert!(edge("exchange", 3, "tramontane-engine", &rows).is_some());
        assert!(edge("router", 5, "tramontane-testkit", &rows).is_some());
        assert!(edge("worker", 5, "etcd-client", &rows).is_some());
        assert_eq!(edge("coordination", 2, "etcd-client", &rows), None);
    }
}
