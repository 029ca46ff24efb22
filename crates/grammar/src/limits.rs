//! What a constraint of a client may cost, each limit with its name.

use std::time::Duration;

use llguidance::api::ParserLimits;

/// Deepest nesting of brackets in an expression or grammar: what parses them calls itself for each.
pub const NESTING_MAX: usize = 200;
/// Rules, terminals and statements of a grammar, those of grammars inside of it included.
pub const DEFINITIONS_MAX: usize = 1_000;
/// Levels of all definitions of a grammar, groups included, and of all that references of a schema lead to: so deep do
/// llguidance and derivre call themselves at most, in whatever order things refer to each other. The worst found takes
/// 3.6 KiB of stack for a level in a debug build: a quarter of [`COMPILE_STACK_BYTES`].
pub const LEVELS_MAX: usize = 4_000;
/// Bytes after all `%regex` of a grammar: the substrings of a text become an expression as deep as it is long. 20,000
/// characters took 8 MiB of stack in a debug build.
pub const SUBSTRING_BYTES_MAX: usize = 10_000;
/// Expressions that must hold at once: operands of `&` and `~`, and patterns and formats of one string.
pub const CONJUNCTS_MAX: usize = 4;
/// Largest product of the lengths of expressions that must hold at once, with what is repeated as often as it is: so
/// many ways to go on are tried for one derivative, between two looks at the fuel. A million took 4 to 12 s in a debug
/// build, whether of two expressions or of four.
pub const CONJUNCTION_PARTS_MAX: usize = 200_000;
/// Largest `multipleOf`, or common multiple of those that meet, without the zeros at its end: each remainder is a state.
/// 9,973 took 0.2 s in a debug build, 99,991 2 s, 390,625 4 s.
pub const MULTIPLE_MAX: usize = 10_000;
/// Places that the parts of a schema are about, counted as often as a part refers to them: some 100 ns of work each.
pub const PLACES_MAX: usize = 2_000_000;
/// Deepest nesting of a schema: values in values, as `serde_json` counts them.
pub const SCHEMA_DEPTH_MAX: usize = 100;
/// Most values (objects, arrays, strings, numbers) of a schema.
pub const SCHEMA_VALUES_MAX: usize = 30_000;
/// Most `patternProperties` of one object: each pair of them is checked for overlaps. 32 take up to 0.2 s in a debug
/// build, 64 of the simplest 0.13 s.
pub const PATTERN_PROPERTIES_MAX: usize = 32;
/// Most pairs of properties of one object, those that `allOf` puts together included, added up over a schema: each is
/// compared with those before it. 2,000 properties, which take a second or two in a debug build; 4,000 took 7 s.
pub const PROPERTY_PAIRS_MAX: usize = 4_000_000;
/// Largest product of a schema's values and the alternatives that `anyOf`, `oneOf` and `allOf` multiply to somewhere in
/// it: alternatives are written out with all that must hold beside them.
pub const SCHEMA_EXPANSION_MAX: usize = 1_000_000;
/// Largest number of `minItems`, `maxItems`, `minProperties`, `maxProperties`.
pub const SCHEMA_COUNT_MAX: u64 = 10_000;
/// White space between two parts of a JSON text, at most: models that write nothing else would never end.
pub const JSON_SPACE_MAX: usize = 24;

/// Threads that compile, of each process. Two, so that a slow grammar does not hold up all others.
pub const COMPILE_THREADS: usize = 2;
/// Threads that go through what sequences have sampled elsewhere.
pub const MATCHER_THREADS: usize = 2;
/// Their stack: what parses regular expressions and schemas calls itself. Only what is used takes memory.
pub const COMPILE_STACK_BYTES: usize = 64 << 20;
/// Threads that are past [`COMPILE_WAIT_MAX`] and have been replaced; when there are more, fewer are left.
pub const STRAYS_MAX: usize = 4;
/// Constraints that wait for a compile thread; one more is refused.
pub const COMPILE_QUEUE_MAX: usize = 64;
/// Sequences that wait for their matcher; one more is refused. Those of a lost worker come all at once.
pub const MATCHER_QUEUE_MAX: usize = 1_024;
/// Requests that wait for the same constraint; one more is refused.
pub const COMPILE_WAITERS_MAX: usize = 256;
/// How long compiling a constraint may take. What [`PARSER_LIMITS`] and the limits above allow takes a second or two in
/// a debug build.
pub const COMPILE_WAIT_MAX: Duration = Duration::from_secs(5);
/// How long a constraint waits for a thread; longer than the one before it may take.
pub const QUEUE_WAIT_MAX: Duration = Duration::from_secs(8);

/// Compiled grammars that are kept, in bytes.
pub const CACHE_BYTES_MAX: usize = 64 << 20;
/// Compiled grammars that are kept, refused ones included.
pub const CACHE_ENTRIES_MAX: usize = 512;
/// Largest state of one sequence in its grammar.
pub const MATCHER_BYTES_MAX: usize = 32 << 20;
/// Characters of an error that come from llguidance: it repeats what a client sent.
pub const ERROR_CHARS_MAX: usize = 300;

/// What llguidance may spend on a grammar and on a mask. Its own figures: it does about 50,000 units of the first fuel,
/// 14,000 of the second and 20,000 items in a millisecond.
pub const PARSER_LIMITS: ParserLimits = ParserLimits {
    max_items_in_row: 2_000,
    initial_lexer_fuel: 1_000_000,
    step_lexer_fuel: 200_000,
    step_max_items: 50_000,
    max_lexer_states: 50_000,
    max_grammar_size: 500_000,
    precompute_large_lexemes: true,
    // They would repeat the text of an answer.
    verbose_errors: false,
};
