"""The history checker: what clients saw, against the promises (I1 to I3).

I1 every request ends in exactly one terminal event; I2 token indices are 0, 1, 2, ... without gap or repetition;
I3 greedy and seeded output equals the fault-free run.
"""

import dataclasses


@dataclasses.dataclass
class Verdict:
    requests: int = 0
    failed: int = 0
    lost: int = 0
    duplicated: int = 0
    changed: int = 0
    # Longest time without a token in a running stream, seconds.
    stall: float = 0.0
    # Finished answers that are wholly those of each baseline.
    by_baseline: list = dataclasses.field(default_factory=list)
    details: list = dataclasses.field(default_factory=list)

    def clean(self):
        return (self.failed, self.lost, self.duplicated, self.changed) == (0, 0, 0, 0)


class Baseline:
    """The answers of a run in which nothing happened."""

    def __init__(self, client, specs):
        self.specs = {spec.name: spec for spec in specs}
        self.ids, self.texts = {}, {}
        for spec in specs:
            record = client.ask(spec)
            assert record.end == "finish", f"{spec.name}: {record.error}"
            self.ids[spec.name] = [record.ids(choice) for choice in range(spec.n)]
            by_text = client.ask_http(spec)
            assert by_text.end == "finish", f"{spec.name}: {by_text.error}"
            self.texts[spec.name] = ["".join(by_text.ids(choice)) for choice in range(spec.n)]


def check(records, baselines, may_fail=lambda record: False, since=0.0):
    """The verdict over all records. A record that `may_fail` is checked for all but its end. Each record must be
    wholly as in one of the baselines."""
    verdict = Verdict(by_baseline=[0] * len(baselines))
    for record in records:
        verdict.requests += 1
        if record.end != "finish" and not may_fail(record):
            verdict.failed += 1
            verdict.details.append(f"{record.spec}: {record.error}")
        spec = baselines[0].specs[record.spec]
        number = wholly_as(record, spec, baselines)
        verdict.by_baseline[number] += record.end == "finish"
        for choice in range(spec.n):
            check_choice(record, choice, baselines[number], verdict)
        verdict.stall = max(verdict.stall, longest_stall(record, spec.n, since))
    return verdict


def wholly_as(record, spec, baselines):
    """The first baseline that a record does not contradict; the first of all when it contradicts each."""
    for number, baseline in enumerate(baselines):
        verdict = Verdict()
        for choice in range(spec.n):
            check_choice(record, choice, baseline, verdict)
        if verdict.clean():
            return number
    return 0


def check_choice(record, choice, baseline, verdict):
    indices = [index for _, c, index, _ in record.tokens if c == choice]
    got = record.ids(choice)
    if indices and indices[0] is None:
        expected = baseline.texts[record.spec][choice]
        text = "".join(got)
        changed = text != expected if record.end == "finish" else not expected.startswith(text)
        verdict.changed += changed
        if changed:
            verdict.details.append(f"{record.spec} choice {choice}: text differs, {text!r} for {expected!r}")
        return
    repeated = len(indices) - len(set(indices))
    missing = len(set(range(max(indices, default=-1) + 1)) - set(indices))
    expected = baseline.ids[record.spec][choice]
    if record.end == "finish":
        missing += max(0, len(expected) - max(indices, default=-1) - 1)
    differing = sum(
        index >= len(expected) or expected[index] != token for index, token in zip(indices, got)
    )
    verdict.duplicated += repeated
    verdict.lost += missing
    verdict.changed += differing
    if repeated or missing or differing:
        verdict.details.append(f"{record.spec} choice {choice}: {repeated} repeated, {missing} missing, {differing} changed")


def longest_stall(record, n, since):
    longest = 0.0
    for choice in range(n):
        times = [record.began, *(time for time, c, _, _ in record.tokens if c == choice)]
        if record.end == "error" and record.ended:
            times.append(record.ended)
        gaps = (after - max(before, since) for before, after in zip(times, times[1:]) if after > since)
        longest = max(longest, *gaps, 0.0)
    return longest
