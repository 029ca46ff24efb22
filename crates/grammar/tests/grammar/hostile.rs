//! Hostile constraints: each is compiled or refused in time, costs little memory, and hurts nobody else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tramontane_grammar::{GrammarError, Grammars, Next};
use tramontane_types::Constraint;

use super::{grammars, json_schema, lark, regex, say};

/// What finding the masks of some tokens may take on a busy machine.
const IN_TIME: Duration = Duration::from_secs(8);
/// Tokens that are asked of those that compile.
const TOKENS: usize = 60;
/// Constraints of others, asked for beside a hostile one: as many as would be stuck behind it.
const OTHERS: usize = 4;

/// Compiles, and goes some way if it can be followed. Returns the error if not.
fn survives(grammars: &Grammars, constraint: &Arc<Constraint>) -> Option<String> {
    let compiled = grammars.blocking_compile(constraint);
    if let Err(error) = &compiled {
        assert!(!error.is_retryable(), "{error}");
    }
    // Nobody else notices.
    for i in 0..OTHERS {
        let other = regex(&format!("other-{i}-{}", constraint.source().len()));
        grammars.blocking_compile(&other).unwrap();
    }
    let error = match compiled.and_then(|grammar| grammar.matcher(&[])) {
        Ok(mut matcher) => {
            let began = Instant::now();
            let walked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                say(&mut matcher, grammars.vocabulary(), 7, TOKENS);
            }));
            // A grammar that asks too much of a mask ends its own sequence: `say` does not like that.
            drop(walked);
            assert!(began.elapsed() < IN_TIME, "{:?}", began.elapsed());
            return None;
        }
        Err(error) => error,
    };
    assert!(!error.is_internal(), "{error}");
    let text = error.to_string();
    assert!(text.chars().count() < 400, "{text}");
    assert!(
        !text.contains(char::is_control) && !text.contains("backtrace"),
        "{text}"
    );
    Some(text)
}

fn refused(constraint: &Arc<Constraint>) -> String {
    survives(&grammars(), constraint).unwrap_or_else(|| panic!("it was taken"))
}

fn taken(constraint: &Arc<Constraint>) {
    assert_eq!(survives(&grammars(), constraint), None);
}

fn nested(depth: usize) -> Value {
    let mut schema = json!({ "type": "integer" });
    for _ in 0..depth {
        schema = json!({ "type": "object", "properties": { "a": schema }, "required": ["a"] });
    }
    schema
}

#[test]
fn nested_repetition_does_not_blow_up() {
    // CVE-2025-71379 and its like: backtracking. There is none here.
    taken(&regex("(a+)+b"));
    taken(&regex("(a|a)*(a|aa)+$"));
}

#[test]
fn large_repetition_of_a_large_repetition_costs_little() {
    // PYSEC-2025-54, CVE-2025-48943: one bad expression ends the server.
    survives(&grammars(), &regex("((a{1,100000}b){1,100000}c)"));
    survives(
        &grammars(),
        &regex("(((a|b|[a-z]c){1,100000}){1,100000}){1,100000}x{50000}"),
    );
    survives(&grammars(), &regex(&"[a-z]{0,50000}é?".repeat(2000)));
}

#[test]
fn thirty_thousand_parentheses_are_refused() {
    // CVE-2026-25048: 30,000 of them.
    let many = 30_000;
    let deep = format!("{}a{}", "(".repeat(many), ")".repeat(many));
    assert_eq!(
        refused(&regex(&deep)),
        "must have at most 200 brackets within brackets, got 30000"
    );
    refused(&lark(&format!("start: {deep}")));
    refused(&lark(&format!("start: /{deep}/")));
    // As deep as is allowed, where each level is a call.
    let deep = |open: &str, close: &str| format!("{}a{}", open.repeat(190), close.repeat(190));
    survives(&grammars(), &regex(&deep("(", ")+")));
    survives(
        &grammars(),
        &lark(&format!("start: {}", deep("(", ")").replace('a', "\"a\""))),
    );
}

#[test]
fn a_grammar_that_begins_with_itself_ends() {
    // GHSA-5cmr: infinite recursion.
    survives(&grammars(), &lark("start: start \"a\" | \"b\""));
    survives(&grammars(), &lark("start: a\na: b\nb: a"));
    survives(&grammars(), &lark("start: a*\na: \"\" | a a"));
    survives(&grammars(), &lark("start: A\nA: A \"b\""));
    survives(&grammars(), &json_schema(&json!({ "$ref": "#" })));
    survives(
        &grammars(),
        &json_schema(&json!({ "allOf": [{ "$ref": "#" }] })),
    );
    survives(
        &grammars(),
        &json_schema(&json!({ "not": { "$ref": "#" } })),
    );
}

