//! Two ends over loopback: who believes whom, what a refusal says, and that new files are new certificates.

use std::fs;
use std::future::poll_fn;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use http::Uri;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, HandshakeKind, RootCertStore, SupportedProtocolVersion};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;
use tonic::codegen::Service as _;

use super::*;

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority and a directory for what it makes.
struct Made {
    dir: TempDir,
    ca: Issuer<'static, KeyPair>,
}

/// When a certificate is valid, in days from now.
type Days = (i64, i64);
const NOW: Days = (-1, 1);

impl Made {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        // Authorities of one name would be taken for each other.
        let name = dir.path().display().to_string();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let cert = params.self_signed(&key).unwrap();
        fs::write(dir.path().join("ca.pem"), cert.pem()).unwrap();
        let ca = Issuer::new(params, key);
        Self { dir, ca }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes `NAME.pem` and `NAME-key.pem`.
    fn issue(&self, name: &str, uris: &[&str], (from, until): Days) {
        let at = |days: i64| match days < 0 {
            true => SystemTime::now() - DAY * days.unsigned_abs() as u32,
            false => SystemTime::now() + DAY * days as u32,
        };
        let mut params = CertificateParams::new(["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        (params.not_before, params.not_after) = (at(from).into(), at(until).into());
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        for uri in uris {
            let uri = SanType::URI((*uri).try_into().unwrap());
            params.subject_alt_names.push(uri);
        }
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.ca).unwrap();
        fs::write(self.path(&format!("{name}.pem")), cert.pem()).unwrap();
        fs::write(self.path(&format!("{name}-key.pem")), key.serialize_pem()).unwrap();
    }

    fn settings(&self, name: &str) -> TlsSettings {
        TlsSettings {
            cluster_cert: Some(self.path(&format!("{name}.pem"))),
            cluster_key: Some(self.path(&format!("{name}-key.pem"))),
            cluster_ca: Some(self.path("ca.pem")),
            ..TlsSettings::default()
        }
    }

    /// An identity of a fresh certificate.
    fn process(&self, cluster: &str, role: Role) -> Tls {
        let name = PeerName::new(cluster, role);
        self.issue("one", &[&name.to_string()], NOW);
        Tls::load(&self.settings("one"), Expected::Name(name)).unwrap()
    }
}

/// A door that says hello to everybody, and how to come to it.
struct Echo {
    uri: Uri,
    serving: JoinSet<()>,
}

impl Echo {
    async fn start(door: Door) -> Self {
        Self::start_for(door, CONNECTIONS_MAX).await
    }

    async fn start_for(door: Door, connections_max: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri = format!("http://{}", listener.local_addr().unwrap());
        let mut incoming = Incoming::new(listener, door).at_most(connections_max);
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut open = JoinSet::new();
            loop {
                let mut socket = poll_fn(|cx| incoming.poll_accept(cx)).await;
                open.spawn(async move {
                    let mut buffer = [0; 32];
                    while let Ok(got @ 1..) = socket.read(&mut buffer).await {
                        let _gone = socket.write_all(&buffer[..got]).await;
                        let _gone = socket.flush().await;
                    }
                });
            }
        });
        let uri = uri.parse().unwrap();
        Self { uri, serving }
    }

    async fn open(&self, mut link: Link) -> Result<Opened, String> {
        let opened = link.call(self.uri.clone()).await;
        opened
            .map(hyper_util::rt::TokioIo::into_inner)
            .map_err(|error| error.to_string())
    }

    /// What comes back, or why nothing does: a server's refusal is read, not connected to.
    async fn ask(&self, link: Link) -> Result<Opened, String> {
        let mut opened = self.open(link).await?;
        echoed(&mut opened).await?;
        Ok(opened)
    }
}

/// What a server says that has refused us after our handshake. We say nothing: it would not be read.
async fn refused(door: &Echo, link: Link) -> String {
    let mut opened = door.open(link).await.unwrap();
    opened.read(&mut [0]).await.unwrap_err().to_string()
}

async fn echoed(opened: &mut Opened) -> Result<(), String> {
    // As long as the hello of HTTP/2, which a door waits for.
    let said = [b'x'; 24];
    let mut heard = [0; 24];
    let talk = async {
        opened.write_all(&said).await?;
        opened.flush().await?;
        opened.read_exact(&mut heard).await
    };
    talk.await.map_err(|error| error.to_string())?;
    assert_eq!(said, heard);
    Ok(())
}

