//! Standing still: a small process is started that outlives the stop and ends it. Never stops before that
//! process has said that it is there.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::park_timeout;
use std::time::{Duration, Instant};

use rustix::process::{Signal, getpid, kill_process};

/// Says that it is there, waits to be told to begin, and continues the process `$2` after `$1` seconds.
/// When nobody tells it, because the worker has ended, it ends too.
const SCRIPT: &str = "echo ready; read -r go || exit 1; sleep \"$1\"; kill -CONT \"$2\"";
/// What it says.
const READY: &str = "ready\n";
/// How often a process that should stand still looks at the clock.
const TICK: Duration = Duration::from_millis(1);

/// The process that ends the pause.
#[derive(Debug)]
pub(super) struct Helper {
    child: Child,
    begin: ChildStdin,
}

impl Helper {
    /// Starts it and hears from it. Blocks.
    pub(super) fn start(duration: Duration) -> io::Result<Self> {
        let (seconds, pid) = (duration.as_secs_f64(), getpid().as_raw_nonzero());
        let mut child = Command::new("sh")
            .args(["-c", SCRIPT, "tramontane-drill"])
            .args([format!("{seconds:.3}"), pid.to_string()])
            // A signal to the worker's process group must not reach it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(begin), Some(said)) = (stdin, stdout) else {
            return Err(io::Error::other("the helper has no pipes"));
        };
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        if line != READY {
            return Err(io::Error::other(format!(
                "sh said {line:?}, expected {READY:?}"
            )));
        }
        Ok(Self { child, begin })
    }

    /// Stops this process. Blocks until it goes on; says how long it stood still: the longest time in which
    /// this thread did not see the clock.
    pub(super) fn stop_this_process(mut self) -> io::Result<Duration> {
        self.begin.write_all(b"go\n")?;
        let (mut seen, mut longest) = (Instant::now(), Duration::ZERO);
        signal_self(Signal::STOP)?;
        loop {
            let now = Instant::now();
            longest = longest.max(now - seen);
            seen = now;
            if let Some(status) = self.child.try_wait()? {
                let failed = || io::Error::other(format!("the helper ended with {status}"));
                return if status.success() {
                    Ok(longest)
                } else {
                    Err(failed())
                };
            }
            // The stop reaches all threads a moment after the call.
            park_timeout(TICK);
        }
    }
}

/// Sends a signal to this process.
pub(super) fn signal_self(signal: Signal) -> io::Result<()> {
    Ok(kill_process(getpid(), signal)?)
}
