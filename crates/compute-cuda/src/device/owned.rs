//! What is taken from a device and gives itself back: memory, streams, graphs, events. Sizes are checked here.

use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

use super::{ARGS_MAX, Args, Device, DeviceError, Handle, Kernel, Shape};

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
        check_pinned("uploading", from, 0, bytes)?;
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
        // SAFETY: the caller's promise.
        unsafe { self.download_to((to, 0), buffer, begin, bytes) }
    }

    /// As [`download`](Self::download), to pinned memory from byte `at` on.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    ///
    /// # Safety
    /// As [`download`](Self::download).
    pub unsafe fn download_to(
        &self,
        (to, at): (&mut Pinned, usize),
        buffer: &Buffer,
        begin: usize,
        bytes: usize,
    ) -> Result<(), DeviceError> {
        let from = buffer.check("downloading", begin, bytes)?;
        check_pinned("downloading", to, at, bytes)?;
        // SAFETY: the ranges were checked; the rest is the caller's promise.
        unsafe {
            let to = to.memory.as_ptr().add(at);
            self.device.copy_out(to, from, bytes, self.handle)
        }
    }

    /// Queues filling a buffer with repetitions of another one, from byte `phase` of it on, and waits.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill_with(
        &self,
        buffer: &Buffer,
        pattern: &Buffer,
        phase: usize,
    ) -> Result<(), DeviceError> {
        let (mut at, mut from) = (0, phase.min(pattern.bytes));
        while at < buffer.bytes && pattern.bytes > 0 {
            let bytes = (pattern.bytes - from).min(buffer.bytes - at);
            let (to, source) = (buffer.at(at), pattern.at(from));
            // SAFETY: both ranges lie inside, and both live until the wait ends.
            unsafe {
                self.device.copy_within(to, source, bytes, self.handle)?;
            }
            (at, from) = (at + bytes, 0);
        }
        self.synchronize()
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
        debug_assert!(args.len() <= ARGS_MAX, "arguments of {kernel:?}");
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

fn check_pinned(
    what: &'static str,
    memory: &Pinned,
    begin: usize,
    len: usize,
) -> Result<(), DeviceError> {
    match begin.checked_add(len) {
        Some(end) if end <= memory.bytes => Ok(()),
        end => Err(DeviceError::Outside {
            what,
            begin,
            end: end.unwrap_or(usize::MAX),
            bytes: memory.bytes,
        }),
    }
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
