//! A device of the CUDA driver. Decides nothing: it does what the seam says, and turns results into values.

mod driver;

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use cudarc::driver::sys;

pub(crate) use driver::Driver;
pub use driver::{DeviceSummary, NoDriver};

use crate::collective::Collective;
use crate::device::{Args, Device, DeviceError, DeviceInfo, Handle, Kernel, Shape};
use crate::kernels::Module;
use crate::libraries::LibraryDirs;
use crate::nccl::{Communicator, Nccl, NcclError, UNIQUE_ID_BYTES, UniqueId};
use crate::target::Target;

/// Device memory that a block may use without asking.
const SHARED_BYTES_USUAL: u32 = 48 << 10;

/// One GPU: its primary context and the modules loaded into it.
pub struct CudaDevice {
    driver: Driver,
    info: DeviceInfo,
    device: sys::CUdevice,
    context: sys::CUcontext,
    modules: Vec<sys::CUmodule>,
    /// Functions by name, as the driver's handles.
    functions: BTreeMap<String, u64>,
    /// Where NCCL is, for a device that joins an island.
    libraries: LibraryDirs,
}

// SAFETY: the driver's functions may be called by any thread; each call here makes the context current first.
unsafe impl Send for CudaDevice {}
// SAFETY: as above; nothing here changes after `open`.
unsafe impl Sync for CudaDevice {}

impl fmt::Debug for CudaDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaDevice")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

/// All devices that this process may see.
///
/// # Errors
/// When there is no driver, or it refuses.
pub fn devices() -> Result<Result<Vec<DeviceSummary>, DeviceError>, NoDriver> {
    Ok(Driver::open()?.devices())
}

impl CudaDevice {
    /// Takes the device into use and loads the kernels' modules, compiled for `target`.
    pub(crate) fn open(
        driver: Driver,
        summary: &DeviceSummary,
        target: Target,
        modules: &[Module],
        libraries: &LibraryDirs,
    ) -> Result<Self, DeviceError> {
        use sys::CUdevice_attribute_enum as Attribute;
        let (mut device, mut context) = (0, ptr::null_mut());
        // SAFETY: addresses of variables that live through the calls; the ordinal is one of the driver's.
        unsafe {
            let ordinal = summary.ordinal as i32;
            driver.check("cuDeviceGet", sys::cuDeviceGet(&raw mut device, ordinal))?;
            driver.check(
                "cuDevicePrimaryCtxRetain",
                sys::cuDevicePrimaryCtxRetain(&raw mut context, device),
            )?;
        }
        let number = |attribute| -> Result<u32, DeviceError> {
            Ok(driver.attribute(device, attribute)?.max(0) as u32)
        };
        let mut opened = Self {
            driver,
            info: DeviceInfo {
                name: summary.name.clone(),
                target,
                multiprocessors: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                memory_bytes: summary.memory_bytes,
                shared_bytes_max: number(
                    Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                )?,
            },
            device,
            context,
            modules: Vec::new(),
            functions: BTreeMap::new(),
            libraries: libraries.clone(),
        };
        // Some are for other targets only.
        for module in modules.iter().filter(|module| !module.kernels.is_empty()) {
            opened.load(module)?;
        }
        Ok(opened)
    }

    fn load(&mut self, module: &Module) -> Result<(), DeviceError> {
        self.make_current()?;
        let mut loaded = ptr::null_mut();
        // SAFETY: a whole ELF file, which names its own length.
        let code = unsafe { sys::cuModuleLoadData(&raw mut loaded, module.cubin.as_ptr().cast()) };
        self.driver.check("cuModuleLoadData", code)?;
        self.modules.push(loaded);
        for name in module.kernels.keys() {
            let Ok(text) = CString::new(name.as_str()) else {
                continue;
            };
            let mut function = ptr::null_mut();
            // SAFETY: the module is loaded, the name ends with NUL.
            let code =
                unsafe { sys::cuModuleGetFunction(&raw mut function, loaded, text.as_ptr()) };
            self.driver.check("cuModuleGetFunction", code)?;
            self.functions.insert(name.clone(), function as u64);
        }
        Ok(())
    }

    fn make_current(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as this lives.
        let code = unsafe { sys::cuCtxSetCurrent(self.context) };
        self.driver.check("cuCtxSetCurrent", code)
    }

    fn nccl(&self) -> Result<Arc<Nccl>, NcclError> {
        Nccl::open(&self.libraries)
    }

