//! The command line: nouns, verbs and flags. Parsing only.

mod compute;
mod placement;
mod process;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand};

use crate::bench::args::BenchArgs;
use crate::certs::CertsCommand;
use crate::drill::DrillArgs;
use crate::kernels::KernelsCommand;
use crate::keys::KeysCommand;
use crate::operator::WeightsCommand;
use crate::output::Format;

pub(crate) use compute::ComputeArgs;
pub(crate) use placement::ApplyArgs;
pub(crate) use process::{EtcdArgs, ModelArgs, ProcessArgs};

/// Serves Mixtral and the Mistral family from one machine or many.
#[derive(Debug, Parser)]
#[command(
    name = "tramontane",
    version,
    propagate_version = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The nouns and verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Router and workers in one process: everything on this machine, no etcd
    Serve(ServeArgs),
    /// Run a router: HTTP and gRPC for clients, requests to workers
    Router(RouterArgs),
    /// Run a worker: attention, experts or both
    Worker(WorkerArgs),
    /// Show whether the cluster serves, and why not
    Status(ReadArgs),
    /// Watch the cluster live: workers, load, placement, what happens
    Top(TopArgs),
    /// Look at and manage workers
    #[command(subcommand)]
    Workers(WorkersCommand),
    /// Look at and change which worker holds which expert
    #[command(subcommand)]
    Placement(PlacementCommand),
    /// Look at the versions of the weights, and say which one new requests begin with
    #[command(subcommand)]
    Weights(WeightsCommand),
    /// Show what happened in the cluster, as a router saw it
    Events(EventsArgs),
    /// Bring a fault upon a worker under load, and judge whether anything was lost
    Drill(DrillArgs),
    /// Talk to a model in the terminal, at any OpenAI-compatible endpoint
    Chat(ChatArgs),
    /// Measure an OpenAI-compatible endpoint under load
    Bench(BenchArgs),
    /// Look into a checkpoint
    #[command(subcommand)]
    Model(ModelCommand),
    /// Compile CUDA kernels, with or without a GPU
    #[command(subcommand)]
    Kernels(KernelsCommand),
    /// Make, list and revoke API keys
    #[command(subcommand)]
    Keys(KeysCommand),
    /// Make certificates, for those who have no authority
    #[command(subcommand)]
    Certs(CertsCommand),
    /// Check configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// `tramontane workers ...`
#[derive(Debug, Subcommand)]
pub(crate) enum WorkersCommand {
    /// List the workers
    List(ReadArgs),
    /// Show everything about one worker
    Describe {
        /// Id of the worker
        worker: String,
        #[command(flatten)]
        read: ReadArgs,
    },
    /// Give a worker no new sequences, and its experts to others; what it runs goes on
    Cordon {
        /// Id of the worker
        worker: String,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// End a cordon
    Uncordon {
        /// Id of the worker
        worker: String,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Let a worker finish what it runs, hand over its experts and leave
    Drain {
        /// Id of the worker
        worker: String,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Start or drain workers until there are so many (`tramontane serve`)
    Scale {
        /// Workers that there should be
        #[arg(value_parser = clap::value_parser!(u16).range(1..=64))]
        count: u16,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Change what a worker does while it runs: attention, experts or both
    SetRoles {
        /// Id of the worker
        worker: String,
        /// What it is to do, with a comma between two
        #[arg(value_delimiter = ',', required = true, value_parser = ["attention", "experts"])]
        roles: Vec<String>,
        /// Also when no other worker has a role that it gives up
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        change: ChangeArgs,
    },
    /// Take a worker that is gone out of the cluster's records
    Remove {
        /// Id of the worker
        worker: String,
        /// Also when it is alive and ready; it is out until it registers again
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        change: ChangeArgs,
    },
}

/// `tramontane placement ...`
#[derive(Debug, Subcommand)]
pub(crate) enum PlacementCommand {
    /// Show who holds which expert
    Show(ReadArgs),
    /// Say how experts should be placed
    Apply(ApplyArgs),
    /// Compare placements before anything moves: predicted time, bytes to load, safety
    Plan(PlanArgs),
    /// Have the planner plan again for load and speed now
    Rebalance(RebalanceArgs),
}

/// `tramontane top`
#[derive(Clone, Debug, Args)]
pub(crate) struct TopArgs {
    /// Show it once and end; so does an output that is no terminal
    #[arg(long)]
    pub(crate) once: bool,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
}

/// `tramontane events`
#[derive(Clone, Debug, Args)]
pub(crate) struct EventsArgs {
    /// Go on with what happens from now on
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Show the newest so many; a router keeps 1024
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub(crate) last: u32,
    #[command(flatten)]
    pub(crate) read: ReadArgs,
}

/// `tramontane placement plan`
#[derive(Clone, Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) read: ReadArgs,
    /// Workers that hold each slice; the intent's or the configuration's when absent
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) replicas: Option<u16>,
    /// Slices per expert (1 to 8); chosen by the planner when absent
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) slices: Option<u8>,
    /// Say which one the planner takes, and why
    #[arg(long)]
    pub(crate) explain: bool,
}

/// `tramontane placement rebalance`
#[derive(Clone, Debug, Args)]
pub(crate) struct RebalanceArgs {
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) router: RouterAddress,
}

