//! `tramontane serve`: a router and N workers in one process, coordinated in memory.
//!
//! The same services as in a cluster, on loopback ports; nothing here computes or routes.

use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroUsize};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tramontane_coordination::planner::{Intent, set_intent};
use tramontane_coordination::{MemoryStore, Store};
use tramontane_grammar::Vocabulary;
use tramontane_model::Checkpoint;
use tramontane_router::RouterParts;
use tramontane_runtime::tls::{Link, Tls};
use tramontane_runtime::{Shutdown, telemetry};
use tramontane_worker::WorkerConfig;

use crate::args::ServeArgs;
use crate::doors::bind;
use crate::model::{open_model, open_tokenizer};
use crate::output;
use crate::processes::{choose_device, follow, router_doors};
use crate::settings::{self, Flags, Settings, misuse};
use crate::supervisor::{Supervisor, WorkerRecipe, share_of};

/// All workers are here when the process starts: the planner waits for no more.
const SETTLE_TIME: Duration = Duration::from_millis(50);
/// How often readiness is looked at while starting.
const READY_POLL: Duration = Duration::from_millis(20);

/// Runs everything until it is stopped.
pub(crate) async fn run(args: ServeArgs) -> anyhow::Result<()> {
    let (mut settings, has_weights) = load(&args)?;
    let tls = router_doors(&settings, &settings.etcd.cluster)?;
    let _telemetry = telemetry::start(&settings.telemetry, "tramontane").map_err(misuse)?;
    let (checkpoint, model_name) = open_model(&args.model)?;
    if !has_weights {
        settings.worker.weights = checkpoint.weight_format()?;
    }
    refuse_islands_and_parts(&settings.worker)?;
    let device = choose_device(&mut settings.worker, &checkpoint)?;
    if let Some(gpu) = device.gpu().filter(|_| args.workers > 1) {
        let (name, workers) = (&gpu.info().name, args.workers);
        // Steps whose experts are all one worker's go to the device whole.
        output::note(&format!(
            "{workers} workers share one {name}; with --workers 1 it computes whole steps, which is faster"
        ));
    }
    let (tokenizer, model) = open_tokenizer(&args.model, &checkpoint)?;
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let intent = Intent {
        replicas: NonZeroUsize::new(usize::from(args.replicas)),
        slices_per_expert: args.slices,
        ..Intent::default()
    };
    set_intent(&*store, &intent, None).await.map_err(misuse)?;
    let http = bind(&settings.listen.http).await?;
    let grpc = bind(&settings.listen.grpc).await?;
    let admin = bind(&settings.listen.admin).await?;
    let banner = Banner::new(
        &args,
        &model_name,
        &checkpoint,
        (&http, &grpc, &admin, &tls),
    )?;
    let signals = Shutdown::new();
    signals.trigger_on_signals().context("signal handlers")?;
    follow(&tls, &settings.tls, &signals);

    let named = (model_name, tramontane_router::vocabulary(&tokenizer)?);
    let recipe = recipe(&args, &settings.worker, &store, &checkpoint, named);
    let (mut services, scaler) = Supervisor::new(recipe);
    for index in 0..args.workers {
        services.start_worker(index).await?;
    }
    let parts = RouterParts {
        store,
        tokenizer,
        model,
        http,
        grpc,
        admin,
        tls,
        // They are in this process, and open to this machine only.
        workers: Link::default(),
        scaler: Some(scaler),
    };
    services.start_router(settings.router(), parts);
    let shown = async {
        let shown = banner.show_when_ready().await;
        if shown.is_ok() {
            std::future::pending::<()>().await;
        }
        shown
    };
    tokio::select! {
        () = signals.token.cancelled() => {}
        error = services.supervise() => return Err(error),
        shown = shown => shown?,
    }
    services.stop().await
}

/// What is for processes of their own.
fn refuse_islands_and_parts(config: &WorkerConfig) -> anyhow::Result<()> {
    if let Some(class) = &config.numeric_class {
        return Err(misuse(format!(
            "worker.numeric_class must be absent in one process with all workers, got {class}: they compute alike"
        )));
    }
    let got = config.island_ranks;
    if got == 1 {
        return Ok(());
    }
    Err(misuse(format!(
        "worker.island_ranks must be 1 in one process with all workers, got {got}: ranks are processes"
    )))
}

