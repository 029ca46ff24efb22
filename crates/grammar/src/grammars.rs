//! Compiles constraints for one vocabulary, on a few threads of its own, and keeps what it compiled. Whoever asks waits,
//! for a bounded time; asked again, it knows.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use llguidance::ParserFactory;
use parking_lot::Mutex;
use tramontane_types::{Constraint, TokenId};

use crate::cache::{Cache, Compiled};
use crate::limits::{
    COMPILE_QUEUE_MAX, COMPILE_STACK_BYTES, COMPILE_THREADS, COMPILE_WAIT_MAX, COMPILE_WAITERS_MAX,
};
use crate::{Grammar, GrammarError, Matcher, Vocabulary, compile, matcher};

/// All constraints of one vocabulary. Cheap to clone; its threads end with the last clone.
#[derive(Clone, Debug)]
pub struct Grammars {
    compiler: Arc<Compiler>,
    /// Started for the first constraint: most processes never see one.
    pool: Arc<OnceLock<Pool>>,
}

/// What was compiled so far. Numbers only grow, except gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GrammarStats {
    /// Constraints compiled, refused ones included.
    pub compiled: u64,
    /// Time spent on them, in microseconds.
    pub compile_us: u64,
    /// Requests whose constraint was known.
    pub cache_hits: u64,
    /// Requests refused for their constraint, for a full queue, or because compiling took too long.
    pub refused: u64,
    /// Gauge: bytes that are kept.
    pub cache_bytes: u64,
}

type Answer = SyncSender<Compiled>;

/// What the threads share.
struct Compiler {
    vocabulary: Vocabulary,
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    cache: Mutex<Cache>,
    /// Who waits for which constraint.
    waiting: Mutex<HashMap<Arc<Constraint>, Vec<Answer>>>,
    compiled: AtomicU64,
    compile_us: AtomicU64,
    cache_hits: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug)]
struct Pool {
    jobs: Result<SyncSender<Arc<Constraint>>, String>,
}

impl Grammars {
    /// Nothing compiled yet.
    #[must_use]
    pub fn new(vocabulary: Vocabulary) -> Self {
        Self {
            compiler: Arc::new(Compiler {
                vocabulary,
                factory: OnceLock::new(),
                cache: Mutex::default(),
                waiting: Mutex::default(),
                compiled: AtomicU64::new(0),
                compile_us: AtomicU64::new(0),
                cache_hits: AtomicU64::new(0),
                refused: AtomicU64::new(0),
            }),
            pool: Arc::default(),
        }
    }

    /// The tokens that they are about.
    #[must_use]
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.compiler.vocabulary
    }

    /// The grammar of a constraint. Waits up to [`COMPILE_WAIT_MAX`]: for blocking threads.
    ///
    /// # Errors
    /// When it cannot be followed, is too large or too slow, or too many others wait.
    pub fn compile(&self, constraint: &Arc<Constraint>) -> Result<Arc<Grammar>, GrammarError> {
        let compiled = self.known_or_new(constraint);
        if compiled.is_err() {
            self.compiler.refused.fetch_add(1, Ordering::Relaxed);
        }
        compiled
    }

    /// The place of a sequence behind the tokens that it has sampled. Waits as [`compile`](Self::compile) does.
    ///
    /// # Errors
    /// As those of [`compile`](Self::compile), and when the tokens are not allowed.
    pub fn matcher(
        &self,
        constraint: &Arc<Constraint>,
        resumed: &[TokenId],
    ) -> Result<Matcher, GrammarError> {
        self.compile(constraint)?.matcher(resumed)
    }

    /// What was compiled so far.
    #[must_use]
    pub fn stats(&self) -> GrammarStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let compiler = &self.compiler;
        GrammarStats {
            compiled: read(&compiler.compiled),
            compile_us: read(&compiler.compile_us),
            cache_hits: read(&compiler.cache_hits),
            refused: read(&compiler.refused),
            cache_bytes: compiler.cache.lock().num_bytes() as u64,
        }
    }

    fn known_or_new(&self, constraint: &Arc<Constraint>) -> Compiled {
        compile::precheck(constraint)?;
        if let Some(known) = self.compiler.cache.lock().get(constraint) {
            self.compiler.cache_hits.fetch_add(1, Ordering::Relaxed);
            return known;
        }
        let answered = self.ask(constraint)?;
        let limit = COMPILE_WAIT_MAX;
        answered
            .recv_timeout(limit)
            .unwrap_or_else(|error| match error {
                // The work goes on, and whoever asks later finds what came of it.
                RecvTimeoutError::Timeout => Err(GrammarError::TooSlow { limit }),
                RecvTimeoutError::Disconnected => {
                    Err(GrammarError::Internal("no answer".to_owned()))
                }
            })
    }

    /// Queues a constraint, unless somebody has already.
    fn ask(&self, constraint: &Arc<Constraint>) -> Result<Receiver<Compiled>, GrammarError> {
        let pool = self.pool.get_or_init(|| Pool::start(&self.compiler));
        let jobs = pool
            .jobs
            .as_ref()
            .map_err(|text| GrammarError::Internal(text.clone()))?;
        let (answer, answered) = sync_channel(1);
        let mut waiting = self.compiler.waiting.lock();
        if let Some(others) = waiting.get_mut(constraint) {
            if others.len() >= COMPILE_WAITERS_MAX {
                let limit = COMPILE_WAITERS_MAX;
                return Err(GrammarError::Busy { limit });
            }
            others.push(answer);
            return Ok(answered);
        }
        match jobs.try_send(Arc::clone(constraint)) {
            Ok(()) => {
                waiting.insert(Arc::clone(constraint), vec![answer]);
                Ok(answered)
            }
            Err(TrySendError::Full(_)) => Err(GrammarError::Busy {
                limit: COMPILE_QUEUE_MAX,
            }),
            Err(TrySendError::Disconnected(_)) => {
                Err(GrammarError::Internal("its threads have ended".to_owned()))
            }
        }
    }
}

