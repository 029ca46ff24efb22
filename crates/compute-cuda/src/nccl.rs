//! NCCL by name: a table of the functions that are used, and a communicator that is aborted, never destroyed.
//!
//! `ncclCommDestroy` waits for peers, and so for ever when one is dead; `ncclCommAbort` does not. Every result is a
//! value: a peer that dies gives an error here and a new communicator at the next epoch.

mod error;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

use libloading::os::unix::{Library, Symbol};
use parking_lot::{RwLock, RwLockReadGuard};

use crate::libraries::{LibraryDirs, NotFound};
pub use error::NcclError;

/// The name that packages and wheels have; the one without a number is only in development packages.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// Oldest version with everything that is used: 2.18.
const VERSION_MIN: c_int = 21_800;
/// Bytes of `ncclUniqueId`.
pub const UNIQUE_ID_BYTES: usize = 128;

/// How long an abort lets calls of other threads return.
const ABORT_GRACE: Duration = Duration::from_millis(100);
const SUCCESS: c_int = 0;
/// Of a communicator that works on what it was asked.
const IN_PROGRESS: c_int = 7;
const SUM: c_int = 0;

/// What ranks of one group agree on before they connect: one of them makes it, the others are told.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; UNIQUE_ID_BYTES]);

impl std::fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "UniqueId({}..)", crate::cache::hex(&self.0[..8]))
    }
}

/// What the elements of a buffer are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ElementType {
    /// Bytes.
    U8 = 1,
    /// binary32.
    F32 = 7,
    /// bfloat16.
    Bf16 = 9,
}

type Comm = *mut c_void;
/// A CUDA stream, as the driver's `CUstream`.
pub type RawStream = *mut c_void;

type SendFn = unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, RawStream) -> c_int;
type RecvFn = unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, RawStream) -> c_int;
type GatherFn =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, RawStream) -> c_int;
/// The numbers are type and operation, or type and root.
type ReduceFn =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, RawStream) -> c_int;

/// The library, opened.
#[derive(Debug)]
pub struct Nccl {
    get_unique_id: Symbol<unsafe extern "C" fn(*mut UniqueId) -> c_int>,
    init_rank: Symbol<unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int>,
    abort: Symbol<unsafe extern "C" fn(Comm) -> c_int>,
    async_error: Symbol<unsafe extern "C" fn(Comm, *mut c_int) -> c_int>,
    error_string: Symbol<unsafe extern "C" fn(c_int) -> *const c_char>,
    send: Symbol<SendFn>,
    recv: Symbol<RecvFn>,
    all_gather: Symbol<GatherFn>,
    broadcast: Symbol<ReduceFn>,
    reduce_scatter: Symbol<ReduceFn>,
    all_reduce: Symbol<ReduceFn>,
    group_start: Symbol<unsafe extern "C" fn() -> c_int>,
    group_end: Symbol<unsafe extern "C" fn() -> c_int>,
    version: c_int,
    path: PathBuf,
    // What the symbols point into. Never closed: NCCL starts threads of its own, for an id as well.
    _library: ManuallyDrop<Library>,
}

impl Nccl {
    /// Finds and opens it. Needs no GPU.
    ///
    /// # Errors
    /// When there is none, one without a function that is needed, or one that is too old.
    pub fn open(dirs: &LibraryDirs) -> Result<Arc<Self>, NcclError> {
        let (library, path) = dirs.open(&NAMES).map_err(NcclError::Missing)?;
        let get_version: Symbol<unsafe extern "C" fn(*mut c_int) -> c_int> =
            symbol(&library, "ncclGetVersion", &path)?;
        let mut version = 0;
        // SAFETY: it points to an integer that lives through the call.
        unsafe { get_version(&raw mut version) };
        if version < VERSION_MIN {
            return Err(NcclError::TooOld { got: version });
        }
        Ok(Arc::new(Self {
            get_unique_id: symbol(&library, "ncclGetUniqueId", &path)?,
            init_rank: symbol(&library, "ncclCommInitRank", &path)?,
            abort: symbol(&library, "ncclCommAbort", &path)?,
            async_error: symbol(&library, "ncclCommGetAsyncError", &path)?,
            error_string: symbol(&library, "ncclGetErrorString", &path)?,
            send: symbol(&library, "ncclSend", &path)?,
            recv: symbol(&library, "ncclRecv", &path)?,
            all_gather: symbol(&library, "ncclAllGather", &path)?,
            broadcast: symbol(&library, "ncclBroadcast", &path)?,
            reduce_scatter: symbol(&library, "ncclReduceScatter", &path)?,
            all_reduce: symbol(&library, "ncclAllReduce", &path)?,
            group_start: symbol(&library, "ncclGroupStart", &path)?,
            group_end: symbol(&library, "ncclGroupEnd", &path)?,
            version,
            path,
            _library: ManuallyDrop::new(library),
        }))
    }

    /// Its version, such as 22809 for 2.28.9.
    #[must_use]
    pub const fn version(&self) -> i32 {
        self.version
    }

