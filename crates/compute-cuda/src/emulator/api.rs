//! The functions of the emulator's library, by name. Calls none of them but to ask for its version.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::path::Path;

use libloading::os::unix::{Library, Symbol};

/// What `tr_emulator_abi` says.
const ABI: c_int = 1;

type LaunchFn = unsafe extern "C" fn(
    *const c_char,
    *const c_uint,
    *const c_uint,
    usize,
    *mut *mut c_void,
    *mut c_char,
    usize,
) -> c_int;

/// The functions of the library.
pub(super) struct Api {
    pub(super) alloc: Symbol<unsafe extern "C" fn(usize) -> *mut c_void>,
    pub(super) free: Symbol<unsafe extern "C" fn(*mut c_void) -> c_int>,
    pub(super) launch: Symbol<LaunchFn>,
    pub(super) seed: Symbol<unsafe extern "C" fn(c_ulonglong)>,
    // Last: what the symbols point into.
    pub(super) library: Library,
}

impl Api {
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let library = crate::libraries::open(path)?;
        // SAFETY: the types are those of `emulator/ABI.md`.
        let abi = unsafe { library.get::<unsafe extern "C" fn() -> c_int>(b"tr_emulator_abi") };
        // SAFETY: as above.
        let abi = unsafe { abi.map_err(|e| e.to_string())?() };
        if abi != ABI {
            return Err(format!("emulator of ABI {abi}, expected {ABI}"));
        }
        fn symbol<T>(library: &Library, name: &str) -> Result<Symbol<T>, String> {
            // SAFETY: as above.
            unsafe { library.get::<T>(name.as_bytes()) }.map_err(|e| e.to_string())
        }
        Ok(Self {
            alloc: symbol(&library, "tr_emulator_alloc")?,
            free: symbol(&library, "tr_emulator_free")?,
            launch: symbol(&library, "tr_emulator_launch")?,
            seed: symbol(&library, "tr_emulator_seed")?,
            library,
        })
    }
}
