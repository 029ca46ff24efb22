//! `tramontane keys`: makes, lists and revokes API keys in a file that routers follow. The file has digests only: a key
//! is shown once, when it is made.

mod file;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use serde_json::json;
use tramontane_router::auth::keys::{KEYS_MAX, KeyEntry, KeyHash, expiry, new_key, parse_keys};
use tramontane_router::tenants::TenantName;

use crate::exit::{Exit, refusal};
use crate::output::{self, Format};
use crate::settings::misuse;

/// Bytes of a name that nobody chose.
const NAME_DIGITS: usize = 8;
/// What a new file says first.
const HEADING: &str =
    "# API keys of tramontane: name, tenant, SHA-256 of the key, expiry, operator or nothing.\n";

/// `tramontane keys ...`
#[derive(Debug, Subcommand)]
pub(crate) enum KeysCommand {
    /// Make a key, print it once and write its digest into the file
    Add(AddArgs),
    /// List the keys of a file
    List {
        /// The file
        #[arg(long)]
        file: PathBuf,
        /// How to print it
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
    /// Take a key out of the file; routers refuse it within seconds
    Revoke {
        /// Name of the key
        name: String,
        /// The file
        #[arg(long)]
        file: PathBuf,
    },
}

/// `tramontane keys add`
#[derive(Debug, Args)]
pub(crate) struct AddArgs {
    /// Whom the key speaks for
    #[arg(long)]
    tenant: String,
    /// What people call the key; chosen when absent
    #[arg(long)]
    name: Option<String>,
    /// How long it is valid, such as 90d; for ever when absent
    #[arg(long, value_parser = humantime::parse_duration)]
    expires: Option<Duration>,
    /// Whether it may also operate the cluster
    #[arg(long)]
    operator: bool,
    /// The file; made when it is not there
    #[arg(long)]
    file: PathBuf,
}

/// Does what the command says.
pub(crate) fn run(command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Add(args) => add(&args),
        KeysCommand::List { file, output } => list(&file, output),
        KeysCommand::Revoke { name, file } => revoke(&name, &file),
    }
}

fn add(args: &AddArgs) -> anyhow::Result<()> {
    let key = new_key()?;
    let hash = KeyHash::of(&key);
    let chosen = || format!("key-{:.NAME_DIGITS$}", hash.to_string());
    let name = args.name.clone().unwrap_or_else(chosen);
    let entry = KeyEntry {
        name: named(&name, "name")?,
        tenant: named(&args.tenant, "tenant")?,
        hash,
        expires: args.expires.map(|valid| expiry(SystemTime::now(), valid)),
        is_operator: args.operator,
    };
    file::change(&args.file, |text| added(&args.file, text, &entry))?;
    output::note(&format!(
        "key {name} of tenant {}; it is not shown again",
        entry.tenant
    ));
    Ok(output::line(&key)?)
}

/// The file's text with one key more.
fn added(path: &Path, text: Option<String>, entry: &KeyEntry) -> anyhow::Result<String> {
    let mut text = text.unwrap_or_else(|| HEADING.to_owned());
    let entries = parse(path, &text)?;
    if entries.iter().any(|other| other.name == entry.name) {
        let message = format!("there is a key {} already", entry.name);
        return Err(refusal(Exit::Conflict, message, "another --name"));
    }
    if entries.len() >= KEYS_MAX {
        let message = format!("a file has at most {KEYS_MAX} keys");
        return Err(refusal(Exit::Conflict, message, "tramontane keys revoke"));
    }
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    text.push_str(&format!("{entry}\n"));
    Ok(text)
}

fn list(path: &Path, format: Format) -> anyhow::Result<()> {
    let text = file::read(path).with_context(|| path.display().to_string())?;
    let now = SystemTime::now();
    let entries = parse(path, &text)?;
    let time = |entry: &KeyEntry| match entry.expires {
        Some(at) => humantime::format_rfc3339_seconds(at).to_string(),
        None => "never".to_owned(),
    };
    let is_over = |entry: &KeyEntry| entry.expires.is_some_and(|at| at <= now);
    if format.is_data() {
        let row = |entry: &KeyEntry| {
            json!({
                "name": entry.name.as_str(),
                "tenant": entry.tenant.as_str(),
                "expires": entry.expires.map(|_| time(entry)),
                "expired": is_over(entry),
                "operator": entry.is_operator,
            })
        };
        let rows: Vec<_> = entries.iter().map(row).collect();
        return output::data(format, &rows);
    }
    let row = |entry: &KeyEntry| {
        let state = if is_over(entry) { "expired" } else { "valid" };
        let role = if entry.is_operator {
            "operator"
        } else {
            "client"
        };
        let words = [
            entry.name.as_str(),
            entry.tenant.as_str(),
            &time(entry),
            state,
            role,
        ];
        words.map(str::to_owned).to_vec()
    };
    let rows: Vec<Vec<String>> = entries.iter().map(row).collect();
    Ok(output::table(
        &["NAME", "TENANT", "EXPIRES", "STATE", "ROLE"],
        &rows,
    )?)
}

fn revoke(name: &str, path: &Path) -> anyhow::Result<()> {
    file::change(path, |text| {
        let missing = || format!("there is no file {}", path.display());
        let text = text.with_context(missing)?;
        without(name, path, &text)
    })?;
    output::note(&format!("key {name} is revoked"));
    Ok(())
}

/// The file's text with one key less.
fn without(name: &str, path: &Path, text: &str) -> anyhow::Result<String> {
    let entries = parse(path, text)?;
    if !entries.iter().any(|entry| entry.name.as_str() == name) {
        let message = format!("there is no key {name} in {}", path.display());
        return Err(refusal(Exit::NotFound, message, "tramontane keys list"));
    }
    let is_it = |line: &&str| line.split_ascii_whitespace().next() == Some(name);
    let kept: Vec<&str> = text.lines().filter(|line| !is_it(line)).collect();
    Ok(format!("{}\n", kept.join("\n")))
}

fn named(text: &str, what: &str) -> anyhow::Result<TenantName> {
    TenantName::new(text).ok_or_else(|| {
        misuse(format!(
            "--{what} must be 1 to 64 letters, digits or any of . _ -, got {text:?}"
        ))
    })
}

fn parse(path: &Path, text: &str) -> anyhow::Result<Vec<KeyEntry>> {
    parse_keys(text.as_bytes()).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    fn args(dir: &Path, name: &str) -> AddArgs {
        AddArgs {
            tenant: "acme".to_owned(),
            name: Some(name.to_owned()),
            expires: Some(Duration::from_secs(90 * 24 * 3600)),
            operator: false,
            file: dir.join("keys"),
        }
    }

    #[test]
    fn a_key_is_added_once_and_gone_when_it_is_revoked() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        add(&args(dir.path(), "laptop")).unwrap();
        add(&args(dir.path(), "phone")).unwrap();
        let again = add(&args(dir.path(), "phone")).unwrap_err();
        assert_eq!(exit::of(&again), Exit::Conflict);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(
            text.starts_with(HEADING) && !text.contains("trm_"),
            "{text}"
        );
        assert_eq!(parse(&file, &text).unwrap().len(), 2);
        revoke("laptop", &file).unwrap();
        let left = parse(&file, &std::fs::read_to_string(&file).unwrap()).unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].name.as_str(), "phone");
        let missing = revoke("laptop", &file).unwrap_err();
        assert_eq!(exit::of(&missing), Exit::NotFound);
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let wrong = add(&args(dir.path(), "a b")).unwrap_err();
        assert_eq!(exit::of(&wrong), Exit::Misused);
        assert!(!dir.path().join("keys").exists());
    }
}
