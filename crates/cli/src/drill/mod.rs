//! `tramontane drill`: a real fault under load, and a verdict. Every answer is compared with the same
//! answer without the fault; a fault that cannot be proved to have happened is no success.

mod cluster;
mod probe;
mod verdict;

use std::fmt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use tonic::{Code, Status};
use tramontane_proto::v1::admin_client::AdminClient;
use tramontane_proto::v1::{self, DrillKind};

use self::cluster::{Seen, Watch};
use self::probe::{Load, Probe};
use self::verdict::Verdict;
use crate::args::ReadArgs;
use crate::dial::{self, Proven, Public};
use crate::exit;
use crate::output;

/// Longest wait for an answer of the router.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Exit statuses beyond "done", "refused" and "misused".
const EXIT_REFUSED: u8 = 1;
const EXIT_MISUSED: u8 = 2;
const EXIT_NOT_FOUND: u8 = 3;
const EXIT_PRECONDITION: u8 = 4;
const EXIT_UNAVAILABLE: u8 = 5;
const EXIT_TIMEOUT: u8 = 124;

/// `tramontane drill`
#[derive(Clone, Debug, Args)]
pub(crate) struct DrillArgs {
    /// What goes wrong
    #[arg(value_enum)]
    pub(crate) kind: Kind,
    /// Id of the worker
    pub(crate) worker: String,
    /// How long, at most 60s; a killed worker stays dead
    #[arg(long = "for", default_value = "5s", value_parser = humantime::parse_duration)]
    pub(crate) duration: Duration,
    /// Requests in flight, half of them greedy and half seeded
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=128))]
    pub(crate) streams: u32,
    /// Of a partition: the workers that it cuts off, comma-separated; all when absent
    #[arg(long, value_delimiter = ',')]
    pub(crate) peers: Vec<String>,
    /// Of slow: added to each expert reply and each engine step, at most 5s
    #[arg(long, default_value = "50ms", value_parser = humantime::parse_duration)]
    pub(crate) delay: Duration,
    /// Longest wait until the cluster is well again, from the end of the fault
    #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    /// Go on although requests may fail
    #[arg(long)]
    pub(crate) yes: bool,
    /// Address of the router's public gRPC port, where the load goes; https:// asks for TLS
    #[arg(long, default_value = "127.0.0.1:8001")]
    pub(crate) grpc: String,
    /// CA of its certificate; that of --tls-ca when absent
    #[arg(long, value_name = "FILE")]
    pub(crate) grpc_ca: Option<PathBuf>,
    /// API key of the load, for routers that ask for one; the operator's when absent
    #[arg(
        long,
        env = "OPENAI_API_KEY",
        hide_env_values = true,
        value_name = "API_KEY"
    )]
    pub(crate) grpc_api_key: Option<String>,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// The worker dies at once, without a goodbye
    Kill,
    /// Its process stands still (SIGSTOP), then goes on
    Pause,
    /// Its expert replies and engine steps take longer
    Slow,
    /// Expert calls to and from its peers vanish
    Partition,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Slow => "slow",
            Self::Partition => "partition",
        }
    }
}

impl DrillArgs {
    fn request(&self) -> v1::DrillRequest {
        let millis = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        let kind = match self.kind {
            Kind::Kill => DrillKind::Kill,
            Kind::Pause => DrillKind::Pause,
            Kind::Slow => DrillKind::Slow,
            Kind::Partition => DrillKind::Partition,
        };
        v1::DrillRequest {
            kind: kind.into(),
            duration_ms: if self.kind == Kind::Kill {
                0
            } else {
                millis(self.duration)
            },
            delay_ms: if self.kind == Kind::Slow {
                millis(self.delay)
            } else {
                0
            },
            peers: self.peers.clone(),
        }
    }

    /// How long the fault itself lasts.
    fn fault_time(&self) -> Duration {
        if self.kind == Kind::Kill {
            return Duration::ZERO;
        }
        self.duration
    }
}

/// Why there is no verdict.
#[derive(Debug)]
struct NoVerdict {
    exit: u8,
    text: String,
}

impl NoVerdict {
    fn new(exit: u8, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { exit, text }
    }
}

