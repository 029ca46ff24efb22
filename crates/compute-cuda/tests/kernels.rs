//! Every kernel compiles for every target, and its machine code is what was meant. Needs NVRTC and no GPU.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test may panic and say what it skips, its functions too"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use tramontane_compute_cuda::kernels::{KernelBuilder, Module, sources};
use tramontane_compute_cuda::nccl::{Nccl, UNIQUE_ID_BYTES};
use tramontane_compute_cuda::{KernelCache, LibraryDirs, Target};

/// Where NVRTC is; `make test` sets it, and then its absence is a failure.
const LIBRARIES: &str = "TRAMONTANE_TEST_CUDA_LIBRARIES";
/// Registers of a thread that the architecture has.
const REGISTERS_MAX: u32 = 255;
/// Shared memory that a block has without asking.
const SHARED_BYTES_MAX: u32 = 48 << 10;

/// The directories of a test, and whether somebody promised that the libraries are there.
#[expect(
    clippy::disallowed_methods,
    reason = "tests are told by make what is installed"
)]
fn dirs() -> (LibraryDirs, bool) {
    let named = std::env::var(LIBRARIES).ok().map(PathBuf::from);
    let is_promised = named.is_some();
    (LibraryDirs { named }, is_promised)
}

/// The compiler with a cache that stays below the target folder: `cargo test` compiles what has changed.
fn builder() -> Option<KernelBuilder> {
    let (dirs, is_promised) = dirs();
    #[expect(
        clippy::disallowed_methods,
        reason = "tests/gpu/run.sh keeps everything in one place"
    )]
    let named = std::env::var("TRAMONTANE_TEST_DIR").ok();
    let dir = named.map_or(PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    let cache = dir.join("kernels");
    let builder = KernelBuilder::new(&dirs, Some(KernelCache::new(cache)));
    if let Err(missing) = builder.nvrtc() {
        assert!(!is_promised, "{missing}");
        println!("skipped: {missing}");
        return None;
    }
    Some(builder)
}

/// The modules of every target.
type Built = Vec<(Target, Vec<Module>)>;

/// All modules of all targets, compiled once for all tests; `None` without a compiler.
fn all_modules() -> Option<&'static [(Target, Vec<Module>)]> {
    static ALL: OnceLock<Option<Built>> = OnceLock::new();
    ALL.get_or_init(|| Some(build_all(&builder()?))).as_deref()
}

fn build_all(builder: &KernelBuilder) -> Built {
    let build = |target| {
        let modules = builder.build_all(target).unwrap_or_else(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            panic!("{error}: {}", cause.unwrap_or_default())
        });
        (target, modules)
    };
    Target::ALL.into_iter().map(build).collect()
}

#[test]
fn every_kernel_compiles_for_every_target_without_a_stack() {
    let Some(all) = all_modules() else { return };
    let names = |modules: &[Module]| -> Vec<String> {
        let mut names: Vec<String> = modules
            .iter()
            .flat_map(|module| module.kernels.keys().cloned())
            .collect();
        names.sort();
        names
    };
    for (target, modules) in all {
        assert_eq!(modules.len(), sources().len());
        for module in modules {
            for (kernel, usage) in &module.kernels {
                let what = format!("{kernel} for {target}: {usage:?}");
                assert!(kernel.starts_with("tr_"), "{what}");
                assert!(usage.stack_bytes <= stack_bytes_of(kernel), "{what}");
                assert!((1..=REGISTERS_MAX).contains(&usage.registers), "{what}");
                assert!(usage.shared_bytes <= SHARED_BYTES_MAX, "{what}");
            }
        }
        let mut distinct = names(modules);
        distinct.dedup();
        assert_eq!(distinct, names(modules), "{target}: a name twice");
    }
    // Every kernel that is written is there, but for what a target cannot do: e4m3 before sm_89, wgmma but on Hopper.
    let mut written: Vec<String> = sources().iter().flat_map(|s| written_in(s.text)).collect();
    written.sort();
    for (target, modules) in all {
        let can = |name: &&String| {
            (*target != Target::Sm80 || !name.contains("e4m3"))
                && (*target == Target::Sm90a || !is_wgmma(name))
        };
        let expected: Vec<&String> = written.iter().filter(can).collect();
        assert!(names(modules).iter().eq(expected), "{target}");
    }
}

/// Whether a kernel multiplies with warp groups, which only Hopper does.
fn is_wgmma(kernel: &str) -> bool {
    kernel.contains("_wg_") || kernel.contains("_cl_")
}

