//! `tramontane certs`: an authority of one's own, for those who have none, and certificates of it. Never overwrites a
//! file, and writes keys for their owner's eyes only.

mod issue;

use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};

use crate::exit::{Exit, refusal};
use crate::output;
use issue::{Authority, Pair, cluster_of};

/// Days that a certificate is valid unless somebody says otherwise.
const DAYS: u32 = 365;
/// Name of a cluster that nobody has named.
const CLUSTER: &str = "default";
/// Days that an authority is.
const CA_DAYS: u32 = 3650;
/// Most days of either.
const DAYS_MAX: i64 = 36_500;
/// Most names of a certificate.
const HOSTS_MAX: usize = 64;
/// Names of every certificate: a process is also asked on its own machine.
const HERE: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// `tramontane certs ...`
#[derive(Debug, Subcommand)]
pub(crate) enum CertsCommand {
    /// Make an authority, and certificates of it for clients, routers, workers and operators
    Init(InitArgs),
    /// Make a further certificate of an authority that is there
    Issue(IssueArgs),
}

/// `tramontane certs init`
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// Directory for them; it is made when it is not there
    #[arg(long, default_value = "certs")]
    dir: PathBuf,
    /// Name of the cluster, which all its certificates carry
    #[arg(long, default_value = CLUSTER, value_parser = cluster_name)]
    cluster: String,
    #[command(flatten)]
    names: NameArgs,
}

/// `tramontane certs issue`
#[derive(Debug, Args)]
pub(crate) struct IssueArgs {
    /// Directory of the authority's ca.pem and ca-key.pem, and for the new certificate
    #[arg(long, default_value = "certs")]
    dir: PathBuf,
    /// What its holder is
    #[arg(long, value_enum)]
    role: Holder,
    /// Name of its files; that of the role when absent
    #[arg(long, value_parser = file_name)]
    name: Option<String>,
    /// Name of the cluster; that of the authority when absent
    #[arg(long, value_parser = cluster_name)]
    cluster: Option<String>,
    /// Also for another cluster than the authority's
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    names: NameArgs,
}

/// What both have in common.
#[derive(Debug, Args)]
struct NameArgs {
    /// Host name or address that clients connect to; may be repeated
    #[arg(long = "host", value_parser = host)]
    hosts: Vec<String>,
    /// Days for which certificates are valid
    #[arg(long, default_value_t = DAYS, value_parser = clap::value_parser!(u32).range(1..=DAYS_MAX))]
    days: u32,
}

/// Whom a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Holder {
    /// What clients see at a router's public ports
    Clients,
    /// A router, towards workers and operators
    Router,
    /// A worker, towards routers and other workers
    Worker,
    /// A person who runs the operator's commands
    Operator,
    /// An etcd: it has no role in the cluster, and is both ends of its own connections
    Etcd,
}

impl Holder {
    /// Those that everybody needs.
    const FIRST: [Self; 4] = [Self::Clients, Self::Router, Self::Worker, Self::Operator];

    const fn name(self) -> &'static str {
        match self {
            Self::Clients => "clients",
            Self::Router => "router",
            Self::Worker => "worker",
            Self::Operator => "operator",
            Self::Etcd => "etcd",
        }
    }
}

/// Runs the verb.
pub(crate) fn run(command: CertsCommand) -> anyhow::Result<()> {
    match command {
        CertsCommand::Init(args) => init(&args),
        CertsCommand::Issue(args) => issue(&args),
    }
}

fn init(args: &InitArgs) -> anyhow::Result<()> {
    let hosts = hosts(&args.names)?;
    let names = Holder::FIRST.map(Holder::name);
    let files = ["ca"].into_iter().chain(names);
    for name in files {
        refuse_to_overwrite(&args.dir, name)?;
    }
    let (authority, ca) = Authority::new(&args.cluster, CA_DAYS)?;
    let mut made = vec![("ca", ca)];
    for holder in Holder::FIRST {
        let pair = authority.issue(&args.cluster, holder, &hosts, args.names.days)?;
        made.push((holder.name(), pair));
    }
    fs::create_dir_all(&args.dir).with_context(|| args.dir.display().to_string())?;
    for (name, pair) in &made {
        write(&args.dir, name, pair)?;
    }
    Ok(output::line(&advice(&args.dir, &args.cluster))?)
}