impl fmt::Display for NoVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Status> for NoVerdict {
    fn from(status: Status) -> Self {
        let exit = match status.code() {
            Code::InvalidArgument => EXIT_MISUSED,
            Code::NotFound => EXIT_NOT_FOUND,
            Code::FailedPrecondition | Code::AlreadyExists => EXIT_PRECONDITION,
            Code::Unavailable => EXIT_UNAVAILABLE,
            Code::DeadlineExceeded => EXIT_TIMEOUT,
            _ => EXIT_REFUSED,
        };
        Self::new(exit, status.message())
    }
}

impl From<anyhow::Error> for NoVerdict {
    fn from(error: anyhow::Error) -> Self {
        Self::new(exit::of(&error) as u8, format!("{error:#}"))
    }
}

/// Runs the drill and prints the verdict.
pub(crate) async fn run(args: DrillArgs) -> anyhow::Result<ExitCode> {
    let verdict = match drill(&args).await {
        Ok(verdict) => verdict,
        Err(none) => {
            output::note(&format!("tramontane: {none}"));
            return Ok(ExitCode::from(none.exit));
        }
    };
    verdict.print(args.read.output)?;
    if verdict.passed {
        return Ok(ExitCode::SUCCESS);
    }
    let exit = if verdict.well_again_ms.is_none() {
        EXIT_TIMEOUT
    } else {
        EXIT_REFUSED
    };
    Ok(ExitCode::from(exit))
}

async fn drill(args: &DrillArgs) -> Result<Verdict, NoVerdict> {
    let (router, grpc_ca) = (&args.read.router, args.grpc_ca.as_ref());
    let mut admin = AdminClient::new(dial::admin(router, None).await?);
    let before = look_first(args, &mut admin).await?;
    let api_key = args.grpc_api_key.as_ref().or(router.api_key.as_ref());
    let public = dial::public(Public {
        url: &args.grpc,
        ca: grpc_ca.or(router.tls_ca.as_ref()).map(PathBuf::as_path),
        api_key: api_key.map(String::as_str),
        insecure: router.insecure,
    });
    let public = public.await?;
    let probe = Probe::new(public, args.streams).await?;

    output::note("reference: the same requests without a fault");
    let reference = probe.reference().await?;
    let mut load = Load::start(&probe, &reference);
    load.all_have_tokens().await?;
    let drill = Some(args.request());
    let worker_id = args.worker.clone();
    let injected_at = Instant::now();
    let begun = admin.drill_worker(v1::DrillWorkerRequest { worker_id, drill });
    if let Err(refused) = begun.await {
        load.stop().await;
        return Err(refused.into());
    }
    output::note(&format!("{} of {} begins", args.kind.name(), args.worker));
    let mut watch = Watch::new(args, before, injected_at);
    watch.until_well(&mut admin).await;
    let during = load.stop().await;
    output::note("the same requests once more");
    let after = probe.once(&reference).await;
    Ok(Verdict::new(args, &reference, &watch, &during, &after))
}

/// Whether there is anything to learn from a drill now.
async fn look_first(args: &DrillArgs, admin: &mut AdminClient<Proven>) -> Result<Seen, NoVerdict> {
    let worker = &args.worker;
    let seen = cluster::look(admin, worker).await?;
    if seen.worker.is_none() {
        let text = format!("no worker is called {worker:?}; see `tramontane workers list`");
        return Err(NoVerdict::new(EXIT_NOT_FOUND, text));
    }
    if !seen.status.ready {
        let reason = &seen.status.reason;
        let text = format!("the cluster does not serve: {reason}; see `tramontane status`");
        return Err(NoVerdict::new(EXIT_UNAVAILABLE, text));
    }
    let report = cluster::report(admin, worker).await?;
    if !report.allowed {
        let text = format!(
            "drills are off on worker {worker}: start it with --drills, `worker.drills = true` or \
             TRAMONTANE_WORKER__DRILLS=true"
        );
        return Err(NoVerdict::new(EXIT_PRECONDITION, text));
    }
    if args.kind == Kind::Kill && !seen.status.survives_one_loss && !args.yes {
        let text = format!(
            "the cluster does not survive the loss of one worker: requests will wait or fail when \
             {worker} dies; add replicas (see `tramontane status`), or go on with --yes"
        );
        return Err(NoVerdict::new(EXIT_PRECONDITION, text));
    }
    Ok(Seen {
        report: Some(report),
        ..seen
    })
}
