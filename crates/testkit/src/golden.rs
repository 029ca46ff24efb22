//! Golden files: tensors that another engine computed, and how close ours must come. Never writes one.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, ensure};
use safetensors::{Dtype, SafeTensors};

/// The f32 tensors of a safetensors file: values by name.
///
/// # Errors
/// When the file cannot be read or holds anything but f32.
pub fn read_tensors(path: &Path) -> anyhow::Result<BTreeMap<String, Vec<f32>>> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let file = SafeTensors::deserialize(&bytes).with_context(|| path.display().to_string())?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        ensure!(view.dtype() == Dtype::F32, "{name} is {:?}", view.dtype());
        let words = view.data().chunks_exact(4);
        let values = words.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        tensors.insert(name, values.collect());
    }
    Ok(tensors)
}

/// Largest difference between two vectors, in parts of the largest magnitude of `expected`.
///
/// NaN when a number is, so that no comparison passes.
///
/// # Errors
/// When the lengths differ or nothing is compared.
pub fn relative_error(got: &[f32], expected: &[f32]) -> anyhow::Result<f32> {
    ensure!(
        got.len() == expected.len() && !got.is_empty(),
        "{} numbers against {}",
        got.len(),
        expected.len()
    );
    let nan_wins = |m: f32, x: f32| if m.is_nan() || x <= m { m } else { x };
    let scale = expected.iter().map(|x| x.abs()).fold(0.0, nan_wins);
    let pairs = got.iter().zip(expected);
    let error = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, nan_wins);
    Ok(error / scale.max(f32::MIN_POSITIVE))
}

/// Length of the difference of two vectors, in parts of the length of `expected` (Euclidean norms).
///
/// NaN when a number is, so that no comparison passes.
///
/// # Errors
/// When the lengths differ or nothing is compared.
pub fn relative_distance(got: &[f32], expected: &[f32]) -> anyhow::Result<f32> {
    ensure!(
        got.len() == expected.len() && !got.is_empty(),
        "{} numbers against {}",
        got.len(),
        expected.len()
    );
    let square = |x: f32| f64::from(x) * f64::from(x);
    let length: f64 = expected.iter().map(|&x| square(x)).sum();
    let pairs = got.iter().zip(expected);
    let distance: f64 = pairs.map(|(a, b)| square(a - b)).sum();
    Ok((distance / length.max(f64::MIN_POSITIVE)).sqrt() as f32)
}

/// Index of the largest value; the first of equals.
#[must_use]
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, x) in values.iter().enumerate() {
        if *x > values[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_relative_to_the_largest_value_and_nan_never_passes() {
        let error = relative_error(&[1.0, -10.5], &[1.0, -10.0]).unwrap();
        assert!((error - 0.05).abs() < 1e-6, "{error}");
        assert!(
            relative_error(&[f32::NAN, 1.0], &[1.0, 1.0])
                .unwrap()
                .is_nan()
        );
        assert!(relative_error(&[1.0, 2.0], &[1.0]).is_err());
        assert!(relative_error(&[], &[]).is_err());
        let distance = relative_distance(&[3.0, 4.0], &[3.0, 0.0]).unwrap();
        assert!((distance - 4.0 / 3.0).abs() < 1e-6, "{distance}");
        assert!(relative_distance(&[f32::NAN], &[1.0]).unwrap().is_nan());
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
    }
}