fn issue(args: &IssueArgs) -> anyhow::Result<()> {
    let name = args.name.as_deref().unwrap_or(args.role.name());
    refuse_to_overwrite(&args.dir, name)?;
    let [ca, key] = files(&args.dir, "ca");
    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|error| {
            let message = format!("the authority's {}: {error}", path.display());
            refusal(Exit::NotFound, message, "tramontane certs init")
        })
    };
    let ca = read(&ca)?;
    let cluster = cluster_for(args, cluster_of(&ca))?;
    let authority = Authority::read(&ca, &read(&key)?)
        .with_context(|| format!("the authority in {}", args.dir.display()))?;
    let hosts = hosts(&args.names)?;
    let pair = authority.issue(&cluster, args.role, &hosts, args.names.days)?;
    write(&args.dir, name, &pair)?;
    let [cert, key] = files(&args.dir, name);
    Ok(output::line(&format!(
        "{}\n{}",
        cert.display(),
        key.display()
    ))?)
}

/// The cluster of a further certificate: processes of one cluster turn away those of another.
fn cluster_for(args: &IssueArgs, of_authority: Option<String>) -> anyhow::Result<String> {
    match (&args.cluster, of_authority) {
        (Some(given), Some(expected)) if *given != expected && !args.force => {
            let message = format!(
                "the authority in {} is of the cluster {expected:?}, got --cluster {given:?}",
                args.dir.display()
            );
            let next = format!("--cluster {expected}, or --force");
            Err(refusal(Exit::Conflict, message, next))
        }
        (Some(given), _) => Ok(given.clone()),
        (None, of_authority) => Ok(of_authority.unwrap_or_else(|| CLUSTER.to_owned())),
    }
}

/// Certificate and key of a name.
fn files(dir: &Path, name: &str) -> [PathBuf; 2] {
    [
        dir.join(format!("{name}.pem")),
        dir.join(format!("{name}-key.pem")),
    ]
}

fn refuse_to_overwrite(dir: &Path, name: &str) -> anyhow::Result<()> {
    let there = files(dir, name).into_iter().find(|file| file.exists());
    let Some(there) = there else { return Ok(()) };
    let message = format!(
        "{} is there already and is not overwritten",
        there.display()
    );
    let next = "another --dir, or `tramontane certs issue --name NAME` for a further certificate";
    Err(refusal(Exit::Conflict, message, next))
}

fn write(dir: &Path, name: &str, pair: &Pair) -> anyhow::Result<()> {
    let [cert, key] = files(dir, name);
    for (path, text, mode) in [(cert, &pair.cert, 0o644), (key, &pair.key, 0o600)] {
        let made = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&path);
        let written = made.and_then(|mut file| file.write_all(text.as_bytes()));
        written.with_context(|| path.display().to_string())?;
    }
    Ok(())
}

/// What to do with the files.
fn advice(dir: &Path, cluster: &str) -> String {
    let dir = dir.display();
    format!(
        "Certificates of the cluster {cluster:?} are in {dir}. Keep ca-key.pem away from servers: who has it can make \
         certificates.\n\n\
         On machines of routers, in the file of --config:\n\n  \
         [tls]\n  clients_cert = \"{dir}/clients.pem\"\n  clients_key = \"{dir}/clients-key.pem\"\n  \
         cluster_cert = \"{dir}/router.pem\"\n  cluster_key = \"{dir}/router-key.pem\"\n  cluster_ca = \"{dir}/ca.pem\"\n\n  \
         [auth]\n  keys_file = \"keys\"  # `tramontane keys add --tenant me --operator --file keys` makes it\n\n\
         On machines of workers:\n\n  \
         [tls]\n  cluster_cert = \"{dir}/worker.pem\"\n  cluster_key = \"{dir}/worker-key.pem\"\n  \
         cluster_ca = \"{dir}/ca.pem\"\n\n\
         Operators:\n\n  \
         tramontane status --tls-ca {dir}/ca.pem --tls-cert {dir}/operator.pem --tls-key {dir}/operator-key.pem\n\n\
         Clients trust {dir}/ca.pem."
    )
}

fn hosts(names: &NameArgs) -> anyhow::Result<Vec<String>> {
    let mut hosts: Vec<String> = HERE.map(str::to_owned).to_vec();
    for host in &names.hosts {
        if !hosts.contains(host) {
            hosts.push(host.clone());
        }
    }
    let got = hosts.len();
    if got > HOSTS_MAX {
        let message = format!("at most {HOSTS_MAX} hosts fit a certificate, got {got}");
        return Err(refusal(
            Exit::Misused,
            message,
            "a wildcard such as --host '*.example.org'",
        ));
    }
    Ok(hosts)
}

