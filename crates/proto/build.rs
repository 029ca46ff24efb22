//! Compiles /proto with protox: no protoc needs to be installed.

use std::path::{Path, PathBuf};

use prost::Message as _;

const FILES: [&str; 7] = [
    "inference/open_inference.proto",
    "tramontane/v1/expert.proto",
    "tramontane/v1/island.proto",
    "tramontane/v1/worker.proto",
    "tramontane/v1/inference.proto",
    "tramontane/v1/admin.proto",
    "tramontane/v1/weights.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../proto");
    println!("cargo:rerun-if-changed={}", root.display());
    let descriptors = protox::compile(FILES, [&root])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".tramontane.v1.ExpertCall.rows")
        .bytes(".tramontane.v1.ExpertReply.outputs")
        .bytes(".tramontane.v1.WeightsChunk.data")
        .bytes(".tramontane.v1.RankAnswer.outputs")
        .compile_fds(descriptors)?;
    Ok(())
}
