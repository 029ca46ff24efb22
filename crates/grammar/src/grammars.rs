//! Compiles constraints for one vocabulary, on a few threads of its own, and keeps what it compiled. Whoever asks waits,
//! for a bounded time and without a thread; asked again, it knows.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use llguidance::ParserFactory;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tramontane_types::{Constraint, TokenId};

use crate::cache::{Cache, Compiled};
use crate::limits::{
    COMPILE_QUEUE_MAX, COMPILE_STACK_BYTES, COMPILE_THREADS, COMPILE_WAIT_MAX, COMPILE_WAITERS_MAX,
    MATCHER_QUEUE_MAX, MATCHER_THREADS, QUEUE_WAIT_MAX, STRAYS_MAX,
};
use crate::pool::{Job, Pool, Rules};
use crate::{Grammar, GrammarError, Matcher, Vocabulary, compile, matcher};

/// Threads that compile.
const COMPILE_RULES: Rules = Rules {
    name: "grammar",
    threads: COMPILE_THREADS,
    strays: STRAYS_MAX,
    queue: COMPILE_QUEUE_MAX,
    run: COMPILE_WAIT_MAX,
    wait: QUEUE_WAIT_MAX,
    stack_bytes: COMPILE_STACK_BYTES,
};
/// Threads of their own for what is known: those that compile may all be at work.
const MATCHER_RULES: Rules = Rules {
    name: "grammar-matcher",
    threads: MATCHER_THREADS,
    queue: MATCHER_QUEUE_MAX,
    ..COMPILE_RULES
};

/// Who asks where it does not matter.
const NOBODY: u64 = 0;

/// All constraints of one vocabulary. Cheap to clone; its threads end with the last clone.
#[derive(Clone, Debug)]
pub struct Grammars {
    compiler: Arc<Compiler>,
    /// Started for the first constraint: most processes never see one.
    pools: Arc<OnceLock<Result<Pools, GrammarError>>>,
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

type Answer = oneshot::Sender<Compiled>;

/// A constraint that is in the queue or in work.
#[derive(Debug)]
enum Pending {
    /// Who waits for it.
    Asked(Vec<Answer>),
    /// Nobody: it has taken too long, and does still.
    Late,
}

/// What is known of a constraint, now or later.
enum Found {
    Now(Compiled),
    Later(oneshot::Receiver<Compiled>),
}

/// What the threads share.
struct Compiler {
    vocabulary: Vocabulary,
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    cache: Mutex<Cache>,
    /// Never locked inside of a pool's lock.
    pending: Mutex<HashMap<Arc<Constraint>, Pending>>,
    compiled: AtomicU64,
    compile_us: AtomicU64,
    cache_hits: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug)]
