//! NVRTC: CUDA C++ to machine code, on a machine with or without a GPU. Caches nothing.

use std::ffi::{CStr, CString, c_char, c_int};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::os::unix::{Library, Symbol};

use crate::libraries::{LibraryDirs, NotFound, open};
use crate::target::Target;

/// Names of the library, newest first. Targets of today need 12.9 at least.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
/// Stack of a compiling thread: the compiler recurses over large kernels deeper than the usual two MiB.
const STACK_BYTES: usize = 64 << 20;
/// A compiler's words are kept up to here.
const LOG_BYTES_MAX: usize = 64 << 10;

/// Why a source was not compiled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompileError {
    /// The compiler refused it.
    #[error("{name} does not compile for {target}: {log}")]
    Refused {
        /// Name of the source.
        name: String,
        /// For which target.
        target: Target,
        /// What the compiler said.
        log: String,
    },
    /// The compiler itself could not do what it was asked.
    #[error("NVRTC: {call} ended with {code}")]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        code: c_int,
    },
    /// The system refuses a thread.
    #[error("no thread for compiling kernels")]
    Thread(#[source] std::io::Error),
    /// A source or option with a NUL byte.
    #[error("{name} has a NUL byte")]
    Nul {
        /// Which.
        name: String,
    },
}

/// Opaque to everybody but NVRTC.
type Program = *mut std::ffi::c_void;

type CreateFn = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type CompileFn = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type SizeFn = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type BytesFn = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type DestroyFn = unsafe extern "C" fn(*mut Program) -> c_int;
type VersionFn = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;

/// The compiler, opened.
#[derive(Debug)]
pub struct Nvrtc {
    create: Symbol<CreateFn>,
    compile: Symbol<CompileFn>,
    cubin_size: Symbol<SizeFn>,
    cubin: Symbol<BytesFn>,
    log_size: Symbol<SizeFn>,
    log: Symbol<BytesFn>,
    destroy: Symbol<DestroyFn>,
    version: (i32, i32),
    path: PathBuf,
    // What the symbols point into, and what that asks for by name. Never closed: the compiler leaves things to be done
    // when the threads that it ran on end.
    _library: ManuallyDrop<Library>,
    _builtins: Option<ManuallyDrop<Library>>,
}

impl Nvrtc {
    /// Finds and opens it.
    ///
    /// # Errors
    /// When there is none, or one without a function that is needed.
    pub fn open(dirs: &LibraryDirs) -> Result<Self, NotFound> {
        let (library, path) = dirs.open(&NAMES)?;
        let builtins = builtins_beside(&path);
        let version: Symbol<VersionFn> = symbol(&library, "nvrtcVersion", &path)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both point to integers that live through the call.
        unsafe { version(&raw mut major, &raw mut minor) };
        Ok(Self {
            create: symbol(&library, "nvrtcCreateProgram", &path)?,
            compile: symbol(&library, "nvrtcCompileProgram", &path)?,
            cubin_size: symbol(&library, "nvrtcGetCUBINSize", &path)?,
            cubin: symbol(&library, "nvrtcGetCUBIN", &path)?,
            log_size: symbol(&library, "nvrtcGetProgramLogSize", &path)?,
            log: symbol(&library, "nvrtcGetProgramLog", &path)?,
            destroy: symbol(&library, "nvrtcDestroyProgram", &path)?,
            version: (major, minor),
            path,
            _library: ManuallyDrop::new(library),
            _builtins: builtins.map(ManuallyDrop::new),
        })
    }

