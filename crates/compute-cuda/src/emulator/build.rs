//! Compiles the kernels for the host with g++, as `emulator/ABI.md` says. Knows nothing of what they do.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use sha2::{Digest as _, Sha256};

use crate::cache::hex;
use crate::kernels::{HEADERS, Source, sources};

/// As `emulator/Makefile` has them. No contraction: a product and a sum are two roundings, unless the source says `fmaf`.
const FLAGS: [&str; 5] = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
];
/// The shim.
const SHIM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/emulator");
/// Compilers that run at once.
const JOBS: usize = 2;

/// The library in `dir`, compiled when it is not there.
pub(super) fn library(dir: &Path) -> io::Result<PathBuf> {
    /// Tests of one process compile one after the other.
    static TURN: parking_lot::Mutex<()> = parking_lot::Mutex::new(());
    let _turn = TURN.lock();
    fs::create_dir_all(dir)?;
    let shim = shim_files()?;
    let mut units = Vec::new();
    for source in sources() {
        units.push((source.name.to_owned(), unit(source)));
    }
    for (path, text) in &shim {
        if path.extension().is_some_and(|e| e == "cpp") {
            let stem = path.file_stem().and_then(|s| s.to_str()).unwrap_or("shim");
            units.push((format!("shim-{stem}"), text.clone()));
        }
    }
    let mut common = Sha256::new();
    for flag in FLAGS {
        common.update(flag);
    }
    for (path, text) in &shim {
        if path.extension().is_some_and(|e| e == "h") {
            common.update(text);
        }
    }
    // The shim includes them, but for `ptx.cuh`, of which it has its own version.
    for header in HEADERS {
        common.update(header.text);
    }
    let common = common.finalize();
    let mut all = Sha256::new();
    let mut objects = Vec::new();
    for (name, text) in units {
        let mut hash = Sha256::new();
        hash.update(common);
        hash.update(&text);
        let hash = hex(&hash.finalize()[..8]);
        all.update(&hash);
        objects.push(Object {
            path: dir.join(format!("{name}-{hash}.o")),
            text,
        });
    }
    let library = dir.join(format!("libemulator-{}.so", hex(&all.finalize()[..8])));
    if library.exists() {
        return Ok(library);
    }
    compile(&objects)?;
    let mut link = Command::new("g++");
    link.arg("-shared").args(objects.iter().map(|o| &o.path));
    run_to(link, &library)?;
    Ok(library)
}

struct Object {
    path: PathBuf,
    text: String,
}

fn compile(objects: &[Object]) -> io::Result<()> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Ok(())));
    std::thread::scope(|scope| {
        for _ in 0..JOBS {
            scope.spawn(|| {
                while let Some(object) = objects.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = compile_one(object)
                        && let Ok(mut failed) = failed.lock()
                    {
                        *failed = Err(error);
                    }
                }
            });
        }
    });
    failed
        .into_inner()
        .unwrap_or_else(|_| Err(io::Error::other("a compiling thread panicked")))
}

fn compile_one(object: &Object) -> io::Result<()> {
    if object.path.exists() {
        return Ok(());
    }
    let source = object
        .path
        .with_extension(format!("{}.cpp", std::process::id()));
    fs::write(&source, &object.text)?;
    let mut command = Command::new("g++");
    command
        .args(FLAGS)
        .arg("-I")
        .arg(SHIM)
        .arg("-c")
        .arg(&source);
    let done = run_to(command, &object.path);
    fs::remove_file(&source)?;
    done
}

/// Runs a compiler whose output is renamed to `out` when it is whole: tests of several processes share the directory.
fn run_to(mut command: Command, out: &Path) -> io::Result<()> {
    let temporary = out.with_extension(format!("{}.part", std::process::id()));
    let output = command.arg("-o").arg(&temporary).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(io::Error::other(said));
    }
    fs::rename(temporary, out)
}

fn shim_files() -> io::Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(SHIM)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "h" || e == "cpp") {
            let text = fs::read_to_string(&path)?;
            files.push((path, text));
        }
    }
    files.sort();
    Ok(files)
}

/// A source as g++ reads it.
fn unit(source: &Source) -> String {
    let mut text = String::from("#include \"emulator.h\"\n");
    let _ = writeln!(text, "#line 1 \"{}.cu\"\n{}", source.name, source.text);
    for Definition { name, cluster } in definitions(source.text) {
        let _ = writeln!(text, "TR_EMULATOR_REGISTER({name}, {cluster})");
    }
    text
}

/// A kernel that a source defines.
struct Definition<'a> {
    name: &'a str,
    /// Blocks of a cluster: a number of the source. What else it may say does not compile.
    cluster: &'a str,
}

/// The kernels that a source defines: `extern "C" __global__ ... tr_name(`, those of clusters with
/// `__cluster_dims__(1, NUMBER, 1)` before the name.
fn definitions(text: &str) -> Vec<Definition<'_>> {
    let definitions = text.split("extern \"C\" __global__").skip(1);
    definitions
        .filter_map(|definition| {
            let begin = definition.find("tr_")?;
            let len = definition[begin..].find('(')?;
            Some(Definition {
                name: definition[begin..begin + len].trim(),
                cluster: cluster(&definition[..begin]),
            })
        })
        .collect()
}

/// The blocks of a cluster, of what stands before a kernel's name.
fn cluster(head: &str) -> &str {
    let Some((_, dims)) = head.split_once("__cluster_dims__") else {
        return "1";
    };
    let number = dims
        .strip_prefix("(1, ")
        .and_then(|rest| rest.split_once(", 1)"))
        .map(|(number, _)| number)
        .filter(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()));
    number.unwrap_or("cluster_that_is_not_1_NUMBER_1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_by_their_definitions() {
        let text = "extern \"C\" __global__ void __launch_bounds__(128)\n    tr_a_bf16(int x) { tr_b(x); }\n\
                    __device__ void tr_c();\n\
                    extern \"C\" __global__ void __cluster_dims__(1, 2, 1) __launch_bounds__(384) tr_d(Args a) {}\n\
                    extern \"C\" __global__ void __cluster_dims__(2, 1, 1) tr_e(Args args) {}";
        let found = definitions(text).into_iter().map(|d| (d.name, d.cluster));
        let expected = [
            ("tr_a_bf16", "1"),
            ("tr_d", "2"),
            ("tr_e", "cluster_that_is_not_1_NUMBER_1"),
        ];
        assert_eq!(found.collect::<Vec<_>>(), expected);
    }
}
