//! The one door to the CUDA driver: opened once, every symbol checked, so that nothing behind it can panic.
//!
//! cudarc looks a function up at its first call and panics when the library or the function is missing. Here the
//! library and all functions that this crate calls are looked up first; who has a [`Driver`] may call them.

use std::ffi::{CStr, c_int};
use std::sync::OnceLock;

use cudarc::driver::sys::{self, CUresult};

use crate::device::DeviceError;
use crate::target::Target;

/// What the driver library is called.
pub(crate) const LIBRARY: &str = "libcuda.so.1";
/// Oldest driver: the first with all of [`FUNCTIONS`].
const VERSION_MIN: c_int = 12_080;

/// Every function that this crate calls.
const FUNCTIONS: [&str; 40] = [
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuDeviceTotalMem_v2",
    "cuDriverGetVersion",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventElapsedTime_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernelEx",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// Why CUDA cannot be used here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoDriver {
    /// There is no driver library.
    #[error(
        "{LIBRARY} was not found: there is no NVIDIA driver, or this container was started without it"
    )]
    Missing,
    /// The library lacks a function.
    #[error("{LIBRARY} has no {function}: the NVIDIA driver is too old")]
    NoFunction {
        /// The function.
        function: &'static str,
    },
    /// The driver is too old.
    #[error("the NVIDIA driver offers CUDA {got}, expected {VERSION_MIN} or newer")]
    TooOld {
        /// Its version, such as 12080.
        got: c_int,
    },
    /// The driver does not start.
    #[error("the NVIDIA driver does not start: {message} ({code})")]
    Start {
        /// Result of `cuInit`.
        code: u32,
        /// What that means.
        message: String,
    },
}

/// Proof that the driver is there, with all its functions, and was started.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Driver(());

/// What is known of a device before anything is done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSummary {
    /// Its number.
    pub ordinal: u32,
    /// Its name.
    pub name: String,
    /// Compute capability: major and minor.
    pub capability: (i32, i32),
    /// Bytes of its memory.
    pub memory_bytes: u64,
}

impl DeviceSummary {
    /// What it runs, if there are kernels for it.
    #[must_use]
    pub const fn target(&self) -> Option<Target> {
        Target::of_capability(self.capability.0, self.capability.1)
    }
}

impl Driver {
    /// Opens and starts the driver, once in a process.
    pub(crate) fn open() -> Result<Self, NoDriver> {
        static OPENED: OnceLock<Result<Driver, NoDriver>> = OnceLock::new();
        OPENED.get_or_init(Self::open_now).clone()
    }

    fn open_now() -> Result<Self, NoDriver> {
        // SAFETY: opens and closes the library by name.
        if !unsafe { sys::is_culib_present() } {
            return Err(NoDriver::Missing);
        }
        // SAFETY: the library is present, so this does not panic.
        let library = unsafe { sys::culib() };
        for function in FUNCTIONS {
            // SAFETY: only looked up.
            let found = unsafe { library.get::<*const ()>(function.as_bytes()) };
            if found.is_err() {
                return Err(NoDriver::NoFunction { function });
            }
        }
        let driver = Self(());
        // SAFETY: the function is there, and so are those below; each gets addresses of variables of its types.
        let code = unsafe { sys::cuInit(0) };
        if code != CUresult::CUDA_SUCCESS {
            return Err(NoDriver::Start {
                code: code as u32,
                message: driver.message(code),
            });
        }
        let mut version = 0;
        // SAFETY: as above.
        unsafe { sys::cuDriverGetVersion(&raw mut version) };
        if version < VERSION_MIN {
            return Err(NoDriver::TooOld { got: version });
        }
        Ok(driver)
    }

    /// The result of a call as a value.
    pub(crate) fn check(self, call: &'static str, code: CUresult) -> Result<(), DeviceError> {
        if code == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        Err(DeviceError::Call {
            call,
            code: code as u32,
            message: self.message(code),
        })
    }

    #[expect(clippy::unused_self, reason = "the proof that the library is there")]
    fn message(self, code: CUresult) -> String {
        let mut text = std::ptr::null();
        // SAFETY: `text` lives through the call.
        unsafe { sys::cuGetErrorString(code, &raw mut text) };
        if text.is_null() {
            return "a result that the driver does not know".to_owned();
        }
        // SAFETY: a text of the driver's, which ends with NUL and stays.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    }

    /// All devices that this process may see.
    pub(crate) fn devices(self) -> Result<Vec<DeviceSummary>, DeviceError> {
        let mut count = 0;
        // SAFETY: `count` lives through the call.
        self.check("cuDeviceGetCount", unsafe {
            sys::cuDeviceGetCount(&raw mut count)
        })?;
        (0..count).map(|ordinal| self.summary(ordinal)).collect()
    }

    fn summary(self, ordinal: c_int) -> Result<DeviceSummary, DeviceError> {
        const NAME_BYTES: usize = 256;
        let mut device = 0;
        // SAFETY: the ordinal is below the count; each address is of a variable that lives through its call, and
        // the name has as many bytes as are said.
        unsafe {
            self.check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, ordinal))?;
        }
        let mut name = [0_u8; NAME_BYTES];
        let mut memory_bytes = 0;
        // SAFETY: as above.
        unsafe {
            let length = NAME_BYTES as c_int;
            self.check(
                "cuDeviceGetName",
                sys::cuDeviceGetName(name.as_mut_ptr().cast(), length, device),
            )?;
            self.check(
                "cuDeviceTotalMem",
                sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, device),
            )?;
        }
        let name = CStr::from_bytes_until_nul(&name).map_or("", |name| {
            name.to_str().unwrap_or("a device whose name is no text")
        });
        use sys::CUdevice_attribute_enum as Attribute;
        let major = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        let minor = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
        Ok(DeviceSummary {
            ordinal: ordinal as u32,
            name: name.to_owned(),
            capability: (
                self.attribute(device, major)?,
                self.attribute(device, minor)?,
            ),
            memory_bytes: memory_bytes as u64,
        })
    }

    pub(crate) fn attribute(
        self,
        device: sys::CUdevice,
        attribute: sys::CUdevice_attribute,
    ) -> Result<c_int, DeviceError> {
        let mut value = 0;
        // SAFETY: `value` lives through the call.
        let code = unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::FUNCTIONS;

    /// A call that is not in the list could panic on a machine whose driver lacks it.
    #[test]
    fn the_list_is_exactly_what_is_called() {
        let sources = [include_str!("driver.rs"), include_str!("mod.rs")];
        let called: BTreeSet<&str> = sources
            .iter()
            .flat_map(|source| source.split("sys::").skip(1))
            .filter_map(|rest| rest.split_once('(').map(|(name, _)| name))
            .filter(|name| {
                let rest = name.strip_prefix("cu").unwrap_or_default();
                rest.starts_with(char::is_uppercase)
                    && rest.chars().all(|c| c.is_alphanumeric() || c == '_')
            })
            .collect();
        assert_eq!(called, BTreeSet::from(FUNCTIONS));
    }
}
