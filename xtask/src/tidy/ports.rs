//! What is deployed names the ports that the code has. Nothing here understands YAML: a port is a number in
//! a place where ports stand.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context as _;

use super::read;

/// Where the ports have their names.
const SOURCE: &str = "crates/cli/src/settings.rs";
/// Their names.
const NAMES: [&str; 5] = [
    "HTTP_PORT",
    "ROUTER_GRPC_PORT",
    "ADMIN_PORT",
    "WORKER_GRPC_PORT",
    "WORKER_OPS_PORT",
];
/// Files and folders that name ports, and which of [`NAMES`] each must name.
const PLACES: [(&str, &[&str]); 5] = [
    ("deploy/Dockerfile", &NAMES),
    (
        "deploy/compose.yaml",
        &["HTTP_PORT", "ROUTER_GRPC_PORT", "WORKER_GRPC_PORT"],
    ),
    ("helm/tramontane/templates", &NAMES),
    ("crates/cli/src/args.rs", &["HTTP_PORT", "ADMIN_PORT"]),
    ("crates/cli/src/drill/mod.rs", &["ROUTER_GRPC_PORT"]),
];
/// etcd's own ports: clients, peers, health.
const ETCD_PORTS: [u16; 3] = [2379, 2380, 2381];
/// Ports below it are the system's; shorter numbers are other things.
const PORT_MIN: u16 = 1024;

/// Findings about all places in the repository at `root`.
pub(super) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let source = read(root, SOURCE)?;
    let ports = named(&source);
    let mut findings = Vec::new();
    for name in NAMES.iter().filter(|name| !ports.contains_key(**name)) {
        findings.push(format!("{SOURCE}: no `const {name}: u16` was found"));
    }
    for (place, wanted) in PLACES {
        let text = read_place(root, place)?;
        findings.extend(differences(place, &text, wanted, &ports));
    }
    Ok(findings)
}

/// A file, or all files of a folder one after the other.
fn read_place(root: &Path, place: &str) -> anyhow::Result<String> {
    let path = root.join(place);
    if path.is_file() {
        return read(root, place);
    }
    let mut text = String::new();
    for entry in std::fs::read_dir(&path).with_context(|| path.display().to_string())? {
        let file = entry?.path();
        text += &std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        text.push('\n');
    }
    Ok(text)
}

/// The ports by name: lines such as `pub(crate) const HTTP_PORT: u16 = 8000;`.
fn named(source: &str) -> BTreeMap<&str, u16> {
    let mut ports = BTreeMap::new();
    for line in source.lines() {
        let Some((left, value)) = line.split_once(": u16 = ") else {
            continue;
        };
        let name = left.rsplit(' ').next().unwrap_or_default();
        if let Ok(port) = value.trim_end_matches(';').replace('_', "").parse() {
            ports.insert(name, port);
        }
    }
    ports
}

fn differences(
    place: &str,
    text: &str,
    wanted: &[&str],
    ports: &BTreeMap<&str, u16>,
) -> Vec<String> {
    let written: Vec<u16> = text.lines().flat_map(ports_of).collect();
    let mut findings = Vec::new();
    for port in &written {
        if !ETCD_PORTS.contains(port) && !ports.values().any(|known| known == port) {
            findings.push(format!("{place}: port {port} is none of {SOURCE}"));
        }
    }
    for (name, port) in ports.iter().filter(|(name, _)| wanted.contains(name)) {
        if !written.contains(port) {
            findings.push(format!("{place}: port {port} ({name}) is not named"));
        }
    }
    findings
}

/// The ports in one line: after `EXPOSE`, after `port:`, `containerPort:` and the like, after the colon of
/// an address, and before the colon of a mapping.
fn ports_of(line: &str) -> Vec<u16> {
    let mut ports = Vec::new();
    // User and group ids look like mappings.
    if line.starts_with("USER ") {
        return ports;
    }
    let mut rest = line;
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let (before, number) = rest.split_at(start);
        let end = number
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(number.len());
        let (digits, after) = number.split_at(end);
        let is_port = line.starts_with("EXPOSE ")
            || before.ends_with("ort: ")
            || before.ends_with(':')
            || after
                .strip_prefix(':')
                .is_some_and(|target| target.starts_with(|c: char| c.is_ascii_digit()));
        match digits.parse() {
            Ok(port) if is_port && port >= PORT_MIN => ports.push(port),
            _ => {}
        }
        rest = after;
    }
    ports
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_found_where_ports_stand_and_nowhere_else() {
        assert_eq!(ports_of("EXPOSE 8000 8001"), [8000, 8001]);
        assert_eq!(ports_of("ports: [\"127.0.0.1:8080:8000\"]"), [8080, 8000]);
        assert_eq!(ports_of("- { name: grpc, containerPort: 8100 }"), [8100]);
        assert_eq!(ports_of("--advertise=$(POD_NAME).x-worker:8100"), [8100]);
        assert_eq!(ports_of("  port-forward 8000:8001"), [8000, 8001]);
        assert!(ports_of("USER 65534:65534").is_empty());
        assert!(ports_of("FROM rust:1.95-bookworm").is_empty());
        assert!(ports_of("  runAsUser: 65534").is_empty());
    }

    #[test]
    fn a_port_that_the_code_does_not_have_and_one_that_is_missing_are_found() {
        let source = "pub(crate) const HTTP_PORT: u16 = 8000;\npub(crate) const WORKER_OPS_PORT: u16 = 8101;\n";
        let ports = named(source);
        let both = ["HTTP_PORT", "WORKER_OPS_PORT"];
        let good = "port: 8000\nhttp://etcd:2379\nport: 8101\n";
        assert_eq!(differences("x", good, &both, &ports), Vec::<String>::new());
        assert_eq!(
            differences("x", "port: 8000\ncontainerPort: 8102\n", &both, &ports),
            [
                "x: port 8102 is none of crates/cli/src/settings.rs",
                "x: port 8101 (WORKER_OPS_PORT) is not named",
            ]
        );
    }
}