    /// Where it was found.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new id for a group.
    ///
    /// # Errors
    /// When NCCL finds no network interface to meet on.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: it points to an id that lives through the call.
        let code = unsafe { (self.get_unique_id)(&raw mut id) };
        self.check("ncclGetUniqueId", code, (0, 0))?;
        Ok(id)
    }

    fn check(
        &self,
        call: &'static str,
        code: c_int,
        (rank, num_ranks): (u32, u32),
    ) -> Result<(), NcclError> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        Err(NcclError::Call {
            rank,
            num_ranks,
            call,
            code,
            message: self.message(code),
        })
    }

    fn message(&self, code: c_int) -> String {
        // SAFETY: NCCL answers any number with a text that lives as long as itself.
        let text = unsafe { (self.error_string)(code) };
        if text.is_null() {
            return "no text".to_owned();
        }
        // SAFETY: not null, so it is such a text.
        unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned()
    }
}

fn symbol<T>(library: &Library, name: &str, path: &Path) -> Result<Symbol<T>, NcclError> {
    // SAFETY: the types are those of `nccl.h`, which keeps its functions through version 2.
    let found = unsafe { library.get::<T>(name.as_bytes()) };
    found.map_err(|error| {
        NcclError::Missing(NotFound {
            name: format!("{name} in {}", path.display()),
            tried: error.to_string(),
        })
    })
}

/// Device memory that a collective reads or writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Address on the device.
    pub address: u64,
    /// Elements.
    pub len: usize,
    /// What they are.
    pub element: ElementType,
}

impl Span {
    fn pointer(self) -> *mut c_void {
        ptr::with_exposed_provenance_mut(self.address as usize)
    }
}

/// One rank's place in a group.
///
/// Collectives are queued on a stream and return; what goes wrong later is found by [`check`](Self::check). Dropped,
/// it is aborted.
#[derive(Debug)]
pub struct Communicator {
    nccl: Arc<Nccl>,
    comm: AtomicPtr<c_void>,
    is_aborted: AtomicBool,
    /// Held for reading by calls that an abort lets return first.
    users: RwLock<()>,
    rank: u32,
    num_ranks: u32,
}

impl Communicator {
    /// Connects to the other ranks of `id`; returns when all of them are there. The device of this rank is the
    /// current one of the calling thread.
    ///
    /// # Errors
    /// When NCCL refuses: two ranks on one device, no way between two ranks, a rank that does not answer.
    pub fn connect(
        nccl: &Arc<Nccl>,
        id: UniqueId,
        rank: u32,
        num_ranks: u32,
    ) -> Result<Self, NcclError> {
        if rank >= num_ranks || num_ranks > i32::MAX as u32 {
            return Err(NcclError::NoSuchRank {
                got: rank,
                num_ranks,
            });
        }
        let mut comm = ptr::null_mut();
        // SAFETY: `comm` lives through the call; rank and count were checked.
        let code =
            unsafe { (nccl.init_rank)(&raw mut comm, num_ranks as c_int, id, rank as c_int) };
        nccl.check("ncclCommInitRank", code, (rank, num_ranks))?;
        Ok(Self {
            nccl: Arc::clone(nccl),
            comm: AtomicPtr::new(comm),
            is_aborted: AtomicBool::new(false),
            users: RwLock::new(()),
            rank,
            num_ranks,
        })
    }

    /// This rank.
    #[must_use]
    pub const fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks of the group.
    #[must_use]
    pub const fn num_ranks(&self) -> u32 {
        self.num_ranks
    }

    /// Queues sending `span` to a peer.
    ///
    /// # Errors
    /// When NCCL refuses, or the communicator was aborted.
    ///
    /// # Safety
    /// The memory is `span` on this rank's device until the stream has passed this, and so for all collectives.
    pub unsafe fn send(&self, span: Span, peer: u32, stream: RawStream) -> Result<(), NcclError> {
        let (comm, peer) = (self.comm()?, self.peer(peer)?);
        let element = span.element as c_int;
        // SAFETY: the caller's promise.
        let code =
            unsafe { (self.nccl.send)(span.pointer(), span.len, element, peer, comm, stream) };
        self.result("ncclSend", code)
    }

    /// Queues receiving `span` from a peer.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Safety
    /// As [`send`](Self::send).
    pub unsafe fn recv(&self, span: Span, peer: u32, stream: RawStream) -> Result<(), NcclError> {
        let (comm, peer) = (self.comm()?, self.peer(peer)?);
        let element = span.element as c_int;
        // SAFETY: the caller's promise.
        let code =
            unsafe { (self.nccl.recv)(span.pointer(), span.len, element, peer, comm, stream) };
        self.result("ncclRecv", code)
    }

    /// Queues gathering every rank's `span`, in order of ranks, at the address `out`: `num_ranks * span.len` elements.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Safety
    /// As [`send`](Self::send).
    pub unsafe fn all_gather(
        &self,
        span: Span,
        out: u64,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let comm = self.comm()?;
        let out = ptr::with_exposed_provenance_mut(out as usize);
        let element = span.element as c_int;
        // SAFETY: the caller's promise.
        let code =
            unsafe { (self.nccl.all_gather)(span.pointer(), out, span.len, element, comm, stream) };
        self.result("ncclAllGather", code)
    }