/// The settings, and whether anybody chose the weight format.
fn load(args: &ServeArgs) -> anyhow::Result<(Settings, bool)> {
    let mut flags = Flags::default();
    flags.set("telemetry", "log", args.process.log.clone());
    flags.set("tls", "insecure", args.process.insecure.then_some(true));
    let at = |host, port| Some(SocketAddr::new(host, port).to_string());
    flags.set("listen", "http", at(args.host, args.http_port));
    flags.set("listen", "grpc", at(args.host, args.grpc_port));
    flags.set("listen", "admin", at(args.admin_host, args.admin_port));
    flags.set("worker", "device", args.compute.device.clone());
    flags.set("worker", "weights", args.compute.weights.clone());
    flags.set("worker", "kv_format", args.compute.kv_format.clone());
    flags.set("worker", "drills", args.drills.then_some(true));
    flags.set("router", "min_workers", Some(i64::from(args.workers)));
    let settle = humantime::format_duration(SETTLE_TIME).to_string();
    flags.set("router", "settle_time", Some(settle));
    let loaded = settings::load(args.process.config.as_deref(), flags)?;
    let has_log = settings::is_given(&loaded, "telemetry.log");
    let has_weights = settings::is_given(&loaded, "worker.weights");
    let mut settings = loaded.value;
    // A person starts this and wants to see the banner, not the log.
    if !has_log {
        settings.telemetry.log = "warn".to_owned();
    }
    settings.router().validate().map_err(misuse)?;
    let (threads, workers) = divided(args);
    share_of(&settings.worker, threads, workers, 0)
        .validate()
        .map_err(|e| misuse(format!("worker.{e}")))?;
    Ok((settings, has_weights))
}

fn recipe(
    args: &ServeArgs,
    config: &WorkerConfig,
    store: &Arc<dyn Store>,
    checkpoint: &Arc<Checkpoint>,
    (model_name, vocabulary): (String, Vocabulary),
) -> WorkerRecipe {
    let (threads, workers) = divided(args);
    WorkerRecipe {
        config: config.clone(),
        threads,
        workers,
        store: Arc::clone(store),
        checkpoint: Arc::clone(checkpoint),
        model_name,
        vocabulary: Some(vocabulary),
        exchange: args.exchange,
        local: Arc::default(),
    }
}

/// Compute threads, and the workers that they are divided among.
fn divided(args: &ServeArgs) -> (usize, NonZeroU16) {
    let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let workers = NonZeroU16::new(args.workers).unwrap_or(NonZeroU16::MIN);
    (args.threads.unwrap_or(cores), workers)
}

/// Where to talk to the server, and how.
struct Banner {
    text: String,
    ready: String,
}

impl Banner {
    fn new(
        args: &ServeArgs,
        model: &str,
        checkpoint: &Checkpoint,
        (http, grpc, admin, tls): (&TcpListener, &TcpListener, &TcpListener, &Tls),
    ) -> anyhow::Result<Self> {
        let (grpc, admin) = (grpc.local_addr()?, admin.local_addr()?);
        let scheme = if tls.has_clients() { "https" } else { "http" };
        let http = format!("{scheme}://{}", http.local_addr()?);
        let g = checkpoint.geometry();
        let workers = match args.workers {
            1 => "1 worker".to_owned(),
            n => format!("{n} workers"),
        };
        let text = format!(
            "Tramontane serves {model} from {workers}: {} layers, {} experts, {} per token.\n\n  \
             OpenAI API  {http}/v1\n  gRPC API    {grpc}\n  admin API   {admin}\n\n\
             Ask it something:\n\n  \
             curl {http}/v1/chat/completions -H 'content-type: application/json' \\\n    \
             -d '{{\"messages\": [{{\"role\": \"user\", \"content\": \"What is the capital of Poland?\"}}]}}'\n\n\
             or talk to it: tramontane chat --url {http}   Ctrl-C ends.",
            g.num_layers, g.num_experts, g.top_k
        );
        Ok(Self {
            text,
            ready: format!("{http}/health/ready"),
        })
    }

    /// Shows it as soon as requests are answered.
    async fn show_when_ready(&self) -> anyhow::Result<()> {
        // It talks to itself: never through the proxy that the environment may name, and whatever names its certificate
        // has for others.
        let client = reqwest::Client::builder()
            .no_proxy()
            .tls_danger_accept_invalid_certs(true)
            .build()?;
        while !client
            .get(&self.ready)
            .send()
            .await
            .is_ok_and(|answer| answer.status().is_success())
        {
            tokio::time::sleep(READY_POLL).await;
        }
        // A closed standard output is no reason to stop serving.
        let _ = output::line(&self.text);
        Ok(())
    }
}
