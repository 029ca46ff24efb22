//! The one binary: every process and the operator's tool. Wiring only.

mod args;
mod bench;
mod certs;
mod chat;
mod config_check;
mod dial;
mod doors;
mod drill;
mod exit;
mod kernels;
mod keys;
mod model;
mod openai_client;
mod operator;
mod output;
mod processes;
mod serve;
mod settings;
mod supervisor;

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};

use args::{Cli, Command};
use exit::Exit;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// How long a blocking task, such as reading weights, may hold the exit.
const BLOCKING_MAX: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = Cli::parse();
    tramontane_runtime::tls::install_provider();
    if let Err(error) = allow_open_files() {
        output::note(&format!(
            "tramontane: the limit on open files stays as it is: {error}"
        ));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(cli.command));
            runtime.shutdown_timeout(BLOCKING_MAX);
            result
        }
        Err(error) => Err(anyhow::Error::new(error).context("starting the async runtime")),
    };
    match result {
        Ok(code) => code,
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::note(&format!("tramontane: {error:#}"));
            exit::of(&error).into()
        }
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => serve::run(args).await?,
        Command::Router(args) => Box::pin(processes::router(args)).await?,
        Command::Worker(args) => processes::worker(args).await?,
        Command::Status(args) => {
            if !operator::interruptible(operator::status(&args)).await? {
                return Ok(Exit::Unavailable.into());
            }
        }
        Command::Top(args) => operator::interruptible(operator::top(&args)).await?,
        Command::Workers(command) => operator::interruptible(operator::workers(command)).await?,
        Command::Placement(command) => {
            operator::interruptible(operator::placement(command)).await?;
        }
        Command::Weights(command) => operator::interruptible(operator::weights(command)).await?,
        Command::Events(args) => operator::interruptible(operator::events(&args)).await?,
        Command::Drill(args) => return drill::run(args).await,
        Command::Chat(args) => chat::run(args).await?,
        Command::Bench(args) => bench::run(args).await?,
        Command::Model(command) => model::run(command)?,
        Command::Kernels(command) => kernels::run(command)?,
        Command::Keys(command) => keys::run(command)?,
        Command::Certs(command) => certs::run(command)?,
        Command::Config(command) => config_check::run(command)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tramontane", &mut script);
            output::fragment(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Raises the limit on open files to what the system allows this process: a connection is one, and shells begin with 1024 for
/// the sake of programs that use `select`.
fn allow_open_files() -> rustix::io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return Ok(());
    }
    let current = limit.maximum;
    setrlimit(Resource::Nofile, Rlimit { current, ..limit })
}

/// `tramontane ... | head` closes our output; that is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
