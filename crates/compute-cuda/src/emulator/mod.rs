//! A device of the tests: the same kernels, compiled for the host, run warp by warp. It is slow, and does what CUDA does.
//!
//! Work that is queued is done when the stream is waited for and not before, so that host memory that changes too
//! early is seen. Addresses must lie in allocations, which CUDA does not promise to notice.

mod api;
mod build;
mod queue;
mod rank;
mod ring;

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::fmt;
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::collective::Collective;
use crate::device::{Args, Device, DeviceError, DeviceInfo, Handle, Kernel, Shape};
use crate::target::Target;
use api::Api;
use queue::{Exchange, Host, Operation, State};
use rank::Rank;
use ring::Ring;

/// Room for what a launch says of an error.
const ERROR_BYTES: usize = 1024;
/// Pages of the host.
const PINNED_ALIGN: usize = 4096;

/// Runs kernels on the host.
pub struct Emulator {
    api: Api,
    info: DeviceInfo,
    /// Names of kernels; a handle is an index.
    kernels: Mutex<Vec<CString>>,
    state: Mutex<State>,
    /// For ranks, which queue on its streams.
    me: Weak<Self>,
}

impl fmt::Debug for Emulator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Emulator").finish_non_exhaustive()
    }
}

impl Emulator {
    /// Compiles the kernels into `dir`, where they are not there already, and opens them as a device of `target`.
    ///
    /// # Errors
    /// What the compiler or the loader says.
    pub fn new(dir: &Path, target: Target) -> std::io::Result<Arc<Self>> {
        let path = build::library(dir)?;
        let api = Api::open(&path).map_err(std::io::Error::other)?;
        Ok(Arc::new_cyclic(|me| Self {
            api,
            me: me.clone(),
            info: DeviceInfo {
                name: "emulator".to_owned(),
                target,
                multiprocessors: 4,
                memory_bytes: 1 << 34,
                shared_bytes_max: match target {
                    Target::Sm80 => 163 << 10,
                    Target::Sm89 | Target::Sm120 => 99 << 10,
                    Target::Sm90a | Target::Sm100a => 227 << 10,
                },
            },
            kernels: Mutex::new(Vec::new()),
            state: Mutex::new(State::default()),
        }))
    }

    /// Decides the order in which warps run. A kernel that needs another one lacks a barrier.
    pub fn set_seed(&self, seed: u64) {
        // SAFETY: any number.
        unsafe { (self.api.seed)(seed) };
    }

    /// Kernels that have run.
    #[must_use]
    pub fn launches(&self) -> u64 {
        self.state.lock().launches
    }

    fn queue(&self, stream: Handle, operation: Operation) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        if let Some(failed) = &state.failed {
            return Err(failed.clone());
        }
        match state.captures.get_mut(&stream.0) {
            Some(capture) => capture.push(operation),
            None => state
                .queues
                .entry(stream.0)
                .or_default()
                .push_back(operation),
        }
        Ok(())
    }

    /// Does what is queued, up to and with a mark, or all.
    fn run(
        &self,
        state: &mut State,
        stream: Handle,
        until: Option<u64>,
    ) -> Result<(), DeviceError> {
        while let Some(operation) = state
            .queues
            .get_mut(&stream.0)
            .and_then(VecDeque::pop_front)
        {
            if let Some(failed) = &state.failed {
                return Err(failed.clone());
            }
            if let Err(error) = self.perform(state, &operation) {
                state.failed = Some(error.clone());
                return Err(error);
            }
            if matches!(operation, Operation::Mark(mark) if Some(mark) == until) {
                break;
            }
        }
        state.failed.clone().map_or(Ok(()), Err)
    }

    fn perform(&self, state: &mut State, operation: &Operation) -> Result<(), DeviceError> {
        match operation {
            Operation::CopyIn(to, from, bytes) => {
                let to = state.place("copying in", *to, *bytes)?;
                // SAFETY: the allocation has these bytes; the host's are the caller's promise.
                unsafe { ptr::copy_nonoverlapping(from.0, to, *bytes) };
            }
            Operation::CopyOut(to, from, bytes) => {
                let from = state.place("copying out", *from, *bytes)?;
                // SAFETY: as above.
                unsafe { ptr::copy_nonoverlapping(from, to.0, *bytes) };
            }
            Operation::CopyWithin(to, from, bytes) => {
                let from = state.place("copying", *from, *bytes)?;
                let to = state.place("copying", *to, *bytes)?;
                // SAFETY: both lie in allocations.
                unsafe { ptr::copy(from, to, *bytes) };
            }
            Operation::Fill(to, byte, bytes) => {
                let to = state.place("filling", *to, *bytes)?;
                // SAFETY: the allocation has these bytes.
                unsafe { ptr::write_bytes(to, *byte, *bytes) };
            }
            Operation::Launch(kernel, shape, args) => {
                state.launches += 1;
                self.launch_now(*kernel, *shape, args.clone())?;
            }
            Operation::Graph(operations) => {
                for operation in operations.iter() {
                    self.perform(state, operation)?;
                }
            }
            Operation::Exchange(exchange) => {
                let Exchange {
                    ring, at, bytes, ..
                } = exchange;
                let place = state.place("exchanging", *at, *bytes)?;
                // SAFETY: the allocation has these bytes, and nothing else runs on this device now.
                let all = unsafe { std::slice::from_raw_parts_mut(place, *bytes) };
                match exchange.is_gather {
                    true => ring.all_gather(all),
                    false => ring.broadcast(all),
                }
            }
            Operation::Mark(_) => {}
            Operation::Await(stream, mark) => {
                let is_queued = |operation: &Operation| matches!(operation, Operation::Mark(other) if other == mark);
                let waits = state
                    .queues
                    .get(&stream.0)
                    .is_some_and(|queue| queue.iter().any(is_queued));
                if waits {
                    self.run(state, *stream, Some(*mark))?;
                }
            }
        }
        Ok(())
    }

    fn launch_now(&self, kernel: Kernel, shape: Shape, mut args: Args) -> Result<(), DeviceError> {
        let refused = |message: String| DeviceError::Launch {
            kernel: kernel.name.to_owned(),
            message,
        };
        if shape.shared_bytes > self.info.shared_bytes_max {
            return Err(refused(format!(
                "{} bytes of shared memory, expected at most {}",
                shape.shared_bytes, self.info.shared_bytes_max
            )));
        }
        let name = self.kernels.lock()[kernel.handle as usize].clone();
        let mut pointers = args.pointers();
        let mut error = [0_u8; ERROR_BYTES];
        // SAFETY: a name that ends with NUL, three numbers each, as many arguments as the caller promises, and room
        // for the error.
        let code = unsafe {
            (self.api.launch)(
                name.as_ptr(),
                shape.grid.as_ptr(),
                shape.block.as_ptr(),
                shape.shared_bytes as usize,
                pointers.as_mut_ptr(),
                error.as_mut_ptr().cast(),
                error.len(),
            )
        };
        if code == 0 {
            return Ok(());
        }
        let text = CStr::from_bytes_until_nul(&error).unwrap_or(c"an error without words");
        Err(refused(format!(
            "{} with {shape:?}",
            text.to_string_lossy()
        )))
    }
}

