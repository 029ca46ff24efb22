//! `tramontane router` and `tramontane worker`: one process each, coordinated by etcd.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use toml::Value;
use tramontane_coordination::{EtcdConfig, EtcdStore, RememberingStore, Store};
use tramontane_grammar::Vocabulary;
use tramontane_model::Checkpoint;
use tramontane_router::RouterParts;
use tramontane_runtime::tls::{Role, Tls, TlsSettings};
use tramontane_runtime::{Shutdown, telemetry};
use tramontane_worker::device::{self, ChosenDevice};
use tramontane_worker::{
    ExchangeKind, PeerModel, ProcessKind, RankParts, WorkerConfig, WorkerParts, open_from_peers,
};

use crate::args::{EtcdArgs, ProcessArgs, RouterArgs, WorkerArgs};
use crate::doors::{self, Port, Shows, bind};
use crate::model::{open_model, open_tokenizer, progress_bar, vocabulary_of};
use crate::settings::{self, Flags, ListenSettings, Settings, misuse};

/// How long tasks may take to end after the service itself has.
const FINISH_MAX: Duration = Duration::from_secs(10);

/// Runs a router until it is stopped.
pub(crate) async fn router(args: RouterArgs) -> anyhow::Result<()> {
    let settings = settings::load(args.process.config.as_deref(), router_flags(&args))?.value;
    settings.etcd.validate()?;
    let router = settings.router();
    router.validate().map_err(misuse)?;
    let tls = router_doors(&settings, &settings.etcd.cluster)?;
    let _telemetry = telemetry::start(&settings.telemetry, "tramontane-router").map_err(misuse)?;
    let (checkpoint, _) = open_model(&args.model)?;
    let (tokenizer, model) = open_tokenizer(&args.model, &checkpoint)?;
    drop(checkpoint);
    let shutdown = Shutdown::new();
    follow(&tls, &settings.tls, &shutdown);
    let store = store(&settings, &router.id, &shutdown)?;
    let (http, grpc, admin) = (
        bind(&settings.listen.http).await?,
        bind(&settings.listen.grpc).await?,
        bind(&settings.listen.admin).await?,
    );
    shutdown.trigger_on_signals().context("signal handlers")?;
    let parts = RouterParts {
        store,
        tokenizer,
        model,
        http,
        grpc,
        admin,
        workers: tls.link(Role::Worker),
        tls,
        scaler: None,
    };
    tramontane_router::run(router, parts, shutdown.clone()).await?;
    shutdown.trigger();
    shutdown.finish(FINISH_MAX).await;
    Ok(())
}

/// Runs a worker until it is stopped or drained.
pub(crate) async fn worker(args: WorkerArgs) -> anyhow::Result<()> {
    let loaded = settings::load(args.process.config.as_deref(), worker_flags(&args)?)?;
    let has_weights = settings::is_given(&loaded, "worker.weights");
    let settings = loaded.value;
    settings.etcd.validate()?;
    let mut config = settings.worker.clone();
    config.cluster.clone_from(&settings.etcd.cluster);
    if config.id.is_empty() {
        config.id = host_name()?;
    }
    config
        .validate()
        .map_err(|e| misuse(format!("worker.{e}")))?;
    let tls = worker_doors(&settings, &config)?;
    let _telemetry = telemetry::start(&settings.telemetry, "tramontane-worker").map_err(misuse)?;
    let shutdown = Shutdown::new();
    follow(&tls, &settings.tls, &shutdown);
    if config.island_rank > 0 {
        return rank(
            &args,
            config,
            has_weights,
            (&settings.listen, tls, shutdown),
        )
        .await;
    }
    let store = store(&settings, &config.id, &shutdown)?;
    let opened = open_worker_model(&args, &config, &store, (&tls, &shutdown)).await?;
    let Some(opened) = opened else {
        shutdown.finish(FINISH_MAX).await;
        return Ok(());
    };
    let WorkerModel {
        checkpoint,
        name,
        vocabulary,
    } = opened;
    if !has_weights {
        config.weights = checkpoint.weight_format()?;
    }
    let _device = choose_device(&mut config, &checkpoint)?;
    let parts = WorkerParts {
        store,
        checkpoint,
        model_name: name,
        vocabulary,
        grpc: bind(&settings.listen.worker).await?,
        ops: Some(bind(&settings.listen.ops).await?),
        progress: Some(progress_bar(
            "experts",
            "{bytes} of {total_bytes}, {eta} left",
        )),
        exchange: ExchangeKind::Grpc,
        process: ProcessKind::Own,
        tls,
    };
    tramontane_worker::run(config, parts, shutdown.clone()).await?;
    shutdown.trigger();
    shutdown.finish(FINISH_MAX).await;
    Ok(())
}