/// Whether a kernel computes the weights by which tokens are drawn.
fn draws(kernel: &str) -> bool {
    ["tr_group_sums", "tr_draw"].contains(&kernel)
}

/// Products of many tokens keep the first half of a sum in the thread's own memory on purpose (`Halves` in `tree.cuh`).
fn keeps_halves(kernel: &str) -> bool {
    let is_down_of_64 = kernel.starts_with("tr_down") && kernel.ends_with("_n64");
    let is_tree_of_128 = !kernel.starts_with("tr_gate_up") && kernel.ends_with("_n128");
    is_wgmma(kernel) && (is_tree_of_128 || is_down_of_64)
}

/// Two times the 64 sums of a thread.
const HALVES_BYTES: u32 = 512;

/// What a wide tile of so many dims has summed of earlier chunks, for two strips of a warp (`WideTotals` in
/// `attention_wide.cu`). A byte more is something that did not fit the registers.
fn totals_bytes(kernel: &str) -> Option<u32> {
    let format_and_dims = kernel.strip_prefix("tr_attend_wide_")?;
    let (_, dims) = format_and_dims.split_once('_')?;
    Some(4 * dims.parse::<u32>().ok()? + 32)
}

fn reads_weights(kernel: &str) -> bool {
    let products = ["tr_linear_", "tr_gate_up_", "tr_down_"];
    products.iter().any(|product| kernel.starts_with(product))
}

/// Own memory that a thread of a kernel has on purpose.
fn stack_bytes_of(kernel: &str) -> u32 {
    let halves = if keeps_halves(kernel) {
        HALVES_BYTES
    } else {
        0
    };
    totals_bytes(kernel).unwrap_or(halves)
}

/// Names of the kernels that a source defines.
fn written_in(text: &str) -> Vec<String> {
    let definitions = text.split("extern \"C\" __global__").skip(1);
    let name = |definition: &str| {
        let begin = definition.find("tr_").unwrap();
        let len = definition[begin..].find('(').unwrap();
        definition[begin..begin + len].trim().to_owned()
    };
    definitions.map(name).collect()
}

/// Finds a wheel's program beside its libraries: `nvidia/cu13/bin` beside `nvidia/cu13/lib`.
fn disassembler(name: &str) -> Option<PathBuf> {
    let (dirs, is_promised) = dirs();
    let program = dirs.named?.parent()?.join("bin").join(name);
    if program.is_file() {
        return Some(program);
    }
    assert!(!is_promised, "{} is missing", program.display());
    None
}

/// Machine code of every kernel of a module: `(name, text)`.
fn machine_code(program: &Path, module: &Module, target: Target) -> Vec<(String, String)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(format!("{}-{target}.cubin", module.name));
    std::fs::write(&path, &module.cubin).unwrap();
    let output = Command::new(program).arg("-c").arg(&path).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let sections = text.split(".section\t.text.").skip(1);
    let sections = sections.map(|section| {
        let (name, code) = section.split_once(',').unwrap();
        (name.to_owned(), code.to_owned())
    });
    sections.collect()
}

#[test]
fn the_machine_code_is_what_was_meant() {
    let Some(all) = all_modules() else { return };
    let Some(program) = disassembler("nvdisasm") else {
        println!("skipped: nvdisasm is not installed");
        return;
    };
    let mut tensor_kernels = 0;
    for (target, modules) in all {
        for module in modules.iter().filter(|m| !m.kernels.is_empty()) {
            let code = machine_code(&program, module, *target);
            assert_eq!(code.len(), module.kernels.len(), "{}", module.name);
            for (kernel, text) in code {
                // Loads and stores of local memory: what did not fit the registers.
                let spills = ["LDL", "STL"].into_iter();
                for spilled in spills.filter(|_| stack_bytes_of(&kernel) == 0) {
                    let is_there = text
                        .split_whitespace()
                        .any(|word| word == spilled || word.starts_with(&format!("{spilled}.")));
                    assert!(!is_there, "{kernel} for {target} has {spilled}");
                }
                // What `griddepcontrol.wait` becomes: see `grid_wait` in `ptx.cuh`. The emulator would not notice.
                let waits = text.contains("ACQBULK");
                let overlaps = target.overlaps_kernels();
                assert_eq!(
                    waits, overlaps,
                    "{kernel} for {target}: waits for the kernel in front"
                );
                // Read-only loads may go ahead of the wait for all that a compiler knows; only of weights that is right.
                let before = text.split_once("ACQBULK").map_or("", |(before, _)| before);
                assert!(
                    reads_weights(&kernel) || !before.contains(".CONSTANT"),
                    "{kernel} for {target} reads before it waits"
                );
                // The host rounds products and sums apart. The emulator's compiler is told to.
                if draws(&kernel) {
                    let [has_product, is_fused] = ["DMUL", "DFMA"].map(|word| text.contains(word));
                    assert!(has_product && !is_fused, "{kernel} for {target}");
                }
                let is_wgmma = is_wgmma(&kernel);
                // Of 16-bit and of 8-bit numbers.
                let has_wgmma = text.contains("HGMMA") || text.contains("QGMMA");
                assert_eq!(has_wgmma, is_wgmma, "{kernel} for {target}");
                tensor_kernels += usize::from(text.contains("HMMA") || is_wgmma);
            }
        }
    }
    assert!(tensor_kernels > 0 || sources().is_empty());
}