#[test]
fn an_ambiguous_grammar_costs_only_itself() {
    survives(
        &grammars(),
        &lark("start: e\ne: e e | e e e | /[a-z ]/ | \"\""),
    );
    survives(&grammars(), &lark("start: (/a*/ /a*/ /a*/ /a*/)*"));
}

#[test]
fn a_deep_schema_is_refused_before_it_is_walked() {
    taken(&json_schema(&nested(30)));
    let error = refused(&json_schema(&nested(52)));
    assert!(error.contains("values within values"), "{error}");
    let text = format!("{}{}", "{\"items\":".repeat(5000), "}".repeat(5000));
    let error = refused(&Arc::new(Constraint::JsonSchema(text.into())));
    assert!(error.contains("not valid JSON"), "{error}");
}

#[test]
fn a_big_enumeration_is_taken_and_a_huge_one_refused() {
    // CVE-2025-58446: more than 100,000 characters are slow.
    let words = |n: usize| -> Vec<String> { (0..n).map(|i| format!("word {i}")).collect() };
    taken(&json_schema(&json!({ "enum": words(5000) })));
    let error = refused(&json_schema(&json!({ "enum": vec![1; 30_000] })));
    assert!(error.contains("at most 30000 values"), "{error}");
    let error = refused(&json_schema(&json!({ "enum": words(25_000) })));
    assert!(error.contains("262144 bytes"), "{error}");
    survives(&grammars(), &regex(&words(10_000).join("|")));
}

#[test]
fn alternatives_that_multiply_are_refused() {
    let one_of: Vec<Value> = (0..40)
        .map(|i| json!({ "properties": { format!("p{i}"): { "const": i } } }))
        .collect();
    let all = json!({ "allOf": vec![json!({ "anyOf": one_of }); 8] });
    let error = refused(&json_schema(&all));
    assert!(error.contains("written out"), "{error}");
    survives(
        &grammars(),
        &json_schema(&json!({ "type": "object", "anyOf": one_of })),
    );
}

#[test]
fn many_overlapping_patterns_are_refused() {
    let patterns: serde_json::Map<String, Value> = (0..2000)
        .map(|i| (format!("^(a|b)*{i}(a|b)*$"), json!({ "type": "integer" })))
        .collect();
    let error = refused(&json_schema(
        &json!({ "type": "object", "patternProperties": patterns }),
    ));
    assert!(error.contains("patternProperties"), "{error}");
    let few: serde_json::Map<String, Value> = (0..32)
        .map(|i| (format!("^(a|b)*{i}(a|b)*$"), json!({ "type": "integer" })))
        .collect();
    survives(
        &grammars(),
        &json_schema(&json!({ "type": "object", "patternProperties": few })),
    );
}

/// Says to a process of this test what it is.
const CASE: &str = "TRAMONTANE_HOSTILE_CASE";

/// Rules, terminals or definitions that refer to each other in a chain.
fn chain(len: usize, start: &str, part: impl Fn(usize) -> String, end: &str) -> Arc<Constraint> {
    let parts: Vec<String> = (0..len).map(part).collect();
    lark(&format!("start: {start}\n{}\n{end}\n", parts.join("\n")))
}

/// Schemas that refer to each other in a chain, each with its reference so deep inside.
fn chained(len: usize, depth: usize) -> Value {
    let part = |i: usize| {
        let mut part = json!({ "$ref": format!("#/$defs/d{}", i + 1) });
        for _ in 0..depth {
            part = json!({ "allOf": [part] });
        }
        (format!("d{i}"), part)
    };
    let mut defs: serde_json::Map<String, Value> = (0..len).map(part).collect();
    defs.insert(format!("d{len}"), json!({ "type": "string" }));
    json!({ "$ref": "#/$defs/d0", "$defs": defs })
}

