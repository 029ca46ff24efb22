//! What the planner tells the operator in its log, and how often.

use super::*;

/// Keeps what is logged at warn, as text.
#[derive(Clone, Default)]
struct Warnings(Arc<parking_lot::Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == tracing::Level::WARN
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{field}={value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().push(text.0);
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn too_little_memory_and_incompatible_workers_are_warned_of_once_per_change() {
    let (_sender, members) = watch::channel(Arc::default());
    let (_placed, placements) = watch::channel(Arc::default());
    let store = Arc::new(MemoryStore::new());
    let planner = Planner::new(store, PlannerConfig::default(), members, placements);
    let group = Version::of(&worker("a")).key();
    let warned = |workers: &[&str]| {
        let warnings = Warnings::default();
        let scenario = Scenario::of(workers);
        tracing::subscriber::with_default(warnings.clone(), || {
            let status = scenario.decide().1;
            let statuses = PlannerStatuses {
                groups: [(group, status)].into(),
                first: Some(group),
            };
            planner.show(statuses, &scenario.members);
        });
        let texts = warnings.0.lock();
        texts.clone()
    };
    let first = warned(&["a:segments=40", "x:class=gpu,segments=1"]);
    assert_eq!(first.len(), 2, "{first:?}");
    assert!(first[0].contains("needed_bytes=64000 offered_bytes=40000"));
    assert!(first[1].contains("count=1") && first[1].contains("x (gpu, "));
    let same = warned(&["a:segments=40", "x:class=gpu,segments=1"]);
    assert!(same.is_empty(), "{same:?}");
    let less = warned(&["a:segments=30", "x:class=gpu,segments=1"]);
    assert!(less.len() == 1 && less[0].contains("offered_bytes=30000"));
    assert!(warned(&["a"]).is_empty(), "nothing is wrong any more");
}