#[test]
fn registers_are_what_the_toolkit_says() {
    let Some(all) = all_modules() else { return };
    let Some(program) = disassembler("cuobjdump") else {
        println!("skipped: cuobjdump is not installed");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    for (target, modules) in all {
        // One small module of each target is enough: the format is the same.
        let modules = modules.iter().filter(|m| !m.kernels.is_empty());
        let module = modules.min_by_key(|m| m.cubin.len()).unwrap();
        let path = dir.path().join(format!("{target}.cubin"));
        std::fs::write(&path, &module.cubin).unwrap();
        let output = Command::new(&program)
            .arg("-res-usage")
            .arg(&path)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        for (kernel, usage) in &module.kernels {
            let (_, said) = text.split_once(&format!("Function {kernel}:")).unwrap();
            let said = said.lines().nth(1).unwrap_or_default();
            let ours = format!(
                "REG:{} STACK:{} SHARED:",
                usage.registers, usage.stack_bytes
            );
            assert!(
                said.trim().starts_with(&ours),
                "{kernel}: {ours} is not {said}"
            );
        }
    }
}

#[test]
fn what_is_compiled_once_is_found_again_and_a_broken_file_is_not() {
    let Some(_) = builder() else { return };
    let dir = tempfile::tempdir().unwrap();
    let cache = KernelCache::new(dir.path().to_owned());
    let source = sources().iter().min_by_key(|s| s.text.len()).unwrap();
    let (found, _) = dirs();
    let builder = KernelBuilder::new(&found, Some(cache.clone()));
    let first = builder.build(source, Target::Sm80).unwrap();
    let again = builder.build(source, Target::Sm80).unwrap();
    assert!(!first.from_cache && again.from_cache);
    assert!(first.cubin == again.cubin);
    // Without a compiler the file alone is enough.
    let nowhere = LibraryDirs {
        named: Some(dir.path().join("nothing")),
    };
    let without = KernelBuilder::new(&nowhere, Some(cache));
    if without.nvrtc().is_err() {
        assert!(without.build(source, Target::Sm80).unwrap().from_cache);
        let missing = without.build(source, Target::Sm89).unwrap_err().to_string();
        assert!(
            missing.contains("sm_89") && missing.contains("NVRTC"),
            "{missing}"
        );
    }
    for entry in std::fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let repaired = builder.build(source, Target::Sm80).unwrap();
    // Not the same file: NVRTC gives a module's internal names another hash each time. What runs is the same.
    assert!(!repaired.from_cache);
    assert_eq!(repaired.kernels, first.kernels);
    let again = builder.build(source, Target::Sm80).unwrap();
    assert!(again.from_cache && again.cubin == repaired.cubin);
}

#[test]
fn nccl_makes_ids_without_a_gpu_and_refuses_ranks_that_do_not_exist() {
    let nccl = match Nccl::open(&dirs().0) {
        Ok(nccl) => nccl,
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    assert!(nccl.version() >= 21_800);
    match (nccl.unique_id(), nccl.unique_id()) {
        (Ok(one), Ok(other)) => {
            assert_ne!(one, other);
            assert_ne!(one.0, [0; UNIQUE_ID_BYTES]);
            let refused = tramontane_compute_cuda::nccl::Communicator::connect(&nccl, one, 2, 2);
            assert_eq!(
                refused.unwrap_err().to_string(),
                "NCCL: rank 2 of a group of 2"
            );
        }
        (Err(error), _) | (_, Err(error)) => println!("skipped: {error}"),
    }
}