/// What ended the process: each would overflow a stack, which no thread survives.
fn overflow(case: &str) -> Arc<Constraint> {
    let deep = |i| format!("a{i}: {}\"y\" a{}{}", "(".repeat(28), i + 1, ")".repeat(28));
    match case {
        "rules" => chain(
            13_000,
            "a0",
            |i| format!("a{i}:a{}", i + 1),
            "a13000: \"x\"",
        ),
        "optional" => {
            let part = |i| format!("A{i}:(\"c\" A{})?", i + 1);
            chain(9_000, "A0", part, "A9000: \"x\"")
        }
        "repeated" => {
            let part = |i| format!("A{i}:(A{} \"c\")+", i + 1);
            chain(9_000, "A0", part, "A9000: \"x\"")
        }
        "grouped" => chain(3_000, "a0", deep, "a3000: \"x\""),
        "schemas" => json_schema(&chained(5_000, 1)),
        "deep schemas" => json_schema(&chained(300, 40)),
        "embedded" => lark(&format!("start: %json {}", chained(5_000, 1))),
        "substrings" => {
            let text = json!({ "substring_chars": "ab".repeat(100_000) });
            lark(&format!("start: A\nA: %regex {text}"))
        }
        // As much as is allowed.
        "few rules" => chain(900, "a0", |i| format!("a{i}:a{}", i + 1), "a900: \"x\""),
        "few grouped" => chain(130, "a0", deep, "a130: \"x\""),
        "few schemas" => json_schema(&chained(900, 1)),
        "few deep schemas" => json_schema(&chained(47, 40)),
        "few substrings" => {
            let text = json!({ "substring_chars": "ab".repeat(4_900) });
            lark(&format!("start: A\nA: %regex {text}"))
        }
        _ => panic!("there is no case {case}"),
    }
}

/// Compiles one of them as a process of its own.
#[test]
fn overflow_process() {
    #[expect(
        clippy::disallowed_methods,
        reason = "the test that starts it says what it is"
    )]
    let Ok(case) = std::env::var(CASE) else {
        println!("skipped: no process of a case");
        return;
    };
    let grammars = grammars();
    let error = survives(&grammars, &overflow(&case));
    assert_eq!(error.is_none(), case.starts_with("few"), "{error:?}");
    if let Some(error) = error {
        assert!(error.starts_with("must have at most"), "{error}");
    }
}

#[test]
fn no_chain_of_references_overflows_a_stack() {
    for case in [
        "rules",
        "optional",
        "repeated",
        "grouped",
        "schemas",
        "deep schemas",
        "embedded",
        "substrings",
        "few rules",
        "few grouped",
        "few schemas",
        "few deep schemas",
        "few substrings",
    ] {
        process("hostile::overflow_process", case);
    }
}

/// Runs a test of this program as a process of its own: what it would end, it ends alone.
fn process(test: &str, case: &str) {
    let ended = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CASE, case)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "{case}: {}: {said}", ended.status);
}

#[test]
fn intersections_cost_little_or_are_refused() {
    let searches = |n: usize| -> Vec<String> {
        (0..n)
            .map(|i| format!("/(.|\\n)*[a-z]{{{}}}x(.|\\n)*/", i + 1))
            .collect()
    };
    let schemas = |n: usize| -> Vec<Value> {
        (0..n)
            .map(|i| json!({ "type": "string", "pattern": format!("[a-z]{{{}}}x", i + 1) }))
            .collect()
    };
    let refs: Vec<Value> = (0..59)
        .map(|i| json!({ "$ref": format!("#/$defs/p{i}") }))
        .collect();
    let defs: serde_json::Map<String, Value> = schemas(59)
        .into_iter()
        .enumerate()
        .map(|(i, one)| (format!("p{i}"), one))
        .collect();
    for constraint in [
        json_schema(&json!({ "allOf": schemas(59) })),
        json_schema(&json!({ "allOf": refs, "$defs": defs })),
        lark(&format!("start: %json {}", json!({ "allOf": schemas(59) }))),
        lark(&format!("start: A\nA: {}", ["/../"; 59].join(" & "))),
        lark(&format!("start: A\nA: {}", searches(59).join(" & "))),
        // The first masks are found at once, and the one behind the last `b` never.
        lark(&format!(
            "start: A\nA: /b*a/ | /b{{24}}/ ({})",
            searches(59).join(" & ")
        )),
        // Two are enough where each has a thousand ways to go on.
        lark("start: A\nA: /[ab]*c/ | (/(.|\\n)*[a-z]{3000}x/ & /(.|\\n)*[a-z]{3000}y/)"),
    ] {
        let error = refused(&constraint);
        assert!(error.contains("hold at once"), "{error}");
    }
    for constraint in [
        json_schema(&json!({ "allOf": schemas(2) })),
        lark(&format!("start: A\nA: {}", searches(4).join(" & "))),
        lark(&format!(
            "start: A\nA: /b*a/ | /b{{24}}/ ({})",
            searches(4).join(" & ")
        )),
        lark("start: A\nA: /[ab]*c/ | (/(.|\\n)*[a-z]{400}x/ & /(.|\\n)*[a-z]{400}y/)"),
    ] {
        taken(&constraint);
    }
}

