//! Which etcd has known holes that concern whoever keeps a cluster in it. Refuses nothing: it works all the same.

/// What is safe, for people.
pub(super) const SAFE: &str = "3.5.33, 3.6.14, 3.7.1 or newer";

/// First version of each line without CVE-2026-33413 (leases and the member list open to everybody), CVE-2026-59818 (revoked
/// certificates are taken) and CVE-2026-73499 (watches see keys that their user may not read). Lines before have none.
const FIRST_SAFE: [(u64, u64, u64); 3] = [(3, 5, 33), (3, 6, 14), (3, 7, 1)];

/// Whether an etcd of this version has them. One whose version nobody can read is not judged.
pub(super) fn is_unsafe(version: &str) -> bool {
    let Some((line, patch, is_preview)) = parse(version) else {
        return false;
    };
    let known = FIRST_SAFE
        .iter()
        .find(|(major, minor, _)| (*major, *minor) == line);
    match known {
        // A preview of a version comes before it.
        Some(&(_, _, first)) => patch < first || (patch == first && is_preview),
        None => line < (3, 5),
    }
}

/// Major and minor, patch, and whether it is a preview such as `3.7.1-rc.0`.
fn parse(version: &str) -> Option<((u64, u64), u64, bool)> {
    let version = version.strip_prefix('v').unwrap_or(version);
    let plain = version.split('+').next()?;
    let (numbers, is_preview) = match plain.split_once('-') {
        Some((numbers, _preview)) => (numbers, true),
        None => (plain, false),
    };
    let mut numbers = numbers.split('.').map(str::parse);
    let (major, minor, patch) = (numbers.next()?, numbers.next()?, numbers.next()?);
    let is_over = numbers.next().is_none();
    is_over.then_some(((major.ok()?, minor.ok()?), patch.ok()?, is_preview))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The class "etcd" of docs/security.md: CVE-2026-33413, CVE-2026-73499, CVE-2026-59818.
    #[test]
    fn versions_with_known_holes_are_told_from_those_without() {
        for (version, expected) in [
            ("3.4.23", true),
            ("3.4.42", true),
            ("2.3.8", true),
            ("3.5.0", true),
            ("3.5.32", true),
            ("3.5.33", false),
            ("3.5.100", false),
            ("v3.5.32", true),
            ("3.6.0", true),
            ("3.6.13", true),
            ("3.6.14", false),
            ("3.6.14-rc.1", true),
            ("3.6.15-rc.1", false),
            ("3.7.0", true),
            ("3.7.1", false),
            ("3.7.1+git1234", false),
            ("3.8.0", false),
            ("3.8.0-alpha.0", false),
            ("4.0.0", false),
            // Nobody's.
            ("", false),
            ("3.5", false),
            ("3.5.x", false),
            ("3.5.1.2", false),
            ("99999999999999999999999.1.1", false),
        ] {
            assert_eq!(is_unsafe(version), expected, "{version:?}");
        }
    }
}