impl Device for Emulator {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn memory_free(&self) -> Result<u64, DeviceError> {
        let taken: usize = self.state.lock().allocations.values().sum();
        Ok(self.info.memory_bytes.saturating_sub(taken as u64))
    }

    fn allocate(&self, bytes: usize) -> Result<u64, DeviceError> {
        let free = self.memory_free()?;
        let fits = bytes as u64 <= free;
        // SAFETY: any number of bytes.
        let allocate = || unsafe { (self.api.alloc)(bytes) };
        let memory = if fits { allocate() } else { ptr::null_mut() };
        if memory.is_null() {
            return Err(DeviceError::OutOfMemory {
                device: self.info.name.clone(),
                asked: bytes,
                free,
            });
        }
        let address = memory.expose_provenance() as u64;
        self.state.lock().allocations.insert(address, bytes);
        Ok(address)
    }

    unsafe fn release(&self, address: u64) {
        let mut state = self.state.lock();
        // As the driver does: what is queued may still use it.
        let streams: Vec<u64> = state.queues.keys().copied().collect();
        for stream in streams {
            let _ = self.run(&mut state, Handle(stream), None);
        }
        state.allocations.remove(&address);
        // SAFETY: the caller's promise.
        let code = unsafe { (self.api.free)(ptr::with_exposed_provenance_mut(address as usize)) };
        if code != 0 && state.failed.is_none() {
            state.failed = Some(DeviceError::Call {
                call: "tr_emulator_free",
                code: code as u32,
                message: "something was written beside an allocation".to_owned(),
            });
        }
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DeviceError> {
        let refused = || DeviceError::OutOfMemory {
            device: "host".to_owned(),
            asked: bytes,
            free: 0,
        };
        let layout = std::alloc::Layout::from_size_align(bytes, PINNED_ALIGN);
        let layout = layout.map_err(|_too_large| refused())?;
        // SAFETY: not empty: the wrapper asks for one byte at least.
        NonNull::new(unsafe { std::alloc::alloc(layout) }).ok_or_else(refused)
    }

    unsafe fn release_pinned(&self, memory: NonNull<u8>, bytes: usize) {
        if let Ok(layout) = std::alloc::Layout::from_size_align(bytes, PINNED_ALIGN) {
            // SAFETY: the caller's promise.
            unsafe { std::alloc::dealloc(memory.as_ptr(), layout) };
        }
    }

    fn create_stream(&self) -> Result<Handle, DeviceError> {
        Ok(self.state.lock().handle())
    }

    unsafe fn destroy_stream(&self, stream: Handle) {
        self.state.lock().queues.remove(&stream.0);
    }

    unsafe fn synchronize(&self, stream: Handle) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        if state.captures.contains_key(&stream.0) {
            return Err(DeviceError::Call {
                call: "synchronize",
                code: 900,
                message: "the stream captures".to_owned(),
            });
        }
        self.run(&mut state, stream, None)
    }

    fn create_event(&self) -> Result<Handle, DeviceError> {
        Ok(self.state.lock().handle())
    }

