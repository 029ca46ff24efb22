//! The kernels' sources, embedded, and their way to machine code. Launches nothing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::cache::{KernelCache, ModuleKey};
use crate::cubin::{self, KernelUsage};
use crate::libraries::{LibraryDirs, NotFound};
use crate::nvrtc::{CompileError, Nvrtc};
use crate::target::Target;

/// One file of `kernels/`; its kernels become one module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Name of the file, without `.cu`.
    pub name: &'static str,
    /// What it says.
    pub text: &'static str,
}

// `SOURCES`, and `HEADERS`, which stand in front of every source: `ptx.cuh` with all inline PTX, then the others.
include!(concat!(env!("OUT_DIR"), "/sources.rs"));

/// All sources, in order of their names.
#[must_use]
pub fn sources() -> &'static [Source] {
    SOURCES
}

/// A source as machine code.
#[derive(Clone, Debug)]
pub struct Module {
    /// Name of the source.
    pub name: &'static str,
    /// The ELF file.
    pub cubin: Vec<u8>,
    /// Its kernels.
    pub kernels: BTreeMap<String, KernelUsage>,
    /// Whether it came from the cache.
    pub from_cache: bool,
}

/// Why there is no module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The compiler is not there, and nobody has compiled this before.
    #[error(
        "no compiled kernels for {target} in {cache}, and NVRTC, which would compile them, is missing"
    )]
    NoCompiler {
        /// For which target.
        target: Target,
        /// Where they were looked for.
        cache: String,
        /// What was missing of NVRTC.
        #[source]
        source: NotFound,
    },
    /// The compiler refused.
    #[error("compiling kernels")]
    Compile(#[source] CompileError),
    /// What came out is no module.
    #[error("module {name} for {target} is not readable")]
    NotReadable {
        /// Name of the source.
        name: &'static str,
        /// For which target.
        target: Target,
    },
}

/// Compiles sources, or finds them compiled.
#[derive(Debug)]
pub struct KernelBuilder {
    nvrtc: Result<Nvrtc, NotFound>,
    cache: Option<KernelCache>,
}

impl KernelBuilder {
    /// With the NVRTC that is found. Without one, only what is in the cache can be had.
    #[must_use]
    pub fn new(dirs: &LibraryDirs, cache: Option<KernelCache>) -> Self {
        Self {
            nvrtc: Nvrtc::open(dirs),
            cache,
        }
    }

    /// The compiler.
    ///
    /// # Errors
    /// Why there is none.
    pub const fn nvrtc(&self) -> Result<&Nvrtc, &NotFound> {
        self.nvrtc.as_ref()
    }

    /// One source for one target.
    ///
    /// # Errors
    /// When it does not compile, or there is no compiler and nothing in the cache.
    pub fn build(&self, source: &Source, target: Target) -> Result<Module, BuildError> {
        let text = whole_text(source);
        let options = options(target);
        let key = ModuleKey::new(source.name, &text, target, &options);
        let version = self.nvrtc.as_ref().ok().map(Nvrtc::version);
        let cached = self
            .cache
            .as_ref()
            .and_then(|cache| cache.find(&key, version));
        if let Some(cubin) = cached {
            return module(source, target, cubin, true);
        }
        let nvrtc = self
            .nvrtc
            .as_ref()
            .map_err(|missing| BuildError::NoCompiler {
                target,
                cache: self
                    .cache
                    .as_ref()
                    .map_or("no cache".to_owned(), |c| c.dir().display().to_string()),
                source: missing.clone(),
            })?;
        let file = format!("{}.cu", source.name);
        tracing::info!(source = source.name, %target, "compiling kernels, once");
        let cubin = nvrtc
            .compile(&file, &text, target, &options)
            .map_err(BuildError::Compile)?;
        if let Some(cache) = &self.cache
            && let Err(error) = cache.keep(&key, nvrtc.version(), &cubin)
        {
            tracing::warn!(dir = %cache.dir().display(), %error, "compiled kernels are not kept");
        }
        module(source, target, cubin, false)
    }

    /// All sources for one target, in order of their names; several are compiled at once.
    ///
    /// # Errors
    /// As [`build`](Self::build), for the first that fails.
    pub fn build_all(&self, target: Target) -> Result<Vec<Module>, BuildError> {
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let (next, built) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..threads.min(SOURCES.len()) {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(source) = SOURCES.get(index) else {
                            return;
                        };
                        let module = self.build(source, target);
                        built.lock().push((index, module));
                    }
                });
            }
        });
        let mut built = built.into_inner();
        built.sort_by_key(|(index, _)| *index);
        built.into_iter().map(|(_, module)| module).collect()
    }
}

/// What the compiler reads: lines are counted from the start of the source itself.
fn whole_text(source: &Source) -> String {
    let mut text = String::new();
    for header in HEADERS {
        let _ = writeln!(text, "#line 1 \"{}.cuh\"\n{}", header.name, header.text);
    }
    let _ = writeln!(text, "#line 1 \"{}.cu\"\n{}", source.name, source.text);
    text
}

fn options(target: Target) -> Vec<String> {
    vec![
        format!("--gpu-architecture={target}"),
        "--std=c++17".to_owned(),
        // Profilers and sanitizers name lines; the code is the same.
        "--generate-line-info".to_owned(),
    ]
}

fn module(
    source: &Source,
    target: Target,
    cubin: Vec<u8>,
    from_cache: bool,
) -> Result<Module, BuildError> {
    let kernels = cubin::kernels(&cubin).ok_or(BuildError::NotReadable {
        name: source.name,
        target,
    })?;
    Ok(Module {
        name: source.name,
        cubin,
        kernels,
        from_cache,
    })
}
