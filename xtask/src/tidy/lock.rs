//! No dependency has a version that is known to be bad. The table is small and by hand: crates that foreign bytes go through.
//! Never asks the network: what has become known since is not in it.

use std::path::Path;

use anyhow::Context as _;

use super::read;

const LOCK: &str = "Cargo.lock";

/// A crate, its first version without what the advisory says (none: there is none), and the advisory.
type Rule = (&'static str, Option<&'static str>, &'static str);

/// The newest advisory of each.
const RULES: [Rule; 18] = [
    // HTTP, gRPC, TLS.
    ("h2", Some("0.4.16"), "RUSTSEC-2026-0258"),
    ("tonic", Some("0.12.3"), "RUSTSEC-2024-0376"),
    ("rustls", Some("0.23.45"), "RUSTSEC-2026-0285"),
    ("rustls-webpki", Some("0.103.13"), "RUSTSEC-2026-0104"),
    ("ring", Some("0.17.12"), "RUSTSEC-2025-0009"),
    ("rsa", None, "RUSTSEC-2023-0071"),
    ("idna", Some("1.0.0"), "RUSTSEC-2024-0421"),
    ("time", Some("0.3.47"), "RUSTSEC-2026-0009"),
    // What these stand on.
    ("bytes", Some("1.11.1"), "RUSTSEC-2026-0007"),
    ("tokio", Some("1.44.2"), "RUSTSEC-2025-0023"),
    ("mio", Some("0.8.11"), "RUSTSEC-2024-0019"),
    ("slab", Some("0.4.11"), "RUSTSEC-2025-0047"),
    ("crossbeam-epoch", Some("0.9.20"), "RUSTSEC-2026-0204"),
    // Files, caches, logs.
    ("memmap2", Some("0.9.11"), "RUSTSEC-2026-0186"),
    ("zip", Some("2.3.0"), "RUSTSEC-2025-0168"),
    ("lru", Some("0.18.2"), "RUSTSEC-2026-0253"),
    ("anyhow", Some("1.0.103"), "RUSTSEC-2026-0190"),
    ("tracing-subscriber", Some("0.3.20"), "RUSTSEC-2025-0055"),
];

/// Findings about the lock file of the repository at `root`.
pub(super) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    bad_versions(&read(root, LOCK)?)
}

fn bad_versions(lock: &str) -> anyhow::Result<Vec<String>> {
    let table: toml::Table = lock.parse().context(LOCK)?;
    let packages = table.get("package").and_then(toml::Value::as_array);
    let packages = packages.with_context(|| format!("{LOCK}: no packages"))?;
    let mut findings = Vec::new();
    for package in packages {
        let text = |key: &str| package.get(key).and_then(toml::Value::as_str);
        let (Some(name), Some(version)) = (text("name"), text("version")) else {
            findings.push(format!("{LOCK}: a package without name and version"));
            continue;
        };
        for (_, first, advisory) in RULES.iter().filter(|(of, _, _)| *of == name) {
            if first.is_none_or(|first| numbers(version) < numbers(first)) {
                let expected = first.unwrap_or("another crate");
                findings.push(format!(
                    "{LOCK}: {name} {version} has {advisory}, expected {expected}"
                ));
            }
        }
    }
    Ok(findings)
}

/// Major, minor, patch. A preview counts as what it is a preview of; what is no number counts as the lowest.
fn numbers(version: &str) -> [u64; 3] {
    let plain = version.split(['-', '+']).next().unwrap_or_default();
    let mut parts = plain.split('.');
    [(); 3].map(|()| {
        let part = parts.next().and_then(|part| part.parse().ok());
        part.unwrap_or_default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(packages: &[(&str, &str)]) -> String {
        let entry = |(name, version): &(&str, &str)| {
            format!("[[package]]\nname = \"{name}\"\nversion = \"{version}\"\n")
        };
        packages.iter().map(entry).collect()
    }

    #[test]
    fn versions_are_compared_by_number() {
        for (lower, higher) in [
            ("0.4.9", "0.4.16"),
            ("0.9.99", "0.10.0"),
            ("0.103.13", "1.0.0"),
            ("x", "0.0.1"),
        ] {
            assert!(numbers(lower) < numbers(higher), "{lower} {higher}");
        }
        assert_eq!(numbers("0.104.0-alpha.6"), numbers("0.104.0+build"));
    }

    #[test]
    fn a_version_with_an_advisory_is_found_in_any_of_several() {
        let good = lock(&[("h2", "0.4.16"), ("h2", "0.5.0"), ("h2-support", "0.1.0")]);
        assert_eq!(bad_versions(&good).unwrap(), Vec::<String>::new());
        let bad = lock(&[("h2", "0.4.16"), ("h2", "0.3.27"), ("rsa", "0.9.10")]);
        assert_eq!(
            bad_versions(&bad).unwrap(),
            [
                "Cargo.lock: h2 0.3.27 has RUSTSEC-2026-0258, expected 0.4.16",
                "Cargo.lock: rsa 0.9.10 has RUSTSEC-2023-0071, expected another crate",
            ]
        );
        assert!(bad_versions("version = 4").is_err());
    }
}
