//! `tramontane kernels build`: compiles every kernel with no GPU at hand, and says what each takes of one.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Subcommand;
use serde::Serialize;
use tramontane_compute_cuda::kernels::{BuildError, KernelBuilder, Module};
use tramontane_compute_cuda::{KernelCache, LibraryDirs, Target};
use tramontane_runtime::config::cache_dir;

use crate::exit::{Exit, refusal};
use crate::output::{self, Format};

/// `tramontane kernels ...`
#[derive(Debug, Subcommand)]
pub(crate) enum KernelsCommand {
    /// Compile all kernels into the cache and print what each takes of a device; needs NVRTC and no GPU
    Build {
        /// What to compile for, such as sm_90a; everything when absent
        #[arg(long = "target", value_parser = str::parse::<Target>)]
        targets: Vec<Target>,
        /// Directory of compiled kernels; the user's cache when absent
        #[arg(long, env = "TRAMONTANE_WORKER__KERNEL_CACHE")]
        cache: Option<PathBuf>,
        /// Directory of NVRTC, where it is not where the system looks
        #[arg(long, env = "TRAMONTANE_WORKER__CUDA_LIBRARIES")]
        libraries: Option<PathBuf>,
        /// How to print it
        #[arg(long, short, value_enum, default_value_t)]
        output: Format,
    },
}

/// What one kernel takes of a device of one target.
#[derive(Debug, Serialize)]
struct Line {
    kernel: String,
    target: &'static str,
    registers: u32,
    shared_bytes: u32,
    stack_bytes: u32,
}

/// Runs `kernels build`.
pub(crate) fn run(command: KernelsCommand) -> anyhow::Result<()> {
    let KernelsCommand::Build {
        targets,
        cache,
        libraries,
        output,
    } = command;
    build(targets, cache, libraries, output)
}

fn build(
    mut targets: Vec<Target>,
    cache: Option<PathBuf>,
    libraries: Option<PathBuf>,
    format: Format,
) -> anyhow::Result<()> {
    if targets.is_empty() {
        targets.extend(Target::ALL);
    }
    targets.sort();
    targets.dedup();
    let cache = cache
        .or_else(cache_dir)
        .context("no directory for compiled kernels: name one with --cache")?;
    let builder = KernelBuilder::new(
        &LibraryDirs { named: libraries },
        Some(KernelCache::new(cache.clone())),
    );
    if let Ok(nvrtc) = builder.nvrtc() {
        let (major, minor) = nvrtc.version();
        let path = nvrtc.path().display();
        output::note(&format!("NVRTC {major}.{minor} ({path})"));
    }
    let mut lines = Vec::new();
    let mut num_compiled = 0;
    for target in targets {
        for module in builder.build_all(target).map_err(advised)? {
            num_compiled += usize::from(!module.from_cache);
            lines.extend(lines_of(&module, target));
        }
    }
    output::note(&format!(
        "{num_compiled} modules compiled, the rest was there, all in {}",
        cache.display()
    ));
    if format.is_data() {
        return output::data(format, &lines);
    }
    let row = |line: &Line| {
        vec![
            line.kernel.clone(),
            line.target.to_owned(),
            line.registers.to_string(),
            line.shared_bytes.to_string(),
            line.stack_bytes.to_string(),
        ]
    };
    let rows: Vec<Vec<String>> = lines.iter().map(row).collect();
    let head = ["KERNEL", "TARGET", "REGISTERS", "SHARED", "STACK"];
    Ok(output::table(&head, &rows)?)
}

fn lines_of(module: &Module, target: Target) -> impl Iterator<Item = Line> {
    module.kernels.iter().map(move |(kernel, usage)| Line {
        kernel: kernel.clone(),
        target: target.name(),
        registers: usage.registers,
        shared_bytes: usage.shared_bytes,
        stack_bytes: usage.stack_bytes,
    })
}

fn advised(error: BuildError) -> anyhow::Error {
    let BuildError::NoCompiler { source, .. } = &error else {
        return anyhow::Error::new(error);
    };
    refusal(
        Exit::Failed,
        format!("{error}: {source}"),
        "pip install nvidia-cuda-nvrtc==13.0.88, then --libraries with its directory nvidia/cu13/lib",
    )
}