struct Pools {
    compile: Pool,
    matchers: Pool,
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
                pending: Mutex::default(),
                compiled: AtomicU64::new(0),
                compile_us: AtomicU64::new(0),
                cache_hits: AtomicU64::new(0),
                refused: AtomicU64::new(0),
            }),
            pools: Arc::default(),
        }
    }

    /// The tokens that they are about.
    #[must_use]
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.compiler.vocabulary
    }

    /// The grammar of a constraint that somebody asks for. Waits up to [`QUEUE_WAIT_MAX`] and [`COMPILE_WAIT_MAX`]; those
    /// who ask take turns, and who has asked for most gives way where too much waits.
    ///
    /// # Errors
    /// When it cannot be followed, is too large or too slow, or too many others wait.
    pub async fn compile(
        &self,
        who: u64,
        constraint: &Arc<Constraint>,
    ) -> Result<Arc<Grammar>, GrammarError> {
        let compiled = match self.find(who, constraint) {
            Found::Now(compiled) => compiled,
            Found::Later(answer) => answer.await.unwrap_or_else(no_answer),
        };
        self.counted(compiled)
    }

    /// The same for nobody in particular, on threads that may wait.
    ///
    /// # Errors
    /// As those of [`compile`](Self::compile).
    pub fn blocking_compile(
        &self,
        constraint: &Arc<Constraint>,
    ) -> Result<Arc<Grammar>, GrammarError> {
        let compiled = match self.find(NOBODY, constraint) {
            Found::Now(compiled) => compiled,
            Found::Later(answer) => answer.blocking_recv().unwrap_or_else(no_answer),
        };
        self.counted(compiled)
    }

    /// The place of a sequence behind the tokens that it has sampled. Waits as [`compile`](Self::compile) does, and as
    /// long again to go through the tokens.
    ///
    /// # Errors
    /// As those of [`compile`](Self::compile), and when the tokens are not allowed.
    pub async fn matcher(
        &self,
        who: u64,
        constraint: &Arc<Constraint>,
        resumed: &[TokenId],
    ) -> Result<Matcher, GrammarError> {
        let grammar = self.compile(who, constraint).await?;
        let answer = self.counted(self.ask_matcher(who, grammar, resumed.to_vec()))?;
        self.counted(answer.await.unwrap_or_else(no_answer))
    }

    /// The same for nobody in particular, on threads that may wait.
    ///
    /// # Errors
    /// As those of [`matcher`](Self::matcher).
    pub fn blocking_matcher(
        &self,
        constraint: &Arc<Constraint>,
        resumed: &[TokenId],
    ) -> Result<Matcher, GrammarError> {
        let grammar = self.blocking_compile(constraint)?;
        let answer = self.counted(self.ask_matcher(NOBODY, grammar, resumed.to_vec()))?;
        self.counted(answer.blocking_recv().unwrap_or_else(no_answer))
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

    fn counted<T>(&self, result: Result<T, GrammarError>) -> Result<T, GrammarError> {
        if result.is_err() {
            self.compiler.refused.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    fn find(&self, who: u64, constraint: &Arc<Constraint>) -> Found {
        if let Err(error) = compile::precheck(constraint) {
            return Found::Now(Err(error));
        }
        if let Some(known) = self.compiler.cache.lock().get(constraint) {
            self.compiler.cache_hits.fetch_add(1, Ordering::Relaxed);
            return Found::Now(known);
        }
        match self.ask(who, constraint) {
            Ok(answer) => Found::Later(answer),
            Err(error) => Found::Now(Err(error)),
        }
    }

    fn pools(&self) -> Result<&Pools, GrammarError> {
        let pools = self.pools.get_or_init(|| {
            Ok(Pools {
                compile: Pool::start(COMPILE_RULES)?,
                matchers: Pool::start(MATCHER_RULES)?,
            })
        });
        pools.as_ref().map_err(Clone::clone)
    }

    /// Queues a constraint, unless somebody has already.
    fn ask(
        &self,
        who: u64,
        constraint: &Arc<Constraint>,
    ) -> Result<oneshot::Receiver<Compiled>, GrammarError> {
        let pools = self.pools()?;
        let (answer, answered) = oneshot::channel();
        let mut pending = self.compiler.pending.lock();
        match pending.get_mut(constraint) {
            Some(Pending::Late) => {
                let limit = COMPILE_WAIT_MAX;
                return Err(GrammarError::TooSlow { limit });
            }
            Some(Pending::Asked(others)) => {
                others.retain(|other| !other.is_closed());
                if others.len() >= COMPILE_WAITERS_MAX {
                    let limit = COMPILE_WAITERS_MAX;
                    return Err(GrammarError::Busy { limit });
                }
                others.push(answer);
                return Ok(answered);
            }
            None => {}
        }
        pools.compile.submit(who, self.compiler.job(constraint))?;
        pending.insert(Arc::clone(constraint), Pending::Asked(vec![answer]));
        Ok(answered)
    }

    fn ask_matcher(
        &self,
        who: u64,
        grammar: Arc<Grammar>,
        resumed: Vec<TokenId>,
    ) -> Result<oneshot::Receiver<Result<Matcher, GrammarError>>, GrammarError> {
        let (answer, answered) = oneshot::channel();
        let answer = Arc::new(Mutex::new(Some(answer)));
        let late = Arc::clone(&answer);
        let work = move || {
            let is_gone = |answer: &oneshot::Sender<_>| answer.is_closed();
            if answer.lock().as_ref().is_none_or(is_gone) {
                return;
            }
            let made = matcher::guarded(|| Ok::<_, String>(grammar.matcher(&resumed)));
            let made = made.unwrap_or_else(|panic| Err(GrammarError::Invalid(panic)));
            if let Some(answer) = answer.lock().take() {
                let _gone = answer.send(made);
            }
        };
        let missed = move |error| {
            if let Some(answer) = late.lock().take() {
                let _gone = answer.send(Err(error));
            }
        };
        let job = Job {
            work: Box::new(work),
            missed: Box::new(missed),
        };
        self.pools()?.matchers.submit(who, job)?;
        Ok(answered)
    }
}

fn no_answer<T>(_closed: oneshot::error::RecvError) -> Result<T, GrammarError> {
    Err(GrammarError::Internal("no answer".to_owned()))
}

impl Compiler {
    fn job(self: &Arc<Self>, constraint: &Arc<Constraint>) -> Job {
        let (compiler, late) = (Arc::clone(self), Arc::clone(self));
        let (constraint, other) = (Arc::clone(constraint), Arc::clone(constraint));
        Job {
            work: Box::new(move || compiler.work(&constraint)),
            missed: Box::new(move |error| late.missed(&other, &error)),
        }
    }

    fn work(&self, constraint: &Arc<Constraint>) {
        let began = Instant::now();
        // Who asked just before somebody else's answer came has queued it once more.
        let known = self.cache.lock().get(constraint);
        let compiled = known.unwrap_or_else(|| self.compile(constraint));
        let took = began.elapsed();
        self.compiled.fetch_add(1, Ordering::Relaxed);
        self.compile_us
            .fetch_add(took.as_micros() as u64, Ordering::Relaxed);
        if took > COMPILE_WAIT_MAX {
            let bytes = constraint.source().len();
            tracing::warn!(?took, bytes, "a constraint took too long to compile");
        }
        self.cache.lock().insert(constraint, compiled.clone());
        let pending = self.pending.lock().remove(constraint);
        if let Some(Pending::Asked(answers)) = pending {
            answer(answers, &compiled);
        }
    }

    /// Tells those who wait. What takes too long goes on, and whoever asks later finds what came of it.
    fn missed(&self, constraint: &Arc<Constraint>, error: &GrammarError) {
        let mut all = self.pending.lock();
        let pending = if matches!(error, GrammarError::TooSlow { .. }) {
            let known = all.get_mut(constraint);
            known.map(|known| std::mem::replace(known, Pending::Late))
        } else {
            all.remove(constraint)
        };
        drop(all);
        if let Some(Pending::Asked(answers)) = pending {
            answer(answers, &Err(error.clone()));
        }
    }

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

fn answer(answers: Vec<Answer>, compiled: &Compiled) {
    for answer in answers {
        // Who did not want to wait any longer is gone.
        let _gone = answer.send(compiled.clone());
    }
}

impl fmt::Debug for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiler")
            .field("vocabulary", &self.vocabulary)
            .finish_non_exhaustive()
    }
}