#[test]
fn many_properties_of_one_object_are_refused() {
    let part = |i: usize| (format!("{i:x}"), json!({}));
    let object = |n: usize| {
        let properties: serde_json::Map<String, Value> = (0..n).map(part).collect();
        json!({ "type": "object", "properties": properties })
    };
    taken(&json_schema(&object(1_900)));
    let one = |i: usize| json!({ "properties": { format!("{i:x}"): {} } });
    let parts: Vec<Value> = (0..6_000).map(one).collect();
    for schema in [object(14_000), json!({ "allOf": parts })] {
        let error = refused(&json_schema(&schema));
        assert!(error.contains("pairs of properties"), "{error}");
    }
}

#[test]
fn divisors_with_many_remainders_are_refused() {
    for divisor in [9_999_991, 390_625] {
        let schema = json!({ "type": "integer", "multipleOf": divisor });
        let error = refused(&json_schema(&schema));
        assert!(error.contains("multipleOf"), "{error}");
    }
    taken(&json_schema(
        &json!({ "type": "integer", "multipleOf": 9973 }),
    ));
    taken(&json_schema(
        &json!({ "type": "number", "multipleOf": 0.01 }),
    ));
}

#[test]
fn large_counts_are_refused() {
    for name in ["minItems", "maxItems", "minProperties", "maxProperties"] {
        let error = refused(&json_schema(
            &json!({ "type": ["array", "object"], name: 4_000_000_000_u64 }),
        ));
        assert!(error.contains("items or properties"), "{error}");
        survives(
            &grammars(),
            &json_schema(&json!({ "type": ["array", "object"], name: 10_000 })),
        );
    }
    survives(
        &grammars(),
        &json_schema(&json!({ "type": "string", "minLength": 1_000_000_000 })),
    );
    survives(
        &grammars(),
        &json_schema(&json!({ "type": "string", "maxLength": 1_000_000_000 })),
    );
    survives(
        &grammars(),
        &json_schema(&json!({ "type": "number", "minimum": -1e308, "maximum": 1e308 })),
    );
    survives(
        &grammars(),
        &json_schema(&json!({ "type": "number", "multipleOf": 1e-300 })),
    );
    survives(
        &grammars(),
        &json_schema(&json!({ "type": "integer", "multipleOf": 999_999_937 })),
    );
}

#[test]
fn nothing_is_fetched_for_a_reference() {
    // CVE-2026-24779 and its like: the server asks for what a client names.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    for reference in [
        format!("http://{address}/schema.json"),
        "file:///etc/passwd".to_owned(),
        "other.json".to_owned(),
        "#/$defs/nobody".to_owned(),
    ] {
        refused(&json_schema(&json!({ "$ref": reference })));
        refused(&json_schema(
            &json!({ "properties": { "a": { "$ref": reference } } }),
        ));
    }
    let asked = listener.accept();
    assert!(asked.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock));
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let error = refused(&json_schema(
        &json!({ "type": "string", "format": "color-of-the-day" }),
    ));
    assert!(error.contains("color-of-the-day"), "{error}");
    let error = refused(&json_schema(
        &json!({ "type": "array", "uniqueItems": true }),
    ));
    assert!(error.contains("uniqueItems"), "{error}");
    for schema in [
        json!(3),
        json!("object"),
        json!([]),
        json!(null),
        json!({ "type": 7 }),
    ] {
        refused(&json_schema(&schema));
    }
    refused(&json_schema(&json!(false)));
    let error = refused(&lark("start: <NO_SUCH_TOKEN>"));
    assert!(error.contains("NO_SUCH_TOKEN"), "{error}");
}

#[test]
fn empty_values_are_refused() {
    // CVE-2026-105757: one front end took them.
    for constraint in [
        regex(""),
        regex("  "),
        lark(""),
        lark("\n"),
        Arc::new(Constraint::JsonSchema("".into())),
    ] {
        assert_eq!(
            grammars().blocking_compile(&constraint).unwrap_err(),
            GrammarError::Empty
        );
    }
    survives(&grammars(), &regex("()"));
    survives(&grammars(), &regex("^$"));
    survives(&grammars(), &lark("start:"));
}