#[tokio::test]
async fn processes_of_one_cluster_talk_in_the_roles_that_were_meant() {
    let made = Made::new();
    let worker = made.process("prod", Role::Worker);
    let router = made.process("prod", Role::Router);
    let door = Echo::start(worker.cluster_door("worker")).await;
    door.ask(router.link(Role::Worker)).await.unwrap();

    let error = door.ask(router.link(Role::Router)).await.unwrap_err();
    assert!(
        error.ends_with("the peer is spiffe://prod/worker, expected spiffe://prod/router"),
        "{error}"
    );
    let other = made.process("test", Role::Router);
    let error = door.ask(other.link(Role::Worker)).await.unwrap_err();
    assert!(error.contains("expected spiffe://test/worker"), "{error}");
}

/// The class "open inner ports" of docs/security.md, CVE-2025-32444, CVE-2025-29783, CVE-2025-47277, CVE-2025-30165: whoever reaches
/// one is believed.
#[tokio::test]
async fn strangers_are_refused_by_both_ends() {
    let (made, foreign) = (Made::new(), Made::new());
    let worker = made.process("prod", Role::Worker);
    let stranger = foreign.process("prod", Role::Router);
    let door = Echo::start(worker.cluster_door("worker")).await;
    let error = door.ask(stranger.link(Role::Worker)).await.unwrap_err();
    assert!(error.contains("UnknownIssuer"), "{error}");
    // One that believes us and that we do not believe: it hears why.
    fs::copy(made.path("ca.pem"), foreign.path("both.pem")).unwrap();
    let ca = foreign.path("both.pem");
    let own = (foreign.path("one.pem"), foreign.path("one-key.pem"));
    let trusting = Trust::load("test", ca.clone(), Some(own)).unwrap();
    // By name: the certificate has one.
    let uri = door.uri.to_string().replace("127.0.0.1", "localhost");
    let door = Echo {
        uri: uri.parse().unwrap(),
        ..door
    };
    let error = refused(&door, trusting.link()).await;
    assert!(error.contains("UnknownCA"), "{error}");
    let nameless = Trust::load("test", ca, None).unwrap();
    let error = refused(&door, nameless.link()).await;
    assert!(error.contains("CertificateRequired"), "{error}");
    drop(door.serving);
}

/// A client of another make that remembers sessions, with the certificate `one`.
fn remembering(made: &Made, version: &'static SupportedProtocolVersion) -> Arc<ClientConfig> {
    let pem = |name: &str| fs::read(made.path(name)).unwrap();
    let certificate = |name: &str| CertificateDer::from_pem_slice(&pem(name)).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(certificate("ca.pem")).unwrap();
    let key = PrivateKeyDer::from_pem_slice(&pem("one-key.pem")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![certificate("one.pem")], key);
    Arc::new(config.unwrap())
}

fn handshake(opened: &Opened) -> HandshakeKind {
    match opened {
        Opened::Tls(stream) => stream.get_ref().1.handshake_kind().unwrap(),
        Opened::Plain(_) => panic!("TLS expected"),
    }
}

#[tokio::test]
async fn who_was_believed_once_is_checked_again() {
    let made = Made::new();
    let worker = made.process("prod", Role::Worker);
    let (mutual, open) = (
        Echo::start(worker.cluster_door("worker")).await,
        Echo::start(worker.ops_door("ops")).await,
    );
    // Nobody is checked at the open door: there sessions go on, which shows that this client would.
    for (door, expected) in [
        (&mutual, HandshakeKind::Full),
        (&open, HandshakeKind::Resumed),
    ] {
        for version in [&TLS13, &TLS12] {
            let config = remembering(&made, version);
            let again = async || {
                let at = door.uri.authority().unwrap().as_str();
                let stream = TcpStream::connect(at).await.unwrap();
                let name = "localhost".try_into().unwrap();
                let connector = TlsConnector::from(Arc::clone(&config));
                let stream = connector.connect(name, stream).await.unwrap();
                let mut opened = Opened::Tls(Box::new(stream));
                // Tickets come before the answer.
                echoed(&mut opened).await.unwrap();
                handshake(&opened)
            };
            assert_eq!(again().await, HandshakeKind::Full, "{version:?}");
            assert_eq!(again().await, expected, "{version:?}");
        }
    }
}

#[tokio::test]
async fn a_server_is_checked_again_at_every_connection() {
    let made = Made::new();
    let worker = made.process("prod", Role::Worker);
    // It offers to go on with sessions.
    let door = Echo::start(worker.ops_door("ops")).await;
    let uri = door.uri.to_string().replace("127.0.0.1", "localhost");
    let named = Echo {
        uri: uri.parse().unwrap(),
        ..door
    };
    let trust = Trust::load("test", made.path("ca.pem"), None).unwrap();
    for link in [worker.link(Role::Worker), trust.link()] {
        for _ in 0..2 {
            let opened = named.ask(link.clone()).await.unwrap();
            assert_eq!(handshake(&opened), HandshakeKind::Full);
        }
    }
}