/// A host name, one with a wildcard in front, or an address.
fn host(text: &str) -> Result<String, String> {
    let is_address = text.parse::<std::net::IpAddr>().is_ok();
    let name = text.strip_prefix("*.").unwrap_or(text);
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let is_name = (1..=253).contains(&name.len()) && name.bytes().all(plain);
    match is_address || is_name {
        true => Ok(text.to_owned()),
        false => Err("expected a host name or an address, without a port".to_owned()),
    }
}

fn cluster_name(text: &str) -> Result<String, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    match (1..=63).contains(&text.len()) && text.bytes().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("expected 1 to 63 letters, digits and ._-".to_owned()),
    }
}

fn file_name(text: &str) -> Result<String, String> {
    match text != "ca" && !text.starts_with('.') {
        true => cluster_name(text),
        false => Err("expected a name other than ca that begins with no dot".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tramontane_runtime::tls::{Expected, PeerName, Role, Tls, TlsSettings};

    use super::*;
    use crate::exit;

    fn made(dir: &Path, cluster: &str) -> anyhow::Result<()> {
        init(&InitArgs {
            dir: dir.to_owned(),
            cluster: cluster.to_owned(),
            names: NameArgs {
                hosts: vec!["llm.example.org".to_owned(), "10.0.0.7".to_owned()],
                days: 1,
            },
        })
    }

    fn settings(dir: &Path, cluster: &str) -> TlsSettings {
        let [cert, key] = files(dir, cluster);
        let [clients, clients_key] = files(dir, "clients");
        TlsSettings {
            clients_cert: Some(clients),
            clients_key: Some(clients_key),
            cluster_cert: Some(cert),
            cluster_key: Some(key),
            cluster_ca: Some(dir.join("ca.pem")),
            ..TlsSettings::default()
        }
    }

    #[test]
    fn what_is_made_is_what_processes_take_and_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("certs");
        made(&dir, "prod").unwrap();
        for role in Role::ALL {
            let expected = Expected::Name(PeerName::new("prod", role));
            Tls::load(&settings(&dir, role.name()), expected).unwrap();
        }
        for file in fs::read_dir(&dir).unwrap() {
            let file = file.unwrap();
            let is_key = file.file_name().to_string_lossy().ends_with("-key.pem");
            let mode = file.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode & 0o077 == 0, is_key, "{file:?} {mode:o}");
        }
        let before = fs::read(dir.join("ca.pem")).unwrap();
        let again = made(&dir, "prod").unwrap_err();
        assert_eq!(exit::of(&again), Exit::Conflict);
        assert_eq!(fs::read(dir.join("ca.pem")).unwrap(), before);
    }

    #[test]
    fn a_further_certificate_is_of_the_same_authority() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let args = |name: Option<&str>| IssueArgs {
            dir: dir.to_owned(),
            role: Holder::Worker,
            name: name.map(str::to_owned),
            cluster: None,
            force: false,
            names: NameArgs {
                hosts: vec!["w-9".to_owned()],
                days: 1,
            },
        };
        assert_eq!(exit::of(&issue(&args(None)).unwrap_err()), Exit::NotFound);
        made(dir, "prod").unwrap();
        assert_eq!(exit::of(&issue(&args(None)).unwrap_err()), Exit::Conflict);
        issue(&args(Some("w-9"))).unwrap();
        let expected = Expected::Name(PeerName::new("prod", Role::Worker));
        Tls::load(&settings(dir, "w-9"), expected).unwrap();
        let other = IssueArgs {
            cluster: Some("test".to_owned()),
            ..args(Some("w-8"))
        };
        let error = issue(&other).unwrap_err();
        assert_eq!(exit::of(&error), Exit::Conflict);
        let text = error.to_string();
        assert!(
            text.contains("\"prod\"") && text.contains("\"test\""),
            "{text}"
        );
        let force = true;
        issue(&IssueArgs { force, ..other }).unwrap();
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for good in ["a", "a.b", "*.a.b", "10.0.0.1", "::1", "w_1"] {
            host(good).unwrap();
        }
        for bad in ["", "*", "a b", "a:1", "https://a", "*.*.a", "a/b"] {
            host(bad).unwrap_err();
        }
        file_name("ca").unwrap_err();
        file_name("../x").unwrap_err();
        cluster_name("a/b").unwrap_err();
    }
}