#[test]
fn a_client_does_not_choose_how_json_is_written() {
    let schema =
        json!({ "type": "array", "x-guidance": { "item_separator": ";", "lenient": true } });
    let mut matcher = grammars()
        .blocking_matcher(&json_schema(&schema), b"[1".map(u32::from).as_slice())
        .unwrap();
    let Next::OneOf(mask) = matcher.allowed().unwrap() else {
        panic!("an array goes on behind its first item");
    };
    assert!(mask.allows(b','.into()) && !mask.allows(b';'.into()));
}

#[test]
fn text_that_is_no_grammar_is_refused_in_short() {
    for text in [
        "start",
        "start: ",
        "%%%",
        "start: \"a",
        "{\"grammars\": []}",
        "start: /[/",
        "\u{0}",
        "start: %json {",
    ] {
        survives(&grammars(), &lark(text));
    }
    for text in [
        "[",
        "a{3,1}",
        "(?<=a)b",
        r"\1",
        "(?P<x>a)(?P=x)",
        "\u{0}",
        "*",
        r"\p{Foo}",
        "[\u{d7ff}-a]",
    ] {
        survives(&grammars(), &regex(text));
    }
    let long = "a".repeat(tramontane_types::constraint::CONSTRAINT_BYTES_MAX + 1);
    assert_eq!(
        refused(&regex(&long)),
        "must have at most 262144 bytes, got 262145"
    );
}

#[test]
fn memory_stays_bounded() {
    // CVE-2025-32381, CVE-2025-29770: what is kept grows without end.
    let grammars = grammars();
    let mut last = 0;
    for i in 0..40 {
        survives(
            &grammars,
            &regex(&format!("{i}{}", "[a-z]{0,5000}é?".repeat(500))),
        );
        survives(
            &grammars,
            &json_schema(
                &json!({ "enum": (0..3000).map(|n| format!("{i} {n}")).collect::<Vec<_>>() }),
            ),
        );
        last = grammars.stats().cache_bytes;
        assert!(last <= tramontane_grammar::limits::CACHE_BYTES_MAX as u64);
    }
    assert!(last > 0);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    let kib: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    // Of the whole process, whatever other tests ran beside this one.
    assert!(kib < 1 << 20, "{kib} KiB");
}

/// What this process has in memory, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib: u64 = line
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    kib << 10
}

/// Keeps schemas of many properties, as a process of its own.
#[test]
fn memory_process() {
    #[expect(
        clippy::disallowed_methods,
        reason = "the test that starts it says what it is"
    )]
    let Ok(_case) = std::env::var(CASE) else {
        println!("skipped: no process of a case");
        return;
    };
    let grammars = grammars();
    let compile = |i: usize| {
        let properties =
            (0..400).map(|n| (format!("property_{i}_{n}"), json!({ "type": "integer" })));
        let properties: serde_json::Map<String, Value> = properties.collect();
        let schema = json!({ "type": "object", "properties": properties });
        grammars.blocking_compile(&json_schema(&schema)).unwrap();
    };
    // What one of them takes while it is compiled is there once for each thread.
    (0..4).for_each(compile);
    let (before, before_said) = (resident(), grammars.stats().cache_bytes);
    (4..20).for_each(compile);
    let grown = resident().saturating_sub(before);
    let said = grammars.stats().cache_bytes - before_said;
    println!("{grown} bytes for {said} that are said to be kept");
    assert!(grown < said + said / 4, "{grown} for {said}");
    assert!(said < 4 * grown, "{grown} for {said}");
}

#[test]
fn what_is_kept_is_counted_also_where_rules_take_most_of_it() {
    process("hostile::memory_process", "memory");
}

#[test]
fn a_full_queue_refuses_and_goes_on() {
    let grammars = grammars();
    let results: Vec<_> = std::thread::scope(|scope| {
        let ask = |i: usize| {
            let grammars = grammars.clone();
            move || {
                grammars
                    .blocking_compile(&regex(&format!("[a-z]{{1,40}}{i}")))
                    .map(|_| ())
            }
        };
        let threads: Vec<_> = (0..120).map(|i| scope.spawn(ask(i))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    for error in results.into_iter().filter_map(Result::err) {
        assert!(error.is_retryable(), "{error}");
    }
    grammars.blocking_compile(&regex("[a-z]{1,40}0")).unwrap();
}