    /// Reports what cannot be returned: something that was given back.
    fn said(&self, call: &'static str, code: sys::CUresult) {
        if let Err(error) = self.driver.check(call, code) {
            tracing::warn!(%error, "the device kept what was given back");
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if self.make_current().is_ok() {
            for module in self.modules.drain(..) {
                // SAFETY: loaded above; all buffers, streams and graphs hold the device, so nothing runs any more.
                let code = unsafe { sys::cuModuleUnload(module) };
                if let Err(error) = self.driver.check("cuModuleUnload", code) {
                    tracing::warn!(%error, "a module stays loaded");
                }
            }
        }
        // SAFETY: retained by `open`.
        let code = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        self.said("cuDevicePrimaryCtxRelease", code);
    }
}

/// Lets a kernel begin before the one in front has ended: all kernels wait for that one by themselves (`grid_wait` in
/// `ptx.cuh`) before they touch what others do.
fn overlaps() -> sys::CUlaunchAttribute {
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value: sys::CUlaunchAttributeValue {
            programmaticStreamSerializationAllowed: 1,
        },
    }
}

fn stream(handle: Handle) -> sys::CUstream {
    handle.0 as sys::CUstream
}

fn event(handle: Handle) -> sys::CUevent {
    handle.0 as sys::CUevent
}

impl Device for CudaDevice {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory_free(&self) -> Result<u64, DeviceError> {
        self.make_current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both live through the call.
        let code = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        self.driver.check("cuMemGetInfo", code)?;
        Ok(free as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        self.make_current()?;
        let mut address = 0;
        // SAFETY: `address` lives through the call.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
        if code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(DeviceError::OutOfMemory {
                device: self.info.name.clone(),
                asked: bytes,
                free: self.memory_free()?,
            });
        }
        self.driver.check("cuMemAlloc", code)?;
        Ok(address)
    }

