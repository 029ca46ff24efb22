//! The seam between the backend and what runs its kernels: memory, copies, launches, streams, graphs.
//!
//! [`Device`] has two implementations, the CUDA driver and the emulator of the tests. Work is queued on a stream in
//! order; nothing is allocated by a launch. What is queued between `begin_capture` and `end_capture` becomes a
//! graph, and is not done. The backend uses the wrappers: [`Buffer`], [`Pinned`], [`Stream`], [`Graph`] give
//! themselves back, and check sizes before an address reaches the device.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

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

    /// Gives it back.
    unsafe fn destroy_graph(&self, graph: Handle);
}

/// Memory of a device that gives itself back.
pub struct Buffer {
    device: Arc<dyn Device>,
    address: u64,
    bytes: usize,
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.bytes)
    }
}

impl Buffer {
    /// Takes memory; what is in it is not defined.
    ///
    /// # Errors
    /// When there is not so much.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        // Nothing has no address: kernels get pointers to something.
        let address = device.allocate(bytes.max(1))?;
        Ok(Self {
            device: Arc::clone(device),
            address,
            bytes,
        })
    }

    /// Where it is.
    #[must_use]
    pub const fn address(&self) -> u64 {
        self.address
    }

    /// The address `offset` bytes behind the start, which may be its end.
    #[must_use]
    pub fn at(&self, offset: usize) -> u64 {
        debug_assert!(offset <= self.bytes, "{offset} of {}", self.bytes);
        self.address + offset as u64
    }

    /// How large it is.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    fn check(&self, what: &'static str, begin: usize, len: usize) -> Result<u64, DeviceError> {
        match begin.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(self.address + begin as u64),
            end => Err(DeviceError::Outside {
                what,
                begin,
                end: end.unwrap_or(usize::MAX),
                bytes: self.bytes,
            }),
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: it came from this device, and nobody has it any more. Whoever queued work on it keeps it
        // until the stream was waited for; the driver waits for the device as well before it frees.
        unsafe { self.device.release(self.address) };
    }
}

/// Host memory that the device copies from and to by itself; gives itself back.
pub struct Pinned {
    device: Arc<dyn Device>,
    memory: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it is plain memory that this owns alone.
unsafe impl Send for Pinned {}
// SAFETY: as above; it changes only through `&mut`.
unsafe impl Sync for Pinned {}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

impl Pinned {
    /// Takes memory, all zero.
    ///
    /// # Errors
    /// When there is not so much.
    pub fn new(device: &Arc<dyn Device>, bytes: usize) -> Result<Self, DeviceError> {
        let memory = device.allocate_pinned(bytes.max(1))?;
        // SAFETY: it has so many bytes.
        unsafe { memory.as_ptr().write_bytes(0, bytes.max(1)) };
        Ok(Self {
            device: Arc::clone(device),
            memory,
            bytes,
        })
    }

    /// What is in it, as numbers.
    #[must_use]
    pub fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: `bytes` of them, written at the start; page-aligned, so aligned for every number.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.bytes) };
        let whole = bytes.len() / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice(&bytes[..whole])
    }

    /// As [`as_slice`](Self::as_slice), to write.
    #[must_use]
    pub fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed mutably.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.bytes) };
        let whole = bytes.len() / size_of::<T>() * size_of::<T>();
        bytemuck::cast_slice_mut(&mut bytes[..whole])
    }

    /// How large it is.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it came from this device with this size.
        unsafe { self.device.release_pinned(self.memory, self.bytes.max(1)) };
    }
}

/// A queue of a device that gives itself back, after everything in it was done.
pub struct Stream {
    device: Arc<dyn Device>,
    handle: Handle,
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:#x})", self.handle.0)
    }
}

