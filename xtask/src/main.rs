//! The repository's own checks: what clippy cannot see. `cargo xtask tidy` prints every finding and fails on any.

mod tidy;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let command = std::env::args().nth(1);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    match command.as_deref() {
        Some("tidy") => match tidy::check(&root) {
            Ok(findings) if findings.is_empty() => ExitCode::SUCCESS,
            Ok(findings) => {
                say(&format!(
                    "{}\n{} findings",
                    findings.join("\n"),
                    findings.len()
                ));
                ExitCode::FAILURE
            }
            Err(error) => {
                say(&format!("tidy: {error:#}"));
                ExitCode::FAILURE
            }
        },
        _ => {
            say("usage: cargo xtask tidy");
            ExitCode::from(2)
        }
    }
}

#[expect(
    clippy::print_stderr,
    reason = "a tool for contributors, with nothing else to say it through"
)]
fn say(text: &str) {
    eprintln!("{text}");
}