    unsafe fn release(&self, address: u64) {
        if self.make_current().is_ok() {
            // SAFETY: the caller's promise.
            self.said("cuMemFree", unsafe { sys::cuMemFree_v2(address) });
        }
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError> {
        self.make_current()?;
        let mut memory = ptr::null_mut();
        // SAFETY: `memory` lives through the call. Flags 0: not write-combined, since the host reads it too.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut memory, bytes, 0) };
        self.driver.check("cuMemHostAlloc", code)?;
        NonNull::new(memory.cast()).ok_or(DeviceError::Call {
            call: "cuMemHostAlloc",
            code: 0,
            message: "no memory came".to_owned(),
        })
    }

    unsafe fn release_pinned(&self, memory: NonNull<u8>, _bytes: usize) {
        if self.make_current().is_ok() {
            // SAFETY: the caller's promise.
            let code = unsafe { sys::cuMemFreeHost(memory.as_ptr().cast()) };
            self.said("cuMemFreeHost", code);
        }
    }

    fn create_stream(&self) -> Result<Handle, DeviceError> {
        self.make_current()?;
        let mut stream = ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` lives through the call.
        let code = unsafe { sys::cuStreamCreate(&raw mut stream, flags) };
        self.driver.check("cuStreamCreate", code)?;
        Ok(Handle(stream as u64))
    }

    unsafe fn destroy_stream(&self, handle: Handle) {
        if self.make_current().is_ok() {
            // SAFETY: the caller's promise.
            let code = unsafe { sys::cuStreamDestroy_v2(stream(handle)) };
            self.said("cuStreamDestroy", code);
        }
    }

    unsafe fn synchronize(&self, handle: Handle) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuStreamSynchronize(stream(handle)) };
        self.driver.check("cuStreamSynchronize", code)
    }

    fn create_event(&self) -> Result<Handle, DeviceError> {
        self.make_current()?;
        let mut event = ptr::null_mut();
        // SAFETY: `event` lives through the call.
        let code = unsafe { sys::cuEventCreate(&raw mut event, 0) };
        self.driver.check("cuEventCreate", code)?;
        Ok(Handle(event as u64))
    }

    unsafe fn destroy_event(&self, handle: Handle) {
        if self.make_current().is_ok() {
            // SAFETY: the caller's promise.
            let code = unsafe { sys::cuEventDestroy_v2(event(handle)) };
            self.said("cuEventDestroy", code);
        }
    }

    unsafe fn record(&self, of: Handle, on: Handle) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuEventRecord(event(of), stream(on)) };
        self.driver.check("cuEventRecord", code)
    }

    unsafe fn wait(&self, on: Handle, for_: Handle) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuStreamWaitEvent(stream(on), event(for_), 0) };
        self.driver.check("cuStreamWaitEvent", code)
    }

    unsafe fn elapsed_ms(&self, begin: Handle, end: Handle) -> Result<f32, DeviceError> {
        self.make_current()?;
        let mut ms = 0.0;
        // SAFETY: the caller's promise; `ms` lives through the call.
        unsafe {
            let code = sys::cuEventSynchronize(event(end));
            self.driver.check("cuEventSynchronize", code)?;
            let code = sys::cuEventElapsedTime_v2(&raw mut ms, event(begin), event(end));
            self.driver.check("cuEventElapsedTime", code)?;
        }
        Ok(ms)
    }

    unsafe fn copy_in(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        on: Handle,
    ) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream(on)) };
        self.driver.check("cuMemcpyHtoDAsync", code)
    }

    unsafe fn copy_out(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        on: Handle,
    ) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream(on)) };
        self.driver.check("cuMemcpyDtoHAsync", code)
    }

    unsafe fn copy_within(
        &self,
        to: u64,
        from: u64,
        bytes: usize,
        on: Handle,
    ) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes, stream(on)) };
        self.driver.check("cuMemcpyDtoDAsync", code)
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize, on: Handle) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuMemsetD8Async(to, byte, bytes, stream(on)) };
        self.driver.check("cuMemsetD8Async", code)
    }

    fn kernel(&self, name: &'static str, shared_bytes: u32) -> Result<Kernel, DeviceError> {
        let Some(&handle) = self.functions.get(name) else {
            return Err(DeviceError::NoKernel {
                name: name.to_owned(),
            });
        };
        if shared_bytes > SHARED_BYTES_USUAL {
            self.make_current()?;
            let attribute =
                sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let function = handle as sys::CUfunction;
            // SAFETY: a function of a loaded module.
            let code = unsafe { sys::cuFuncSetAttribute(function, attribute, shared_bytes as i32) };
            self.driver.check("cuFuncSetAttribute", code)?;
        }
        Ok(Kernel { name, handle })
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        shape: Shape,
        args: &mut Args,
        on: Handle,
    ) -> Result<(), DeviceError> {
        self.make_current()?;
        let mut pointers: Vec<*mut c_void> = args.pointers();
        let mut overlaps = overlaps();
        let ([gx, gy, gz], [bx, by, bz]) = (shape.grid, shape.block);
        let config = sys::CUlaunchConfig {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: shape.shared_bytes,
            hStream: stream(on),
            attrs: &raw mut overlaps,
            numAttrs: u32::from(self.info.target.overlaps_kernels()),
        };
        // SAFETY: the caller's promise; the driver copies the arguments and the configuration before it returns.
        let code = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                kernel.handle as sys::CUfunction,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        self.driver
            .check("cuLaunchKernelEx", code)
            .map_err(|error| DeviceError::Launch {
                kernel: kernel.name.to_owned(),
                message: format!("{error} with {shape:?}"),
            })
    }

    unsafe fn begin_capture(&self, on: Handle) -> Result<(), DeviceError> {
        self.make_current()?;
        // Other threads may allocate meanwhile; this one must not.
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuStreamBeginCapture_v2(stream(on), mode) };
        self.driver.check("cuStreamBeginCapture", code)
    }

    unsafe fn end_capture(&self, on: Handle) -> Result<Handle, DeviceError> {
        self.make_current()?;
        let (mut graph, mut ready) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: the caller's promise; both variables live through the calls.
        unsafe {
            let code = sys::cuStreamEndCapture(stream(on), &raw mut graph);
            self.driver.check("cuStreamEndCapture", code)?;
            let code = sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0);
            self.said("cuGraphDestroy", sys::cuGraphDestroy(graph));
            self.driver.check("cuGraphInstantiate", code)?;
        }
        Ok(Handle(ready as u64))
    }

    unsafe fn launch_graph(&self, graph: Handle, on: Handle) -> Result<(), DeviceError> {
        self.make_current()?;
        // SAFETY: the caller's promise.
        let code = unsafe { sys::cuGraphLaunch(graph.0 as sys::CUgraphExec, stream(on)) };
        self.driver.check("cuGraphLaunch", code)
    }

    unsafe fn destroy_graph(&self, graph: Handle) {
        if self.make_current().is_ok() {
            // SAFETY: the caller's promise.
            let code = unsafe { sys::cuGraphExecDestroy(graph.0 as sys::CUgraphExec) };
            self.said("cuGraphExecDestroy", code);
        }
    }

    fn meeting(&self) -> Result<Vec<u8>, DeviceError> {
        let id = self.nccl().and_then(|nccl| nccl.unique_id());
        id.map(|id| id.0.to_vec())
            .map_err(|error| ranks(0, 1, &error))
    }

    fn meet(
        &self,
        meeting: &[u8],
        rank: u32,
        num_ranks: u32,
    ) -> Result<Arc<dyn Collective>, DeviceError> {
        let id: [u8; UNIQUE_ID_BYTES] = meeting.try_into().map_err(|_| DeviceError::Ranks {
            rank,
            num_ranks,
            message: format!("{} bytes of id, expected {UNIQUE_ID_BYTES}", meeting.len()),
        })?;
        self.make_current()?;
        let joined = self
            .nccl()
            .and_then(|nccl| Communicator::connect(&nccl, UniqueId(id), rank, num_ranks));
        match joined {
            Ok(communicator) => Ok(Arc::new(communicator)),
            Err(error) => Err(ranks(rank, num_ranks, &error)),
        }
    }
}

fn ranks(rank: u32, num_ranks: u32, error: &NcclError) -> DeviceError {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    DeviceError::Ranks {
        rank,
        num_ranks,
        message: format!("{error}{}", cause.unwrap_or_default()),
    }
}