#[tokio::test]
async fn plaintext_and_tls_do_not_meet_and_say_so() {
    let made = Made::new();
    let worker = made.process("prod", Role::Worker);
    let open = Echo::start(worker.ops_door("ops")).await;
    let mut stream = TcpStream::connect(open.uri.authority().unwrap().as_str())
        .await
        .unwrap();
    stream
        .write_all(b"GET /metrics HTTP/1.1\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400 "), "{head}");
    assert!(
        head.contains(&format!("content-length: {}\r\n", body.len())),
        "{answer}"
    );
    assert!(body.contains("https://"), "{body}");

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let plain = format!("http://{}", listener.local_addr().unwrap());
    let answers = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        // As a server of HTTP/2 begins.
        stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
        stream
    };
    let mut link = worker.link(Role::Worker);
    let (_open, asked) = tokio::join!(answers, link.call(plain.parse().unwrap()));
    let error = asked.unwrap_err().to_string();
    assert!(error.contains("speaks plaintext"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn one_that_never_begins_a_handshake_holds_up_nobody_and_is_given_up() {
    let made = Made::new();
    let worker = made.process("prod", Role::Worker);
    let door = Echo::start(worker.cluster_door("worker")).await;
    let at = door.uri.authority().unwrap().as_str();
    let mut silent = TcpStream::connect(at).await.unwrap();
    let mut slow = TcpStream::connect(at).await.unwrap();
    slow.write_all(&[0x16, 3, 1]).await.unwrap();
    door.ask(worker.link(Role::Worker)).await.unwrap();
    let begin = Instant::now();
    let mut rest = Vec::new();
    for stream in [&mut silent, &mut slow] {
        let _closed_or_reset = timeout(HANDSHAKE_TIMEOUT * 2, stream.read_to_end(&mut rest))
            .await
            .unwrap();
    }
    assert!(
        begin.elapsed() <= HANDSHAKE_TIMEOUT + DAY / 86_400,
        "{:?}",
        begin.elapsed()
    );
}

#[tokio::test]
async fn a_door_has_so_many_places_and_who_leaves_makes_room() {
    let made = Made::new();
    let worker = made.process("prod", Role::Worker);
    for is_plain in [true, false] {
        let (door, link) = if is_plain {
            (Door::plain("worker"), Tls::default().link(Role::Worker))
        } else {
            (worker.cluster_door("worker"), worker.link(Role::Worker))
        };
        let door = Echo::start_for(door, 1).await;
        if !is_plain {
            // A handshake that fails does not keep the place.
            door.ask(Tls::default().link(Role::Worker))
                .await
                .unwrap_err();
        }
        let mut first = door.ask(link.clone()).await.unwrap();
        let mut second = Box::pin(door.ask(link));
        for _ in 0..20 {
            // Time enough for the door to take another one, if it did.
            tokio::select! {
                biased;
                _ = &mut second => panic!("two have the one place"),
                echoed = echoed(&mut first) => echoed.unwrap(),
            }
        }
        drop(first);
        second.await.unwrap();
    }
}

#[tokio::test]
async fn nobody_goes_beyond_this_machine_in_the_clear_unless_told_to() {
    let mut link = Tls::default().link(Role::Worker);
    let error = link.call("http://192.0.2.1:1".parse().unwrap()).await;
    let error = error.unwrap_err().to_string();
    assert!(
        error.contains("192.0.2.1:1") && error.contains("--insecure"),
        "{error}"
    );
    let door = Echo::start(Door::plain("worker")).await;
    door.ask(link).await.unwrap();
}

#[tokio::test]
async fn new_files_are_for_new_connections_and_bad_ones_for_nobody() {
    let made = Made::new();
    let worker = made.process("prod", Role::Worker);
    let cluster = Arc::clone(worker.cluster.as_ref().unwrap());
    let serial = || cluster.to(Role::Worker);
    let door = Echo::start(worker.cluster_door("worker")).await;
    let mut old = door.ask(worker.link(Role::Worker)).await.unwrap();
    let shown = |opened: &Opened| match opened {
        Opened::Tls(stream) => {
            let (_, connection) = stream.get_ref();
            connection.peer_certificates().unwrap()[0].to_vec()
        }
        Opened::Plain(_) => panic!("TLS expected"),
    };
    let before = (shown(&old), serial());

    // Nothing has changed: nothing is made anew.
    cluster.current.look();
    assert!(Arc::ptr_eq(&before.1, &serial()));
    // Only the half of a change, and a name that is not ours.
    let key = fs::read(made.path("one-key.pem")).unwrap();
    made.issue("one", &["spiffe://prod/worker"], NOW);
    let new_key = fs::read(made.path("one-key.pem")).unwrap();
    fs::write(made.path("one-key.pem"), key).unwrap();
    cluster.current.look();
    assert!(Arc::ptr_eq(&before.1, &serial()));
    made.issue("other", &["spiffe://prod/router"], NOW);
    let saved = fs::read(made.path("one.pem")).unwrap();
    fs::copy(made.path("other.pem"), made.path("one.pem")).unwrap();
    fs::copy(made.path("other-key.pem"), made.path("one-key.pem")).unwrap();
    cluster.current.look();
    assert!(Arc::ptr_eq(&before.1, &serial()));

    // The whole of it.
    fs::write(made.path("one.pem"), saved).unwrap();
    fs::write(made.path("one-key.pem"), new_key).unwrap();
    cluster.current.look();
    let new = door.ask(worker.link(Role::Worker)).await.unwrap();
    assert_ne!(shown(&new), before.0);
    echoed(&mut old).await.unwrap();
    // A file that is gone changes nothing.
    fs::remove_file(made.path("one.pem")).unwrap();
    cluster.current.look();
    door.ask(worker.link(Role::Worker)).await.unwrap();
}

#[test]
fn what_cannot_be_used_is_named() {
    let made = Made::new();
    let name = PeerName::new("prod", Role::Worker);
    let load = |settings: &TlsSettings| {
        let error = Tls::load(settings, Expected::Name(name.clone())).unwrap_err();
        let cause = std::error::Error::source(&error);
        cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
    };
    let with = |change: &dyn Fn(&Path)| {
        made.issue("one", &["spiffe://prod/worker"], NOW);
        change(made.dir.path());
        load(&made.settings("one"))
    };
    let write = |file: &'static str, bytes: &'static [u8]| {
        move |dir: &Path| fs::write(dir.join(file), bytes).unwrap()
    };
    let half = TlsSettings {
        cluster_ca: None,
        ..made.settings("one")
    };
    let key = fs::read_to_string(made.path("ca.pem")).unwrap();
    let leaked: &'static [u8] = Box::leak(key.into_bytes().into_boxed_slice());
    let table = [
        (
            load(&half),
            "tls.cluster_cert is set without tls.cluster_ca",
        ),
        (
            with(&|dir| fs::remove_file(dir.join("one.pem")).unwrap()),
            "one.pem: No such file",
        ),
        (
            with(&write("one.pem", b"")),
            "one.pem must be PEM with at least one certificate, got an empty file",
        ),
        (
            with(&write("one.pem", b"hello")),
            "got 5 bytes that are no PEM",
        ),
        (
            with(&write("one-key.pem", leaked)),
            "one-key.pem must be PEM with a private key, got PEM with a CERTIFICATE",
        ),
        (with(&write("ca.pem", b"x")), "CA "),
    ];
    for (got, expected) in table {
        assert!(got.contains(expected), "{got:?} has no {expected:?}");
    }
}

#[test]
fn a_certificate_that_others_would_refuse_is_none() {
    let made = Made::new();
    let ca = fs::read(made.path("ca.pem")).unwrap();
    let load = |settings: &TlsSettings| {
        let expected = Expected::Name(PeerName::new("prod", Role::Worker));
        let error = Tls::load(settings, expected).unwrap_err();
        let cause = std::error::Error::source(&error);
        cause.map_or_else(|| error.to_string(), |cause| format!("{error}: {cause}"))
    };
    let issued = |uris: &[&str], days: Days| {
        made.issue("one", uris, days);
        load(&made.settings("one"))
    };
    let old = issued(&["spiffe://prod/worker"], (-9, -1));
    assert!(
        old.contains("one.pem is valid from ") && old.contains(", now is "),
        "{old}"
    );
    let none = issued(&[], NOW);
    assert!(
        none.contains("one.pem has no URI spiffe://CLUSTER/router"),
        "{none}"
    );
    let other = issued(&["spiffe://prod/operator"], NOW);
    assert!(other.contains("is that of spiffe://prod/operator, expected spiffe://prod/worker"));
    let foreign = Made::new();
    fs::copy(foreign.path("ca.pem"), made.path("ca.pem")).unwrap();
    let foreign = issued(&["spiffe://prod/worker"], NOW);
    assert!(
        foreign.contains("none that CA ") && foreign.contains("UnknownIssuer"),
        "{foreign}"
    );
    fs::write(made.path("ca.pem"), ca).unwrap();
    made.issue("two", &["spiffe://prod/worker"], NOW);
    let mixed = TlsSettings {
        cluster_key: Some(made.path("two-key.pem")),
        ..made.settings("one")
    };
    assert!(load(&mixed).contains("two-key.pem is not that of certificate "));
}
