//! The command line of `tramontane placement apply`. Parsing only.

use clap::Args;

use super::ChangeArgs;

/// `tramontane placement apply`
#[derive(Clone, Debug, Args)]
#[group(id = "wishes", required = true, multiple = true, args = ["replicas", "slices"])]
pub(crate) struct ApplyArgs {
    /// Workers that hold each slice, 1 to 64, or "default" for what the routers are configured with
    #[arg(long, value_parser = replicas_wish)]
    pub(crate) replicas: Option<u32>,
    /// Slices that each expert is cut into, 1 to 8, or "default"
    #[arg(long, value_parser = slices_wish)]
    pub(crate) slices: Option<u32>,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

fn replicas_wish(text: &str) -> Result<u32, String> {
    wish(text, 64)
}

fn slices_wish(text: &str) -> Result<u32, String> {
    wish(text, 8)
}

/// A number, or 0 for "default".
fn wish(text: &str, max: u32) -> Result<u32, String> {
    if text == "default" {
        return Ok(0);
    }
    let number = text.parse().ok().filter(|n| (1..=max).contains(n));
    number.ok_or_else(|| format!("expected 1 to {max} or \"default\""))
}
