//! Links between pages lead somewhere. Never asks the network: links with a scheme are not looked at.

use std::path::{Component, Path, PathBuf};

use anyhow::Context as _;

use super::read;

/// Pages at the root whose links are checked, besides all of `docs/`.
const PAGES: [&str; 4] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
];

/// Findings about all pages of the repository at `root`.
pub(super) fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut pages: Vec<PathBuf> = PAGES.iter().map(PathBuf::from).collect();
    let mut folders = vec![PathBuf::from("docs")];
    while let Some(folder) = folders.pop() {
        let path = root.join(&folder);
        for entry in std::fs::read_dir(&path).with_context(|| path.display().to_string())? {
            let entry = entry?;
            let name = folder.join(entry.file_name());
            if entry.path().is_dir() {
                folders.push(name);
            } else if name.extension().is_some_and(|e| e == "md") {
                pages.push(name);
            }
        }
    }
    pages.sort();
    let mut findings = Vec::new();
    for page in pages {
        let name = page.display().to_string();
        let text = read(root, &name)?;
        findings.extend(broken(&page, &text, &|file| root.join(file).exists()));
    }
    Ok(findings)
}

/// Links of one page whose file does not exist. Blocks of code have no links.
fn broken(page: &Path, text: &str, exists: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let folder = page.parent().unwrap_or(Path::new(""));
    let mut findings = Vec::new();
    let mut in_code = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for link in line.split("](").skip(1) {
            let target = link.split([')', ' ']).next().unwrap_or_default();
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            if !within(&folder.join(file)).is_some_and(|file| exists(&file)) {
                findings.push(format!("{}: no file for the link {target}", page.display()));
            }
        }
    }
    findings
}

/// The path without `..`; nothing when it leaves the repository.
fn within(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::CurDir => {}
            Component::ParentDir if plain.pop() => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_to_a_file_that_is_not_there_is_found() {
        let exists = |file: &Path| file == Path::new("README.md") || file == Path::new("docs/a.md");
        let page = Path::new("docs/b.md");
        let good = "[a](a.md), [a](a.md#part), [up](../README.md), [in](#here), [out](https://example.org/x)\n\
                    ```\nlet x = y[0](z);\n```\n";
        assert_eq!(broken(page, good, &exists), Vec::<String>::new());
        let bad = "[a](c.md#x) and [b](a.md) and\n- [c](../../README.md)\n";
        assert_eq!(
            broken(page, bad, &exists),
            [
                "docs/b.md: no file for the link c.md#x",
                "docs/b.md: no file for the link ../../README.md",
            ]
        );
    }
}
