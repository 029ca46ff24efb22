//! What a constraint of a client may cost, each limit with its name.

use std::time::Duration;

use llguidance::api::ParserLimits;

/// Deepest nesting of brackets in an expression or grammar: what parses them calls itself for each.
pub const NESTING_MAX: usize = 200;
/// Deepest nesting of a schema: values in values, as `serde_json` counts them.
pub const SCHEMA_DEPTH_MAX: usize = 100;
/// Most values (objects, arrays, strings, numbers) of a schema.
pub const SCHEMA_VALUES_MAX: usize = 30_000;
/// Most `patternProperties` of one object: each pair of them is checked for overlaps.
pub const PATTERN_PROPERTIES_MAX: usize = 32;
/// Largest product of a schema's values and the alternatives that `anyOf`, `oneOf` and `allOf` multiply to somewhere in
/// it: alternatives are written out with all that must hold beside them.
pub const SCHEMA_EXPANSION_MAX: usize = 1_000_000;
/// Largest number of `minItems`, `maxItems`, `minProperties`, `maxProperties`.
pub const SCHEMA_COUNT_MAX: u64 = 10_000;
/// White space between two parts of a JSON text, at most: models that write nothing else would never end.
pub const JSON_SPACE_MAX: usize = 24;

/// Threads that compile, of each process. Two, so that a slow grammar does not hold up all others.
pub const COMPILE_THREADS: usize = 2;
/// Their stack: what parses regular expressions and schemas calls itself.
pub const COMPILE_STACK_BYTES: usize = 32 << 20;
/// Constraints that wait for a compile thread; one more is refused.
pub const COMPILE_QUEUE_MAX: usize = 64;
/// Requests that wait for the same constraint; one more is refused.
pub const COMPILE_WAITERS_MAX: usize = 256;
/// How long a request waits for its constraint, its time in the queue included. The fuel of [`PARSER_LIMITS`] ends the
/// work itself far earlier on an idle machine.
pub const COMPILE_WAIT_MAX: Duration = Duration::from_secs(5);

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