/// `tramontane model ...`
#[derive(Debug, Subcommand)]
pub(crate) enum ModelCommand {
    /// Print what a checkpoint is: architecture, shapes, sizes
    Inspect {
        /// Directory with config.json and safetensors, or a GGUF file; the embedded demo model when absent
        dir: Option<PathBuf>,
        /// How to print it
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
    /// Read every byte of a checkpoint and check it
    Verify {
        /// Directory with config.json and safetensors, or a GGUF file; the embedded demo model when absent
        dir: Option<PathBuf>,
        /// Write tramontane.sha256, so that later loads notice any change
        #[arg(long)]
        write_manifest: bool,
    },
}

/// `tramontane config ...`
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print the effective configuration and where each value comes from
    Check {
        /// Configuration file (TOML)
        #[arg(long)]
        config: Option<PathBuf>,
        /// How to print it
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
}

/// Where a router listens for operators.
#[derive(Clone, Debug, Args)]
pub(crate) struct RouterAddress {
    /// Address of a router's admin port; https:// asks for TLS, without either a certificate decides
    #[arg(long, env = "TRAMONTANE_ROUTER", default_value = "127.0.0.1:8002")]
    pub(crate) router: String,
    /// API key of an operator, for routers that ask for one
    #[arg(long, env = "TRAMONTANE_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Configuration file (TOML) whose tls section names the operator's certificate
    #[arg(long)]
    pub(crate) config: Option<PathBuf>,
    /// CA of the cluster's certificates
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// The operator's certificate
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its key
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_key: Option<PathBuf>,
    /// Go to another machine in the clear, API key included
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// Flags of commands that read.
#[derive(Clone, Debug, Args)]
pub(crate) struct ReadArgs {
    #[command(flatten)]
    pub(crate) router: RouterAddress,
    /// How to print it
    #[arg(long, short, value_enum, default_value_t)]
    pub(crate) output: Format,
}

/// Flags of commands that change something.
#[derive(Clone, Debug, Args)]
pub(crate) struct ChangeArgs {
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Wait until the cluster shows the result
    #[arg(long)]
    pub(crate) wait: bool,
    /// Longest wait, such as 90s or 5m
    #[arg(long, default_value = "10m", value_parser = humantime::parse_duration)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) router: RouterAddress,
}

/// `tramontane serve`
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Workers in this process
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) workers: u16,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Compute threads of all workers together; all cores when absent
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) threads: Option<usize>,
    /// How workers reach each other's experts
    #[arg(long, value_enum, default_value_t)]
    pub(crate) exchange: ExchangeArg,
    /// Cut each expert into this many slices (1 to 8); chosen by the planner when absent
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub(crate) slices: Option<u8>,
    /// Workers that hold each slice
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(crate) replicas: u16,
    /// Let `tramontane drill` bring faults upon the workers
    #[arg(long)]
    pub(crate) drills: bool,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: IpAddr,
    /// Port of the OpenAI-compatible HTTP API (0: any free port)
    #[arg(long, default_value_t = 8000)]
    pub(crate) http_port: u16,
    /// Port of the gRPC API (0: any free port)
    #[arg(long, default_value_t = 8001)]
    pub(crate) grpc_port: u16,
    /// Address to listen on for operators
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) admin_host: IpAddr,
    /// Port of the operators' gRPC API (0: any free port)
    #[arg(long, default_value_t = 8002)]
    pub(crate) admin_port: u16,
}

/// How rows travel between the workers of one process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum ExchangeArg {
    /// Over gRPC on the loopback interface, as between machines
    #[default]
    Grpc,
    /// In memory
    Local,
}

/// `tramontane router`
#[derive(Debug, Args)]
pub(crate) struct RouterArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) etcd: EtcdArgs,
    /// Address to listen on
    #[arg(long)]
    pub(crate) host: Option<IpAddr>,
    /// Port of the OpenAI-compatible HTTP API
    #[arg(long)]
    pub(crate) http_port: Option<u16>,
    /// Port of the gRPC API
    #[arg(long)]
    pub(crate) grpc_port: Option<u16>,
    /// Address to listen on for operators; --host does not change it
    #[arg(long)]
    pub(crate) admin_host: Option<IpAddr>,
    /// Port of the operators' gRPC API
    #[arg(long)]
    pub(crate) admin_port: Option<u16>,
    /// Workers to wait for before the first placement
    #[arg(long)]
    pub(crate) min_workers: Option<usize>,
}