/// Runs a rank that follows the leader of its island until it is stopped. It knows no store, and so no worker that could
/// give it weights.
async fn rank(
    args: &WorkerArgs,
    mut config: WorkerConfig,
    has_weights: bool,
    (listen, tls, shutdown): (&ListenSettings, Tls, Shutdown),
) -> anyhow::Result<()> {
    if args.model_from_peers {
        let rank = config.island_rank;
        return Err(misuse(format!(
            "--model-from-peers is for rank 0 of an island, this is rank {rank}: give it the files with --model"
        )));
    }
    let (checkpoint, _name) = open_model(&args.model)?;
    if !has_weights {
        config.weights = checkpoint.weight_format()?;
    }
    let _device = choose_device(&mut config, &checkpoint)?;
    shutdown.trigger_on_signals().context("signal handlers")?;
    let parts = RankParts {
        checkpoint,
        ops: Some(bind(&listen.ops).await?),
        tls,
    };
    tramontane_worker::run_rank(config, parts, shutdown.clone()).await?;
    shutdown.trigger();
    shutdown.finish(FINISH_MAX).await;
    Ok(())
}

/// What a worker serves.
struct WorkerModel {
    checkpoint: Arc<Checkpoint>,
    name: String,
    /// Without it nobody is served who asks for JSON.
    vocabulary: Option<Vocabulary>,
}

/// The model of this machine, or of other workers; `None` when the worker was stopped before there was one.
async fn open_worker_model(
    args: &WorkerArgs,
    config: &WorkerConfig,
    store: &Arc<dyn Store>,
    (tls, shutdown): (&Tls, &Shutdown),
) -> anyhow::Result<Option<WorkerModel>> {
    if !args.model_from_peers {
        let opened = open_model(&args.model)?;
        // Until here a signal ends the process: reading every byte of a checkpoint takes its time.
        shutdown.trigger_on_signals().context("signal handlers")?;
        let (checkpoint, name) = opened;
        let vocabulary = vocabulary_of(&args.model, &checkpoint);
        return Ok(Some(WorkerModel {
            checkpoint,
            name,
            vocabulary,
        }));
    }
    shutdown.trigger_on_signals().context("signal handlers")?;
    let model = args.model.model.as_deref();
    let directory = model.map(|path| match path.is_file() {
        true => path.parent().unwrap_or(path),
        false => path,
    });
    let wish = PeerModel {
        store: Arc::clone(store),
        link: tls.link(Role::Worker),
        cluster: config.cluster.clone(),
        id: config.id.clone(),
        name: args.model.model_name.clone(),
        directory: directory.map(Path::to_owned),
    };
    let opened = open_from_peers(wish, shutdown.token.clone()).await?;
    Ok(opened.map(|opened| WorkerModel {
        checkpoint: Arc::new(opened.checkpoint),
        name: opened.name,
        vocabulary: opened.vocabulary,
    }))
}

/// The identities of a router, and whether its ports may be open where they are to be.
pub(crate) fn router_doors(settings: &Settings, cluster: &str) -> anyhow::Result<Tls> {
    let tls = doors::identities(&settings.tls, cluster, Role::Router)?;
    let listen = &settings.listen;
    let port = |key, address, shows| Port {
        key,
        address,
        shows,
    };
    let ports = [
        port("listen.http", &listen.http, Shows::Clients),
        port("listen.grpc", &listen.grpc, Shows::Clients),
        port("listen.admin", &listen.admin, Shows::Cluster),
    ];
    doors::check(&ports, &tls, settings.tls.insecure)?;
    doors::check_callers(&ports, &settings.auth, settings.tls.insecure)?;
    Ok(tls)
}

/// Those of a worker. A rank that follows has no port but that for health checks.
fn worker_doors(settings: &Settings, config: &WorkerConfig) -> anyhow::Result<Tls> {
    let tls = doors::identities(&settings.tls, &settings.etcd.cluster, Role::Worker)?;
    let (listen, shows) = (&settings.listen, Shows::Cluster);
    let port = |key, address| Port {
        key,
        address,
        shows,
    };
    let ports = [
        port("listen.ops", &listen.ops),
        port("listen.worker", &listen.worker),
    ];
    let opened = if config.island_rank > 0 {
        1
    } else {
        ports.len()
    };
    doors::check(&ports[..opened], &tls, settings.tls.insecure)?;
    doors::check_island(config, settings.tls.insecure)?;
    Ok(tls)
}

/// Looks at the files of an identity from now on.
pub(crate) fn follow(tls: &Tls, settings: &TlsSettings, shutdown: &Shutdown) {
    tls.watch(settings.reload_every, &shutdown.tasks, &shutdown.token);
}

