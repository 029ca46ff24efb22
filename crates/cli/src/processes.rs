//! `tramontane router` and `tramontane worker`: one process each, coordinated by etcd.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use toml::Value;
use tramontane_coordination::{EtcdConfig, EtcdStore, RememberingStore, Store};
use tramontane_grammar::Vocabulary;
use tramontane_model::Checkpoint;
use tramontane_router::RouterParts;
use tramontane_runtime::{Shutdown, telemetry};
use tramontane_worker::device::{self, ChosenDevice};
use tramontane_worker::{
    ExchangeKind, PeerModel, ProcessKind, RankParts, WorkerConfig, WorkerParts, open_from_peers,
};

use crate::args::{EtcdArgs, ProcessArgs, RouterArgs, WorkerArgs};
use crate::model::{open_model, open_tokenizer, progress_bar, vocabulary_of};
use crate::settings::{self, EtcdSettings, Flags, ListenSettings, misuse};

/// How long tasks may take to end after the service itself has.
const FINISH_MAX: Duration = Duration::from_secs(10);

/// Runs a router until it is stopped.
pub(crate) async fn router(args: RouterArgs) -> anyhow::Result<()> {
    let mut flags = Flags::default();
    common_flags(&mut flags, &args.process, &args.etcd);
    let defaults = ListenSettings::default();
    flags.set(
        "listen",
        "http",
        listen(&defaults.http, args.host, args.http_port),
    );
    flags.set(
        "listen",
        "grpc",
        listen(&defaults.grpc, args.host, args.grpc_port),
    );
    flags.set("router", "min_workers", args.min_workers.map(|n| n as i64));
    let settings = settings::load(args.process.config.as_deref(), flags)?.value;
    settings.etcd.validate()?;
    settings.router.validate().map_err(misuse)?;
    let _telemetry = telemetry::start(&settings.telemetry, "tramontane-router").map_err(misuse)?;
    let (checkpoint, _) = open_model(&args.model)?;
    let (tokenizer, model) = open_tokenizer(&args.model, &checkpoint)?;
    drop(checkpoint);
    let shutdown = Shutdown::new();
    let store = store(&settings.etcd, &settings.router.id, &shutdown)?;
    let (http, grpc) = (
        bind(&settings.listen.http).await?,
        bind(&settings.listen.grpc).await?,
    );
    shutdown.trigger_on_signals().context("signal handlers")?;
    let parts = RouterParts {
        store,
        tokenizer,
        model,
        http,
        grpc,
        scaler: None,
    };
    tramontane_router::run(settings.router, parts, shutdown.clone()).await?;
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
    let mut config = settings.worker;
    config.cluster.clone_from(&settings.etcd.cluster);
    if config.id.is_empty() {
        config.id = host_name()?;
    }
    config
        .validate()
        .map_err(|e| misuse(format!("worker.{e}")))?;
    let _telemetry = telemetry::start(&settings.telemetry, "tramontane-worker").map_err(misuse)?;
    if config.island_rank > 0 {
        return rank(&args, config, has_weights, &settings.listen).await;
    }
    let shutdown = Shutdown::new();
    let store = store(&settings.etcd, &config.id, &shutdown)?;
    let opened = open_worker_model(&args, &config, &store, &shutdown).await?;
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
    listen: &ListenSettings,
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
    let shutdown = Shutdown::new();
    shutdown.trigger_on_signals().context("signal handlers")?;
    let parts = RankParts {
        checkpoint,
        ops: Some(bind(&listen.ops).await?),
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
    shutdown: &Shutdown,
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

/// Listens on `host:port`.
pub(crate) async fn bind(address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))
}

/// etcd, and the file beside it that remembers it for the process of this name.
fn store(
    settings: &EtcdSettings,
    process: &str,
    shutdown: &Shutdown,
) -> anyhow::Result<Arc<dyn Store>> {
    let config = EtcdConfig::new(settings.endpoints.clone(), &settings.cluster);
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
