//! The seam between the backend and what runs its kernels: memory, copies, launches, streams, graphs.
//!
//! [`Device`] has two implementations, the CUDA driver and the emulator of the tests. Work is queued on a stream in
//! order; nothing is allocated by a launch. What is queued between `begin_capture` and `end_capture` becomes a
//! graph, and is not done. The backend uses the wrappers: [`Buffer`], [`Pinned`], [`Stream`], [`Graph`] give
//! themselves back, and check sizes before an address reaches the device.

mod owned;

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

pub use owned::{Buffer, Event, Graph, Pinned, Stream};

use crate::collective::Collective;
use crate::target::Target;

/// Arguments that one kernel may take.
pub const ARGS_MAX: usize = 48;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name, as the driver says it.
    pub name: String,
    /// What its kernels are compiled for.
    pub target: Target,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of its memory.
    pub memory_bytes: u64,
    /// Shared memory that a block may have, when it asks for more than the usual 48 KiB.
    pub shared_bytes_max: u32,
}

/// Why a device did not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No memory.
    #[error("{device} has no room for {asked} bytes, {free} are free")]
    OutOfMemory {
        /// Name of the device.
        device: String,
        /// Bytes asked for.
        asked: usize,
        /// Bytes that are free.
        free: u64,
    },
    /// The driver refused, or a kernel that ran before had gone wrong.
    #[error("{call}: {message} ({code})")]
    Call {
        /// The function.
        call: &'static str,
        /// Its result.
        code: u32,
        /// What that means.
        message: String,
    },
    /// No module has this kernel.
    #[error("no module has a kernel {name}")]
    NoKernel {
        /// Its name.
        name: String,
    },
    /// A launch that the device or its emulator refuses.
    #[error("launch of {kernel}: {message}")]
    Launch {
        /// The kernel.
        kernel: String,
        /// Why.
        message: String,
    },
    /// The other ranks of an island are not reached, or not any more.
    #[error("rank {rank} of {num_ranks}: {message}")]
    Ranks {
        /// This rank.
        rank: u32,
        /// Of how many.
        num_ranks: u32,
        /// What went wrong.
        message: String,
    },
    /// A copy or view that does not fit its buffer.
    #[error("{what}: bytes {begin}..{end} of a buffer of {bytes}")]
    Outside {
        /// What was to be done.
        what: &'static str,
        /// First byte.
        begin: usize,
        /// One behind the last byte.
        end: usize,
        /// Bytes of the buffer.
        bytes: usize,
    },
}

/// A kernel that a device has loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// What the device knows it by.
    pub(crate) handle: u64,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// How many blocks and threads, and the memory that they share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Blocks: x, y, z.
    pub grid: [u32; 3],
    /// Threads of a block: x, y, z.
    pub block: [u32; 3],
    /// Shared memory of a block beside what its kernel declares, in bytes.
    pub shared_bytes: u32,
}

impl Shape {
    /// A grid of one dimension.
    #[must_use]
    pub const fn new(blocks: u32, threads: u32, shared_bytes: u32) -> Self {
        Self {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared_bytes,
        }
    }

    /// A grid of two dimensions.
    #[must_use]
    pub const fn grid2(x: u32, y: u32, threads: u32, shared_bytes: u32) -> Self {
        Self {
            grid: [x, y, 1],
            block: [threads, 1, 1],
            shared_bytes,
        }
    }

    /// A grid of three dimensions.
    #[must_use]
    pub const fn grid3(grid: [u32; 3], threads: u32, shared_bytes: u32) -> Self {
        Self {
            grid,
            block: [threads, 1, 1],
            shared_bytes,
        }
    }
}

/// The arguments of one launch, each in a place of its own, as the driver wants them.
#[derive(Clone, Debug, Default)]
pub struct Args {
    /// Values, each from a boundary of eight bytes.
    words: Vec<u64>,
    /// Where each begins.
    begins: Vec<usize>,
}

impl Args {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An address on the device; 0 is a null pointer.
    #[must_use]
    pub fn address(mut self, address: u64) -> Self {
        self.begins.push(self.words.len());
        self.words.push(address);
        self
    }

    /// An `int`.
    #[must_use]
    pub fn int(mut self, value: i32) -> Self {
        self.begins.push(self.words.len());
        self.words.push(u64::from(value as u32));
        self
    }

    /// A count as an `int`: what kernels compute with. No size here comes near its limit.
    #[must_use]
    pub fn size(self, value: usize) -> Self {
        debug_assert!(i32::try_from(value).is_ok(), "{value} is no int");
        self.int(value as i32)
    }

    /// A `long long`.
    #[must_use]
    pub fn long(mut self, value: i64) -> Self {
        self.begins.push(self.words.len());
        self.words.push(value as u64);
        self
    }

