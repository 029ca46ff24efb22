//! The command line of `tramontane bench`. Parsing only.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand};
use tramontane_compute::WeightFormat;
use tramontane_compute_cuda::DeviceChoice;

use crate::args::EndpointArgs;
use crate::output::Format;

/// `tramontane bench model`
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchModelArgs {
    /// Shape of the model; its weights are random
    #[arg(long, value_enum)]
    pub(crate) random: RandomShape,
    /// How weights are kept: bf16, e4m3 or q4
    #[arg(long, default_value_t = WeightFormat::Bf16, value_parser = str::parse::<WeightFormat>)]
    pub(crate) weights: WeightFormat,
    /// The GPU
    #[arg(long, default_value_t = DeviceChoice::Cuda(0), value_parser = str::parse::<DeviceChoice>)]
    pub(crate) device: DeviceChoice,
    /// Layers, for devices that have no room for all; those of the model when absent
    #[arg(long, value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) layers: Option<usize>,
    /// Sequences that are decoded at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 32, 64, 128, 256], value_parser = RangedU64ValueParser::<usize>::new().range(1..=4096))]
    pub(crate) batch: Vec<usize>,
    /// Tokens that each of them has already
    #[arg(long, default_value_t = 128, value_parser = RangedU64ValueParser::<usize>::new().range(1..=1_000_000))]
    pub(crate) context: usize,
    /// Lengths of prompts
    #[arg(long, value_delimiter = ',', default_values_t = [512, 4096], value_parser = RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    pub(crate) prefill: Vec<usize>,
    /// What comes back of each sequence
    #[arg(long, value_enum, default_value_t = BenchSampling::Greedy)]
    pub(crate) sampling: BenchSampling,
    /// Directory of compiled kernels; the user's cache when absent
    #[arg(long, env = "TRAMONTANE_WORKER__KERNEL_CACHE")]
    pub(crate) cache: Option<PathBuf>,
    /// Directory of NVRTC, where it is not where the system looks
    #[arg(long, env = "TRAMONTANE_WORKER__CUDA_LIBRARIES")]
    pub(crate) libraries: Option<PathBuf>,
    /// How to print it
    #[arg(long, short, value_enum, default_value_t)]
    pub(crate) output: Format,
}

/// Published shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum RandomShape {
    /// 47 B weights, 13 B per token
    #[value(name = "mixtral-8x7b")]
    Mixtral8x7b,
    /// 141 B weights, 39 B per token
    #[value(name = "mixtral-8x22b")]
    Mixtral8x22b,
    /// 7 B weights
    #[value(name = "mistral-7b")]
    Mistral7b,
}

/// What a step gives of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum BenchSampling {
    /// The best token
    Greedy,
    /// A token drawn at temperature 1
    Drawn,
    /// All logits, for the host to sample from; that is not timed
    Host,
}

/// What else can be measured.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure a GPU with a model of full size and random weights, without a server
    Model(BenchModelArgs),
}

/// `tramontane bench`
#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    pub(crate) command: Option<BenchCommand>,
    /// The endpoint
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    pub(crate) url: String,
    #[command(flatten)]
    pub(crate) endpoint: EndpointArgs,
    /// Requests in flight
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) concurrency: u32,
    /// Requests in all
    #[arg(long, default_value_t = 32)]
    pub(crate) requests: u64,
    /// Tokens of each prompt
    #[arg(long, default_value_t = 128)]
    pub(crate) prompt_tokens: u32,
    /// Tokens of each answer
    #[arg(long, default_value_t = 64)]
    pub(crate) max_tokens: u32,
    /// Prompts are drawn from token ids 3 to this
    #[arg(long, default_value_t = 4096)]
    pub(crate) vocab: u32,
    /// Seed of the prompts
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
    /// How to print it
    #[arg(long, short, value_enum, default_value_t)]
    pub(crate) output: Format,
}
