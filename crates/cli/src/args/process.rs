//! What the commands that run services have in common: the model, the settings, etcd.

use std::path::PathBuf;

use clap::Args;

/// Which model, and in which form.
#[derive(Clone, Debug, Args)]
pub(crate) struct ModelArgs {
    /// Directory with config.json, safetensors and tokenizer, or a GGUF file (of a split one the first);
    /// the embedded demo model when absent
    #[arg(long)]
    pub(crate) model: Option<PathBuf>,
    /// Name that clients use; the directory's or file's name when absent
    #[arg(long, value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) model_name: Option<String>,
    /// Keys a query sees, itself included; overrides config.json (0: all of them)
    #[arg(long)]
    pub(crate) sliding_window: Option<usize>,
}

/// How a process is told what to be, beyond its own flags.
#[derive(Clone, Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Configuration file (TOML); environment and flags win over it
    #[arg(long)]
    pub(crate) config: Option<PathBuf>,
    /// Log filter, such as "info,tramontane_engine=debug"
    #[arg(long)]
    pub(crate) log: Option<String>,
    /// Open ports beyond this machine in the clear where there is no certificate
    #[arg(long)]
    pub(crate) insecure: bool,
}

/// Where etcd is.
#[derive(Clone, Debug, Args)]
pub(crate) struct EtcdArgs {
    /// etcd endpoints, comma-separated
    #[arg(long, value_delimiter = ',')]
    pub(crate) etcd: Option<Vec<String>>,
    /// Name of the cluster: processes of one name work together
    #[arg(long)]
    pub(crate) cluster: Option<String>,
}