/// `tramontane worker`
#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    #[command(flatten)]
    pub(crate) etcd: EtcdArgs,
    /// Take the model from other workers of the cluster; files of --model that are the same are used where
    /// they are there
    #[arg(long, conflicts_with = "sliding_window")]
    pub(crate) model_from_peers: bool,
    /// Unique name of this worker; the host name when absent
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// What it does: attention, experts or both
    #[arg(long)]
    pub(crate) roles: Option<String>,
    #[command(flatten)]
    pub(crate) compute: ComputeArgs,
    /// Processes with a GPU each that are this worker together, 1 to 8
    #[arg(long)]
    pub(crate) island_ranks: Option<u32>,
    /// Which of them this one is; 0 leads
    #[arg(long)]
    pub(crate) island_rank: Option<u32>,
    /// gRPC address of rank 0, host:port, for the others
    #[arg(long)]
    pub(crate) island_leader: Option<String>,
    /// Numeric class of a group whose attention is of class A and whose experts are of class B: A+B, or A+B@N where the
    /// experts of the first N layers are of class A too
    #[arg(long)]
    pub(crate) numeric_class: Option<String>,
    /// Compute threads; all cores when absent
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) threads: Option<usize>,
    /// Memory for experts in bytes; half of the machine's when absent
    #[arg(long)]
    pub(crate) expert_memory: Option<u64>,
    /// Address to listen on
    #[arg(long)]
    pub(crate) host: Option<IpAddr>,
    /// gRPC port for routers and other workers
    #[arg(long)]
    pub(crate) grpc_port: Option<u16>,
    /// Port of health checks and metrics
    #[arg(long)]
    pub(crate) ops_port: Option<u16>,
    /// Address that others reach this worker at, host:port; what it listens on when absent
    #[arg(long)]
    pub(crate) advertise: Option<String>,
    /// Let `tramontane drill` bring faults upon this worker
    #[arg(long)]
    pub(crate) drills: bool,
}

/// How to come to an OpenAI endpoint, beside its address.
#[derive(Clone, Debug, Args)]
pub(crate) struct EndpointArgs {
    /// CA of the endpoint's certificate; the system's when absent
    #[arg(long, value_name = "FILE")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Model name; the endpoint's first when absent
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// API key of the endpoint, where it asks for one
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Send the API key to another machine in the clear
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// `tramontane chat`
#[derive(Clone, Debug, Args)]
pub(crate) struct ChatArgs {
    /// Say this, print the answer and end; a conversation when absent
    pub(crate) message: Option<String>,
    /// The endpoint
    #[arg(long, env = "OPENAI_BASE_URL", default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    #[command(flatten)]
    pub(crate) endpoint: EndpointArgs,
    /// System prompt
    #[arg(long)]
    pub(crate) system: Option<String>,
    /// Sampling temperature; 0 always says the same
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Longest answer in tokens
    #[arg(long)]
    pub(crate) max_tokens: Option<u32>,
}

#[cfg(test)]
mod tests {
    use clap::error::ErrorKind;

    use super::*;

    #[test]
    fn values_that_mean_nothing_are_refused_where_they_are_written() {
        let parse = |line: &str| {
            let words = std::iter::once("tramontane").chain(line.split(' '));
            Cli::try_parse_from(words).map_err(|e| e.kind())
        };
        for (line, kind) in [
            ("serve --model-name=", ErrorKind::InvalidValue),
            ("worker --model-name=", ErrorKind::InvalidValue),
            ("serve --threads 0", ErrorKind::ValueValidation),
            ("worker --threads 0", ErrorKind::ValueValidation),
            ("workers scale 0", ErrorKind::ValueValidation),
            ("workers scale 65", ErrorKind::ValueValidation),
            ("workers set-roles w", ErrorKind::MissingRequiredArgument),
            ("workers set-roles w cooking", ErrorKind::InvalidValue),
            (
                "worker --model-from-peers --sliding-window 8",
                ErrorKind::ArgumentConflict,
            ),
            ("workers drain w --timeout soon", ErrorKind::ValueValidation),
            ("placement apply", ErrorKind::MissingRequiredArgument),
            ("placement apply --slices 9", ErrorKind::ValueValidation),
            ("placement apply --replicas 0", ErrorKind::ValueValidation),
            ("events --last 0", ErrorKind::ValueValidation),
            ("weights use", ErrorKind::MissingRequiredArgument),
            ("weights use ", ErrorKind::InvalidValue),
        ] {
            assert_eq!(parse(line).unwrap_err(), kind, "{line}");
        }
        for line in [
            "serve --model-name a --threads 1",
            "worker --threads 64",
            "worker --model-from-peers --model some/where",
            "workers set-roles w attention,experts --wait --force",
            "workers scale 64 --wait --timeout 90s",
            "placement apply --replicas default",
            "placement apply --replicas 2 --slices 8 --dry-run",
            "weights use 268f --class cpu-q8 --wait --timeout 5m",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }
}