fn router_flags(args: &RouterArgs) -> Flags {
    let mut flags = Flags::default();
    common_flags(&mut flags, &args.process, &args.etcd);
    let defaults = ListenSettings::default();
    let (host, admin_host) = (args.host, args.admin_host);
    let http = listen(&defaults.http, host, args.http_port);
    let grpc = listen(&defaults.grpc, host, args.grpc_port);
    let admin = listen(&defaults.admin, admin_host, args.admin_port);
    flags.set("listen", "http", http);
    flags.set("listen", "grpc", grpc);
    flags.set("listen", "admin", admin);
    flags.set("router", "min_workers", args.min_workers.map(|n| n as i64));
    flags
}

fn worker_flags(args: &WorkerArgs) -> anyhow::Result<Flags> {
    let mut flags = Flags::default();
    common_flags(&mut flags, &args.process, &args.etcd);
    let defaults = ListenSettings::default();
    flags.set(
        "listen",
        "worker",
        listen(&defaults.worker, args.host, args.grpc_port),
    );
    flags.set(
        "listen",
        "ops",
        listen(&defaults.ops, args.host, args.ops_port),
    );
    flags.set("worker", "id", args.id.clone());
    flags.set("worker", "roles", args.roles.clone());
    flags.set("worker", "device", args.compute.device.clone());
    flags.set("worker", "island_ranks", args.island_ranks.map(i64::from));
    flags.set("worker", "island_rank", args.island_rank.map(i64::from));
    flags.set("worker", "island_leader", args.island_leader.clone());
    flags.set("worker", "weights", args.compute.weights.clone());
    flags.set("worker", "kv_format", args.compute.kv_format.clone());
    flags.set("worker", "numeric_class", args.numeric_class.clone());
    flags.set("worker", "advertise", args.advertise.clone());
    flags.set("worker", "threads", args.threads.map(|n| n as i64));
    flags.set("worker", "drills", args.drills.then_some(true));
    let memory = args.expert_memory.map(i64::try_from).transpose();
    flags.set(
        "worker",
        "expert_memory",
        memory.map_err(|e| misuse(format!("--expert-memory: {e}")))?,
    );
    Ok(flags)
}

fn common_flags(flags: &mut Flags, process: &ProcessArgs, etcd: &EtcdArgs) {
    flags.set("telemetry", "log", process.log.clone());
    flags.set("tls", "insecure", process.insecure.then_some(true));
    flags.set("etcd", "cluster", etcd.cluster.clone());
    let endpoints =
        |list: &Vec<String>| list.iter().cloned().map(Value::String).collect::<Vec<_>>();
    flags.set("etcd", "endpoints", etcd.etcd.as_ref().map(endpoints));
}

/// `--host` and `--port` flags change the two halves of the default address on their own.
fn listen(default: &str, host: Option<std::net::IpAddr>, port: Option<u16>) -> Option<String> {
    if host.is_none() && port.is_none() {
        return None;
    }
    let default: SocketAddr = default.parse().ok()?;
    let address = SocketAddr::new(host.unwrap_or(default.ip()), port.unwrap_or(default.port()));
    Some(address.to_string())
}

/// Decides what to compute on before a port is opened; a device that cannot be used is a misuse.
pub(crate) fn choose_device(
    config: &mut WorkerConfig,
    checkpoint: &Checkpoint,
) -> anyhow::Result<ChosenDevice> {
    device::choose(config, checkpoint.geometry()).map_err(|e| misuse(format!("worker.{e}")))
}

/// etcd, and the file beside it that remembers it for the process of this name.
fn store(
    Settings {
        etcd: settings,
        tls,
        ..
    }: &Settings,
    process: &str,
    shutdown: &Shutdown,
) -> anyhow::Result<Arc<dyn Store>> {
    let mut config = EtcdConfig::new(settings.endpoints.clone(), &settings.cluster);
    let login = settings.login(tls.insecure)?;
    config.user = login.map(|(user, password)| (user, password.reveal().to_owned()));
    if let Some(trust) = settings.trust()? {
        trust.watch(tls.reload_every, &shutdown.tasks, &shutdown.token);
        config.tls = Some(trust.link());
    }
    let etcd = Arc::new(EtcdStore::new(config).map_err(misuse)?);
    let Some(directory) = &settings.state_dir else {
        return Ok(etcd);
    };
    let name = format!("{}-{process}.json", settings.cluster).replace('/', "_");
    let (tasks, stop) = (&shutdown.tasks, shutdown.token.clone());
    let remembering = RememberingStore::new(etcd, directory.join(name), tasks, stop);
    Ok(Arc::new(remembering))
}

fn host_name() -> anyhow::Result<String> {
    let name = std::fs::read_to_string("/etc/hostname")
        .context("/etc/hostname; name the worker with --id")?;
    Ok(name.trim().to_owned())
}