impl Stream {
    /// A new stream.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let handle = device.create_stream()?;
        Ok(Self {
            device: Arc::clone(device),
            handle,
        })
    }

    /// As its device knows it.
    #[must_use]
    pub const fn handle(&self) -> Handle {
        self.handle
    }

    /// Its device.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Waits until everything is done.
    ///
    /// # Errors
    /// When a kernel has gone wrong.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: the handle is this stream's.
        unsafe { self.device.synchronize(self.handle) }
    }

    /// Copies `bytes` to the buffer from byte `begin` on, and waits.
    ///
    /// # Errors
    /// When they do not fit, or the driver refuses.
    pub fn write(&self, buffer: &Buffer, begin: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        let to = buffer.check("writing", begin, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the range was checked, and both live until the wait ends.
        unsafe {
            self.device
                .copy_in(to, bytes.as_ptr(), bytes.len(), self.handle)?;
        }
        self.synchronize()
    }

    /// Copies bytes of the buffer from byte `begin` on, and waits.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn read(&self, buffer: &Buffer, begin: usize, out: &mut [u8]) -> Result<(), DeviceError> {
        let from = buffer.check("reading", begin, out.len())?;
        if out.is_empty() {
            return Ok(());
        }
        // SAFETY: the range was checked, and both live until the wait ends.
        unsafe {
            self.device
                .copy_out(out.as_mut_ptr(), from, out.len(), self.handle)?;
        }
        self.synchronize()
    }

    /// Queues a copy of the first `bytes` of pinned memory to the start of a buffer.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Safety
    /// Neither is dropped, and the memory not changed, before the stream was waited for.
    pub unsafe fn upload(
        &self,
        buffer: &Buffer,
        from: &Pinned,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let to = buffer.check("uploading", 0, bytes)?;
        check_pinned("uploading", from, bytes)?;
        // SAFETY: the ranges were checked; the rest is the caller's promise.
        unsafe {
            self.device
                .copy_in(to, from.memory.as_ptr(), bytes, self.handle)
        }
    }

    /// Queues a copy of `bytes` of a buffer, from byte `begin` on, to the start of pinned memory.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Safety
    /// As [`upload`](Self::upload); nor is the memory read before.
    pub unsafe fn download(
        &self,
        to: &mut Pinned,
        buffer: &Buffer,
        begin: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let from = buffer.check("downloading", begin, bytes)?;
        check_pinned("downloading", to, bytes)?;
        // SAFETY: the ranges were checked; the rest is the caller's promise.
        unsafe {
            self.device
                .copy_out(to.memory.as_ptr(), from, bytes, self.handle)
        }
    }

    /// Queues filling a buffer with one byte.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill(&self, buffer: &Buffer, byte: u8) -> Result<(), DeviceError> {
        // SAFETY: the whole buffer; one that is dropped is freed after the device has finished.
        unsafe {
            self.device
                .fill(buffer.address, byte, buffer.bytes, self.handle)
        }
    }

    /// Queues a launch; nothing when the grid is empty.
    ///
    /// # Errors
    /// When the device refuses.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and all that it reads and writes through them is there until the
    /// stream was waited for: `kernels/README.md` says what that is.
    pub unsafe fn launch(
        &self,
        kernel: Kernel,
        shape: Shape,
        mut args: Args,
    ) -> Result<(), DeviceError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        debug_assert!(args.begins.len() <= ARGS_MAX, "arguments of {kernel:?}");
        // SAFETY: the caller's promise.
        unsafe { self.device.launch(kernel, shape, &mut args, self.handle) }
    }

    /// Makes a graph of what `queue` queues; it is not done now.
    ///
    /// # Errors
    /// When the driver refuses, or the error of `queue`.
    pub fn capture<E: From<DeviceError>>(
        &self,
        queue: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        // SAFETY: the handle is this stream's, and the capture ends below in every case.
        unsafe { self.device.begin_capture(self.handle) }?;
        let queued = queue();
        // SAFETY: it was begun.
        let ended = unsafe { self.device.end_capture(self.handle) };
        let graph = ended.map(|handle| Graph {
            device: Arc::clone(&self.device),
            handle,
        });
        queued?;
        Ok(graph?)
    }

    /// Queues a graph.
    ///
    /// # Errors
    /// When the driver refuses.
    ///
    /// # Safety
    /// All that its launches read and write is still there, as for [`launch`](Self::launch).
    pub unsafe fn launch_graph(&self, graph: &Graph) -> Result<(), DeviceError> {
        // SAFETY: the graph is alive; the rest is the caller's promise.
        unsafe { self.device.launch_graph(graph.handle, self.handle) }
    }
}

fn check_pinned(what: &'static str, memory: &Pinned, bytes: usize) -> Result<(), DeviceError> {
    if bytes <= memory.bytes {
        return Ok(());
    }
    Err(DeviceError::Outside {
        what,
        begin: 0,
        end: bytes,
        bytes: memory.bytes,
    })
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Err(error) = self.synchronize() {
            tracing::warn!(%error, "a stream ended with an error");
        }
        // SAFETY: it came from this device and is empty.
        unsafe { self.device.destroy_stream(self.handle) };
    }
}

/// What a stream remembered; gives itself back.
pub struct Graph {
    device: Arc<dyn Device>,
    handle: Handle,
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({:#x})", self.handle.0)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: it came from this device; a graph that runs is freed by the driver when it ends.
        unsafe { self.device.destroy_graph(self.handle) };
    }
}

/// A moment of a stream that times are counted from; gives itself back.
pub struct Event {
    device: Arc<dyn Device>,
    handle: Handle,
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Event({:#x})", self.handle.0)
    }
}

impl Event {
    /// A new event.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let handle = device.create_event()?;
        Ok(Self {
            device: Arc::clone(device),
            handle,
        })
    }

    /// It happens when the stream has done what is queued.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn record(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both are alive.
        unsafe { self.device.record(self.handle, stream.handle) }
    }

    /// `stream` goes on when this has happened.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn hold(&self, stream: &Stream) -> Result<(), DeviceError> {
        // SAFETY: both are alive.
        unsafe { self.device.wait(stream.handle, self.handle) }
    }

    /// Waits for `end`; milliseconds from this to it.
    ///
    /// # Errors
    /// When one was not recorded, or a kernel has gone wrong.
    pub fn elapsed_ms(&self, end: &Self) -> Result<f32, DeviceError> {
        // SAFETY: both are alive.
        unsafe { self.device.elapsed_ms(self.handle, end.handle) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: it came from this device.
        unsafe { self.device.destroy_event(self.handle) };
    }
}
