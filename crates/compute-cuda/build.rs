//! Lists the kernel sources for the crate to embed: `kernels/*.cu` in order of their names, and what stands before each. Compiles nothing.

use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=kernels");
    let root = std::env::var_os("CARGO_MANIFEST_DIR").ok_or("CARGO_MANIFEST_DIR is not set")?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let kernels = PathBuf::from(&root).join("kernels");
    let mut text = table("SOURCES", files(&kernels, "cu")?)?;
    let mut headers = files(&kernels, "cuh")?;
    // All others may use it.
    headers.sort_by_key(|path| !path.ends_with("ptx.cuh"));
    text.push_str(&table("HEADERS", headers)?);
    std::fs::write(out.join("sources.rs"), text)?;
    Ok(())
}

fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>, Box<dyn Error>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|other| other == extension) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn table(name: &str, files: Vec<PathBuf>) -> Result<String, Box<dyn Error>> {
    let mut table = format!("pub(crate) static {name}: &[Source] = &[\n");
    for path in files {
        let name = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .ok_or("name of a source")?;
        writeln!(
            table,
            "    Source {{ name: {name:?}, text: include_str!({path:?}) }},"
        )?;
    }
    table.push_str("];\n");
    Ok(table)
}