    unsafe fn destroy_event(&self, event: Handle) {
        self.state.lock().events.remove(&event.0);
    }

    unsafe fn record(&self, event: Handle, stream: Handle) -> Result<(), DeviceError> {
        let mark = {
            let mut state = self.state.lock();
            let mark = state.handle().0;
            state.events.insert(event.0, (stream, mark));
            mark
        };
        self.queue(stream, Operation::Mark(mark))
    }

    unsafe fn wait(&self, stream: Handle, event: Handle) -> Result<(), DeviceError> {
        let recorded = self.state.lock().events.get(&event.0).copied();
        match recorded {
            Some((other, mark)) => self.queue(stream, Operation::Await(other, mark)),
            // As CUDA has it: an event that was never recorded has happened.
            None => Ok(()),
        }
    }

    unsafe fn elapsed_ms(&self, _begin: Handle, end: Handle) -> Result<f32, DeviceError> {
        let mut state = self.state.lock();
        if let Some((stream, mark)) = state.events.get(&end.0).copied() {
            self.perform(&mut state, &Operation::Await(stream, mark))?;
        }
        // No time passes here that says anything.
        Ok(0.0)
    }

    unsafe fn copy_in(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError> {
        self.queue(stream, Operation::CopyIn(to, Host(from.cast_mut()), bytes))
    }

    unsafe fn copy_out(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError> {
        self.queue(stream, Operation::CopyOut(Host(to), from, bytes))
    }

    unsafe fn copy_within(
        &self,
        to: u64,
        from: u64,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError> {
        self.queue(stream, Operation::CopyWithin(to, from, bytes))
    }

    unsafe fn fill(
        &self,
        to: u64,
        byte: u8,
        bytes: usize,
        stream: Handle,
    ) -> Result<(), DeviceError> {
        self.queue(stream, Operation::Fill(to, byte, bytes))
    }

    fn kernel(&self, name: &'static str, _shared_bytes: u32) -> Result<Kernel, DeviceError> {
        let missing = || DeviceError::NoKernel {
            name: name.to_owned(),
        };
        // SAFETY: only looked up.
        let found = unsafe { self.api.library.get::<*const ()>(name.as_bytes()) };
        if found.is_err() {
            return Err(missing());
        }
        let text = CString::new(name).map_err(|_nul| missing())?;
        let mut kernels = self.kernels.lock();
        kernels.push(text);
        Ok(Kernel {
            name,
            handle: kernels.len() as u64 - 1,
        })
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        shape: Shape,
        args: &mut Args,
        stream: Handle,
    ) -> Result<(), DeviceError> {
        self.queue(stream, Operation::Launch(kernel, shape, args.clone()))
    }

    unsafe fn begin_capture(&self, stream: Handle) -> Result<(), DeviceError> {
        self.state.lock().captures.insert(stream.0, Vec::new());
        Ok(())
    }

    unsafe fn end_capture(&self, stream: Handle) -> Result<Handle, DeviceError> {
        let mut state = self.state.lock();
        let captured = state.captures.remove(&stream.0).unwrap_or_default();
        let handle = state.handle();
        state.graphs.insert(handle.0, captured.into());
        Ok(handle)
    }

    unsafe fn launch_graph(&self, graph: Handle, stream: Handle) -> Result<(), DeviceError> {
        let operations = self.state.lock().graphs.get(&graph.0).cloned();
        match operations {
            Some(operations) => self.queue(stream, Operation::Graph(operations)),
            None => Err(DeviceError::Call {
                call: "launch_graph",
                code: 400,
                message: "no such graph".to_owned(),
            }),
        }
    }

    unsafe fn destroy_graph(&self, graph: Handle) {
        self.state.lock().graphs.remove(&graph.0);
    }

    fn meeting(&self) -> Result<Vec<u8>, DeviceError> {
        let (meeting, listener) = ring::listen().map_err(|error| not_met((0, 1), &error))?;
        let mut state = self.state.lock();
        state.meetings.insert(meeting.clone(), listener);
        Ok(meeting)
    }

    fn meet(
        &self,
        meeting: &[u8],
        rank: u32,
        num_ranks: u32,
    ) -> Result<Arc<dyn Collective>, DeviceError> {
        let failed = |error: &std::io::Error| not_met((rank, num_ranks), error);
        let listener = match rank {
            0 => self.state.lock().meetings.remove(meeting),
            _ => None,
        };
        if rank == 0 && listener.is_none() {
            return Err(failed(&std::io::Error::other("there is no such meeting")));
        }
        let ring = Ring::meet(listener.as_ref(), meeting, (rank, num_ranks));
        let ring = Arc::new(ring.map_err(|error| failed(&error))?);
        let device = self.me.upgrade();
        let device = device.ok_or_else(|| failed(&std::io::Error::other("the device is gone")))?;
        Ok(Arc::new(Rank { device, ring }))
    }
}

fn not_met((rank, num_ranks): (u32, u32), error: &std::io::Error) -> DeviceError {
    DeviceError::Ranks {
        rank,
        num_ranks,
        message: error.to_string(),
    }
}
