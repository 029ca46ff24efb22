//! The devices that tests run on: emulated ones, and the first GPU if there is one. Runs no test.
#![expect(clippy::unwrap_used, reason = "a test may panic, its functions too")]

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use tramontane_compute_cuda::device::Device;
use tramontane_compute_cuda::emulator::Emulator;
use tramontane_compute_cuda::{CudaConfig, KernelCache, LibraryDirs, Target, open};

/// With it, tests are for the GPU alone, and one must be there: `tests/gpu/run.sh` sets it.
pub(crate) const REQUIRE_GPU: &str = "TRAMONTANE_TEST_REQUIRE_GPU";

/// The devices of this machine: the emulator as two kinds, and the first GPU if there is one.
pub(crate) fn devices() -> Vec<Arc<dyn Device>> {
    let is_required = variable(REQUIRE_GPU).is_some();
    let mut devices: Vec<Arc<dyn Device>> = match is_required {
        true => vec![],
        // Hopper has the products by wgmma.
        false => [Target::Sm80, Target::Sm90a].map(emulator).to_vec(),
    };
    match gpu() {
        Ok(gpu) => devices.push(gpu),
        Err(error) => {
            assert!(!is_required, "{error}");
            println!("skipped on a GPU: {error}");
        }
    }
    devices
}

pub(crate) fn emulator(target: Target) -> Arc<dyn Device> {
    Emulator::new(&work_dir().join("emulator"), target).unwrap()
}

/// Where tests keep what they compile.
pub(crate) fn work_dir() -> PathBuf {
    let dir = variable("TRAMONTANE_TEST_DIR").map(PathBuf::from);
    dir.unwrap_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")))
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests are told by make what is installed"
)]
pub(crate) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The first GPU, opened once for all tests.
pub(crate) fn gpu() -> Result<Arc<dyn Device>, String> {
    static GPU: OnceLock<Result<Arc<dyn Device>, String>> = OnceLock::new();
    let open_it = || {
        let config = CudaConfig {
            libraries: LibraryDirs {
                named: variable("TRAMONTANE_TEST_CUDA_LIBRARIES").map(PathBuf::from),
            },
            cache: Some(KernelCache::new(work_dir().join("kernels"))),
        };
        open(0, &config).map_err(|error| error.to_string())
    };
    GPU.get_or_init(open_it).clone()
}
