//! Finds CUDA's libraries where toolkits and Python wheels put them. Opens nothing at build time, and nothing twice.

use std::path::{Path, PathBuf};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// Below each of these may be `lib/python3*/{site,dist}-packages`.
const PYTHON_ROOTS: [&str; 4] = [".venv", "/usr", "/usr/local", "/opt/venv"];
/// Where toolkits put libraries that the loader may not know.
const TOOLKIT_DIRS: [&str; 4] = [
    "/usr/local/cuda/lib64",
    "/usr/local/cuda/targets/x86_64-linux/lib",
    "/opt/cuda/lib64",
    "/usr/lib/x86_64-linux-gnu",
];
/// Where wheels put theirs, below `site-packages/nvidia`.
const WHEEL_DIRS: [&str; 4] = ["cu13/lib", "cuda_nvrtc/lib", "cu12/lib", "nccl/lib"];

/// Where to look for libraries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LibraryDirs {
    /// The directory that somebody named: looked at first, then everything else.
    pub named: Option<PathBuf>,
}

/// A library that could not be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} was not found ({tried})")]
pub struct NotFound {
    /// What was looked for.
    pub name: String,
    /// What was tried, or what the loader said of the one that is there.
    pub tried: String,
}

impl LibraryDirs {
    /// Opens the first of `names` that is found: in the named directory, then where the loader looks, then where
    /// toolkits and wheels put libraries. Symbols become visible to libraries that are opened later.
    ///
    /// # Errors
    /// With the names, and what the loader said of files that are there and do not open.
    pub fn open(&self, names: &[&str]) -> Result<(Library, PathBuf), NotFound> {
        let mut said = Vec::new();
        let named = self.named.iter().flat_map(|dir| with_siblings(dir));
        let named = named.flat_map(|dir| in_dir(&dir, names));
        let by_loader = names.iter().map(PathBuf::from);
        let elsewhere = known_dirs().into_iter().flat_map(|dir| in_dir(&dir, names));
        for path in named.chain(by_loader).chain(elsewhere) {
            match open(&path) {
                Ok(library) => return Ok((library, path)),
                Err(error) if path.is_absolute() => said.push(error),
                Err(_) => {}
            }
        }
        let tried = match (said.first(), &self.named) {
            (Some(said), _) => said.clone(),
            (None, Some(dir)) => format!(
                "looked in {}, where the loader looks, and where toolkits and wheels put it",
                dir.display()
            ),
            (None, None) => {
                "looked where the loader looks, and where toolkits and wheels put it".to_owned()
            }
        };
        Err(NotFound {
            name: names.first().copied().unwrap_or_default().to_owned(),
            tried,
        })
    }
}

/// Opens one file or name and keeps its symbols visible.
pub(crate) fn open(path: &Path) -> Result<Library, String> {
    // SAFETY: the libraries that are opened here are CUDA's, whose constructors ask nothing of the caller.
    let opened = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
    opened.map_err(|error| match std::error::Error::source(&error) {
        Some(said) => format!("{error}: {said}"),
        None => error.to_string(),
    })
}

/// A wheel's directory, `nvidia/cu13/lib`, and those of the other wheels beside it.
fn with_siblings(dir: &Path) -> Vec<PathBuf> {
    let wheels = dir.parent().and_then(Path::parent).into_iter();
    let others = wheels.flat_map(|wheels| WHEEL_DIRS.map(|other| wheels.join(other)));
    std::iter::once(dir.to_owned()).chain(others).collect()
}

/// Those of `names` that are files in `dir`.
fn in_dir(dir: &Path, names: &[&str]) -> Vec<PathBuf> {
    let paths = names.iter().map(|name| dir.join(name));
    paths.filter(|path| path.is_file()).collect()
}

fn known_dirs() -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> = TOOLKIT_DIRS.iter().map(PathBuf::from).collect();
    for root in PYTHON_ROOTS {
        for packages in python_packages(Path::new(root)) {
            let nvidia = packages.join("nvidia");
            dirs.extend(WHEEL_DIRS.iter().map(|dir| nvidia.join(dir)));
        }
    }
    // Wheels name libraries by absolute paths, and so does what is said of them.
    dirs.into_iter()
        .filter_map(|dir| dir.canonicalize().ok())
        .collect()
}

/// `lib/python3*/{site,dist}-packages` below `root`, in order of their names.
fn python_packages(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(root.join("lib")) else {
        return Vec::new();
    };
    let is_python = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("python3"))
    };
    let mut pythons: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(is_python)
        .collect();
    pythons.sort();
    let packages =
        |python: PathBuf| ["site-packages", "dist-packages"].map(|packages| python.join(packages));
    pythons.into_iter().flat_map(packages).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_nowhere_is_named() {
        let error = LibraryDirs::default()
            .open(&["libno-such-thing.so.1"])
            .unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("libno-such-thing.so.1 was not found (looked"),
            "{error}"
        );
    }

    #[test]
    fn a_file_that_is_no_library_is_told_from_none() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("libbroken.so"), b"text").unwrap();
        let dirs = LibraryDirs {
            named: Some(dir.path().to_owned()),
        };
        let error = dirs.open(&["libbroken.so"]).unwrap_err();
        assert!(error.tried.contains("libbroken.so"), "{error}");
    }
}