    /// A `float`.
    #[must_use]
    pub fn float(mut self, value: f32) -> Self {
        self.begins.push(self.words.len());
        self.words.push(u64::from(value.to_bits()));
        self
    }

    /// A struct by value, laid out as C does.
    #[must_use]
    pub fn pod<T: bytemuck::Pod>(mut self, value: &T) -> Self {
        let begin = self.words.len();
        self.begins.push(begin);
        self.words
            .resize(begin + size_of::<T>().div_ceil(size_of::<u64>()), 0);
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut self.words[begin..]);
        bytes[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(value));
        self
    }

    /// How many.
    pub(super) const fn len(&self) -> usize {
        self.begins.len()
    }

    /// Pointers to the values, in order. They are good until the arguments change.
    pub(crate) fn pointers(&mut self) -> Vec<*mut std::ffi::c_void> {
        let base = self.words.as_mut_ptr();
        let at = |&begin: &usize| base.wrapping_add(begin).cast();
        self.begins.iter().map(at).collect()
    }
}

/// A stream, an event or a graph, as its device knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(pub(crate) u64);

impl Handle {
    /// The stream as the driver's `CUstream`, for libraries that queue on it.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The same as a pointer.
    pub(crate) const fn to_cuda(self) -> *mut std::ffi::c_void {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }
}

/// Runs kernels. See the module; addresses are plain numbers here, so nearly everything is unsafe.
///
/// # Safety
/// Of all unsafe functions: addresses and pointers are good for as many bytes as are said until the stream has
/// passed what was queued, handles come from this device and were not given back.
#[expect(
    clippy::missing_safety_doc,
    reason = "one promise for all, at the trait"
)]
pub trait Device: Send + Sync + fmt::Debug {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Bytes that are free.
    fn memory_free(&self) -> Result<u64, DeviceError>;

    /// Device memory; what is in it is not defined.
    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError>;

    /// Gives memory back.
    unsafe fn release(&self, address: u64);

    /// Host memory that the device copies from and to by itself.
    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError>;

    /// Gives it back.
    unsafe fn release_pinned(&self, memory: NonNull<u8>, bytes: usize);

    /// A stream of its own.
    fn create_stream(&self) -> Result<Handle, DeviceError>;

    /// Gives it back.
    unsafe fn destroy_stream(&self, stream: Handle);

    /// Waits until the stream has done everything; errors of kernels appear here at the latest.
    unsafe fn synchronize(&self, stream: Handle) -> Result<(), DeviceError>;

    /// An event that remembers times.
    fn create_event(&self) -> Result<Handle, DeviceError>;

    /// Gives it back.
    unsafe fn destroy_event(&self, event: Handle);

    /// The event happens when the stream has done what is queued.
    unsafe fn record(&self, event: Handle, stream: Handle) -> Result<(), DeviceError>;

    /// The stream goes on when the event has happened.
    unsafe fn wait(&self, stream: Handle, event: Handle) -> Result<(), DeviceError>;

    /// Waits for the second of two events; milliseconds between them.
    unsafe fn elapsed_ms(&self, begin: Handle, end: Handle) -> Result<f32, DeviceError>;

    /// Queues a copy to the device. From pinned memory it returns at once.
    unsafe fn copy_in(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError>;

    /// Queues a copy from the device.
    unsafe fn copy_out(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError>;

    /// Queues a copy on the device.
    unsafe fn copy_within(
        &self,
        to: u64,
        from: u64,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError>;

    /// Queues filling memory with one byte.
    unsafe fn fill(
        &self,
        to: u64,
        byte: u8,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError>;

    /// Finds a kernel and lets it have `shared_bytes` of dynamic shared memory.
    fn kernel(&self, name: &'static str, shared_bytes: u32) -> Result<Kernel, DeviceError>;

    /// Queues a launch.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        shape: Shape,
        args: &mut Args,
        stream: Handle,
    ) -> Result<(), DeviceError>;

    /// From now on the stream remembers and does not do.
    unsafe fn begin_capture(&self, stream: Handle) -> Result<(), DeviceError>;

    /// Ends that; what was remembered, ready to run.
    unsafe fn end_capture(&self, stream: Handle) -> Result<Handle, DeviceError>;

    /// Queues a graph.
    unsafe fn launch_graph(&self, graph: Handle, stream: Handle) -> Result<(), DeviceError>;

    /// Gives it back. A graph that runs ends first.
    unsafe fn destroy_graph(&self, graph: Handle);

    /// What devices of an island need to find each other: the one of rank 0 makes it, all are told.
    fn meeting(&self) -> Result<Vec<u8>, DeviceError>;

    /// Connects this device to those of all other ranks that were told of the meeting; returns when they are there.
    fn meet(
        &self,
        meeting: &[u8],
        rank: u32,
        num_ranks: u32,
    ) -> Result<Arc<dyn Collective>, DeviceError>;
}