impl Pool {
    fn start(compiler: &Arc<Compiler>) -> Self {
        let (jobs, queue) = sync_channel(COMPILE_QUEUE_MAX);
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..COMPILE_THREADS {
            let (compiler, queue) = (Arc::clone(compiler), Arc::clone(&queue));
            let spawned = thread::Builder::new()
                .name("grammar".to_owned())
                .stack_size(COMPILE_STACK_BYTES)
                .spawn(move || work(&compiler, &queue));
            if let Err(error) = spawned {
                return Self {
                    jobs: Err(format!("no thread: {error}")),
                };
            }
        }
        Self { jobs: Ok(jobs) }
    }
}

fn work(compiler: &Compiler, queue: &Mutex<Receiver<Arc<Constraint>>>) {
    loop {
        // One waits inside of the lock, the others for the lock.
        let job = queue.lock().recv();
        let Ok(constraint) = job else {
            return;
        };
        let began = Instant::now();
        // Who asked just before somebody else's answer came has queued it once more.
        let known = compiler.cache.lock().get(&constraint);
        let compiled = known.unwrap_or_else(|| compiler.compile(&constraint));
        let took = began.elapsed();
        compiler.compiled.fetch_add(1, Ordering::Relaxed);
        compiler
            .compile_us
            .fetch_add(took.as_micros() as u64, Ordering::Relaxed);
        if took > COMPILE_WAIT_MAX {
            let bytes = constraint.source().len();
            tracing::warn!(?took, bytes, "a constraint took too long to compile");
        }
        compiler.cache.lock().insert(&constraint, compiled.clone());
        let answers = compiler.waiting.lock().remove(&constraint);
        for answer in answers.unwrap_or_default() {
            // Who did not want to wait any longer is gone.
            let _gone = answer.try_send(compiled.clone());
        }
    }
}

impl Compiler {
    /// A thread that ended by a panic would leave all behind it unanswered.
    fn compile(&self, constraint: &Constraint) -> Compiled {
        let compiled = matcher::guarded(|| Ok::<_, String>(self.compile_here(constraint)));
        compiled.unwrap_or_else(|panic| Err(GrammarError::Invalid(panic)))
    }

    fn compile_here(&self, constraint: &Constraint) -> Compiled {
        let factory = self
            .factory
            .get_or_init(|| compile::factory(&self.vocabulary));
        let factory = factory.as_ref().map_err(Clone::clone)?;
        compile::compile(factory, constraint).map(Arc::new)
    }
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler")
            .field("vocabulary", &self.vocabulary)
            .finish_non_exhaustive()
    }
}
