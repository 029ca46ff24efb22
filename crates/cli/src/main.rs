//! The one binary: every process and the operator's tool. Wiring only.

mod args;
mod bench;
mod chat;
mod config_check;
mod model;
mod openai_client;
mod operator;
mod operator_plan;
mod output;
mod processes;
mod serve;
mod settings;

use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser as _};

use args::{Cli, Command};
use settings::Misuse;

/// Exit status of a command that was refused or failed.
const REFUSED: u8 = 1;
/// Exit status of a command that was written wrongly (clap's own).
const MISUSED: u8 = 2;
/// How long a blocking task, such as reading weights, may hold the exit.
const BLOCKING_MAX: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    let cli = Cli::parse();
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
            ExitCode::from(if error.is::<Misuse>() {
                MISUSED
            } else {
                REFUSED
            })
        }
    }
}

async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(args) => serve::run(args).await?,
        Command::Router(args) => processes::router(args).await?,
        Command::Worker(args) => processes::worker(args).await?,
        Command::Status(args) => {
            if !operator::status(&args).await? {
                return Ok(ExitCode::from(REFUSED));
            }
        }
        Command::Workers(command) => operator::workers(command).await?,
        Command::Placement(command) => operator::placement(command).await?,
        Command::Chat(args) => chat::run(args).await?,
        Command::Bench(args) => bench::run(args).await?,
        Command::Model(command) => model::run(command)?,
        Command::Config(command) => config_check::run(command)?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tramontane", &mut script);
            output::fragment(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `tramontane ... | head` closes our output; that is no failure.
fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