    /// Queues copying `span` of the rank `root` to the `span` of every other one.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Safety
    /// As [`send`](Self::send).
    pub unsafe fn broadcast(
        &self,
        span: Span,
        root: u32,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let (comm, root) = (self.comm()?, self.peer(root)?);
        let (both, element) = (span.pointer(), span.element as c_int);
        let call = &self.nccl.broadcast;
        // SAFETY: the caller's promise.
        let code = unsafe { call(both, both, span.len, element, root, comm, stream) };
        self.result("ncclBroadcast", code)
    }

    /// Queues summing what all ranks have at the address `parts` (`num_ranks * span.len` elements); this rank's share
    /// goes to `span`.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Safety
    /// As [`send`](Self::send).
    pub unsafe fn reduce_scatter(
        &self,
        parts: u64,
        span: Span,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let comm = self.comm()?;
        let parts = ptr::with_exposed_provenance_mut(parts as usize);
        let (out, element) = (span.pointer(), span.element as c_int);
        // SAFETY: the caller's promise.
        let code =
            unsafe { (self.nccl.reduce_scatter)(parts, out, span.len, element, SUM, comm, stream) };
        self.result("ncclReduceScatter", code)
    }

    /// Queues summing every rank's `span`, in place.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    ///
    /// # Safety
    /// As [`send`](Self::send).
    pub unsafe fn all_reduce(&self, span: Span, stream: RawStream) -> Result<(), NcclError> {
        let comm = self.comm()?;
        let (both, element) = (span.pointer(), span.element as c_int);
        // SAFETY: the caller's promise.
        let code =
            unsafe { (self.nccl.all_reduce)(both, both, span.len, element, SUM, comm, stream) };
        self.result("ncclAllReduce", code)
    }

    /// Queues everything that `calls` queues as one operation: sends and receives of a group do not wait for each
    /// other. The group ends in every case.
    ///
    /// # Errors
    /// The first error, of `calls` or of the group.
    pub fn group(&self, calls: impl FnOnce() -> Result<(), NcclError>) -> Result<(), NcclError> {
        self.comm()?;
        // SAFETY: NCCL counts groups by thread, and this one ends below.
        let code = unsafe { (self.nccl.group_start)() };
        self.result("ncclGroupStart", code)?;
        let called = calls();
        // SAFETY: it was started.
        let code = unsafe { (self.nccl.group_end)() };
        called.and(self.result("ncclGroupEnd", code))
    }

    /// What has gone wrong since, on the network or at a peer.
    ///
    /// # Errors
    /// That; the communicator is of no use then, and is to be aborted.
    pub fn check(&self) -> Result<(), NcclError> {
        let comm = self.comm()?;
        let mut code = SUCCESS;
        // SAFETY: the communicator is alive, and `code` lives through the call.
        let asked = unsafe { (self.nccl.async_error)(comm, &raw mut code) };
        self.result("ncclCommGetAsyncError", asked)?;
        self.result("asynchronously", code)
    }

    /// Ends everything that is queued or runs, here and at once; peers notice. Every call from now on is refused.
    ///
    /// May be called while another thread is inside a collective, which then returns: NCCL allows just that.
    pub fn abort(&self) {
        self.is_aborted.store(true, Ordering::SeqCst);
        let comm = self.comm.swap(ptr::null_mut(), Ordering::SeqCst);
        if !comm.is_null() {
            // One that waits for a dead peer inside NCCL returns only when it is aborted.
            let _nobody = self.users.try_write_for(ABORT_GRACE);
            // SAFETY: taken out above, so this is done once.
            let code = unsafe { (self.nccl.abort)(comm) };
            if let Err(error) = self.result("ncclCommAbort", code) {
                tracing::warn!(%error, "an aborted communicator left something behind");
            }
        }
    }

    /// Whoever holds this is inside a call, and is not overtaken by an abort.
    pub(crate) fn inside(&self) -> RwLockReadGuard<'_, ()> {
        self.users.read()
    }

    fn comm(&self) -> Result<Comm, NcclError> {
        let comm = self.comm.load(Ordering::SeqCst);
        if comm.is_null() || self.is_aborted.load(Ordering::SeqCst) {
            return Err(NcclError::Aborted {
                rank: self.rank,
                num_ranks: self.num_ranks,
            });
        }
        Ok(comm)
    }

    fn peer(&self, peer: u32) -> Result<c_int, NcclError> {
        if peer < self.num_ranks {
            return Ok(peer as c_int);
        }
        Err(NcclError::NoSuchRank {
            got: peer,
            num_ranks: self.num_ranks,
        })
    }

    fn result(&self, call: &'static str, code: c_int) -> Result<(), NcclError> {
        self.nccl.check(call, code, (self.rank, self.num_ranks))
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}