    /// Major and minor version.
    #[must_use]
    pub const fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Compiles a source to the machine code of `target`, on a thread with room for that.
    ///
    /// # Errors
    /// With the compiler's words when it refuses the source.
    pub fn compile(
        &self,
        name: &str,
        source: &str,
        target: Target,
        options: &[String],
    ) -> Result<Vec<u8>, CompileError> {
        std::thread::scope(|scope| {
            let compile = || self.compile_here(name, source, target, options);
            let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
            let thread = thread
                .spawn_scoped(scope, compile)
                .map_err(CompileError::Thread)?;
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    fn compile_here(
        &self,
        name: &str,
        source: &str,
        target: Target,
        options: &[String],
    ) -> Result<Vec<u8>, CompileError> {
        let nul = |_| CompileError::Nul {
            name: name.to_owned(),
        };
        let (source, file) = (
            CString::new(source).map_err(nul)?,
            CString::new(name).map_err(nul)?,
        );
        let options: Vec<CString> = options
            .iter()
            .map(|option| CString::new(option.as_str()).map_err(nul))
            .collect::<Result<_, _>>()?;
        let mut program = ProgramGuard {
            nvrtc: self,
            program: ptr::null_mut(),
        };
        // SAFETY: all strings end with NUL and outlive the program; there are no headers.
        let code = unsafe {
            (self.create)(
                &raw mut program.program,
                source.as_ptr(),
                file.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        check("nvrtcCreateProgram", code)?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: as many options as are said, each ending with NUL.
        let code =
            unsafe { (self.compile)(program.program, pointers.len() as c_int, pointers.as_ptr()) };
        if code != 0 {
            return Err(CompileError::Refused {
                name: name.to_owned(),
                target,
                log: program.log().unwrap_or_else(|| format!("result {code}")),
            });
        }
        program.cubin()
    }
}

/// A program that is destroyed in every case.
struct ProgramGuard<'a> {
    nvrtc: &'a Nvrtc,
    program: Program,
}

impl ProgramGuard<'_> {
    fn log(&self) -> Option<String> {
        let mut size = 0;
        // SAFETY: `size` lives through the call.
        let code = unsafe { (self.nvrtc.log_size)(self.program, &raw mut size) };
        if code != 0 || size == 0 {
            return None;
        }
        let mut bytes = vec![0_u8; size + 1];
        // SAFETY: there is room for as many bytes as NVRTC said.
        let code = unsafe { (self.nvrtc.log)(self.program, bytes.as_mut_ptr().cast()) };
        let text = CStr::from_bytes_until_nul(&bytes).ok()?.to_string_lossy();
        let end = text.floor_char_boundary(LOG_BYTES_MAX);
        (code == 0).then(|| text[..end].trim().to_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, CompileError> {
        let mut size = 0;
        // SAFETY: `size` lives through the call.
        let code = unsafe { (self.nvrtc.cubin_size)(self.program, &raw mut size) };
        check("nvrtcGetCUBINSize", code)?;
        let mut bytes = vec![0_u8; size];
        // SAFETY: there is room for as many bytes as NVRTC said.
        let code = unsafe { (self.nvrtc.cubin)(self.program, bytes.as_mut_ptr().cast()) };
        check("nvrtcGetCUBIN", code)?;
        Ok(bytes)
    }
}

impl Drop for ProgramGuard<'_> {
    fn drop(&mut self) {
        if !self.program.is_null() {
            // SAFETY: it was created and is used no more.
            unsafe { (self.nvrtc.destroy)(&raw mut self.program) };
        }
    }
}

fn check(call: &'static str, code: c_int) -> Result<(), CompileError> {
    if code == 0 {
        return Ok(());
    }
    Err(CompileError::Call { call, code })
}

/// A function by name and type.
fn symbol<T>(library: &Library, name: &str, path: &Path) -> Result<Symbol<T>, NotFound> {
    // SAFETY: the types are those of `nvrtc.h`, unchanged since CUDA 11.1.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found.map_err(|error| NotFound {
        name: format!("{name} in {}", path.display()),
        tried: error.to_string(),
    })
}

/// NVRTC asks the loader for its builtins by name, which finds them only when they are open already, or when their
/// directory is on the loader's path.
fn builtins_beside(path: &Path) -> Option<Library> {
    let entries = std::fs::read_dir(path.parent()?).ok()?;
    let mut found: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("libnvrtc-builtins.so."))
        })
        .collect();
    found.sort();
    open(&found.pop()?).ok()
}
