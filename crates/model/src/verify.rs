//! Reads every byte of a checkpoint: digests, and that every number is finite. Changes nothing.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::read::{TensorBytes, Window};
use crate::shard::Shard;
use crate::{Checkpoint, Error, manifest, parallel};

/// What a full read found.
#[derive(Clone, Debug, Serialize)]
pub struct VerifyReport {
    /// File and SHA-256, by name.
    pub digests: Vec<(String, String)>,
    /// Tensors read.
    pub tensors: usize,
    /// Bytes read.
    pub bytes: u64,
}

impl Checkpoint {
    /// Reads every byte. `progress` is told `(bytes done, bytes in all)`.
    ///
    /// A manifest (`tramontane.sha256`) was already compared when the checkpoint was opened;
    /// [`manifest::write`] makes one of the report's digests.
    ///
    /// # Errors
    /// Names a tensor that holds a NaN or an infinity.
    pub fn verify(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<VerifyReport, Error> {
        let bytes = self.shards().iter().map(|shard| shard.len as u64).sum();
        let (tensors, done) = (AtomicUsize::new(0), AtomicU64::new(0));
        let digests = Mutex::new(Vec::new());
        parallel::for_each(self.shards(), |shard| {
            for (name, entry) in &shard.tensors {
                let whole = self.read_entry(shard, name, entry, &Window::WHOLE)?;
                check_finite(shard, name, &whole)?;
                tensors.fetch_add(1, Ordering::Relaxed);
            }
            let digest = (shard.name.clone(), manifest::digest(shard)?);
            let mut digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
            digests.push(digest);
            let done = done.fetch_add(shard.len as u64, Ordering::Relaxed) + shard.len as u64;
            progress(done, bytes);
            Ok(())
        })?;
        let mut digests = digests.into_inner().unwrap_or_else(PoisonError::into_inner);
        digests.sort_unstable();
        Ok(VerifyReport {
            digests,
            tensors: tensors.into_inner(),
            bytes,
        })
    }
}

fn check_finite(shard: &Shard, name: &str, bytes: &TensorBytes) -> Result<(), Error> {
    let tensor = bytes.view();
    let (rows, cols) = (tensor.rows, tensor.cols);
    let mut values = vec![0.0; if rows > 0 { cols } else { 0 }];
    for row in 0..rows {
        tensor.read_row(row, 0, &mut values);
        if let Some(col) = values.iter().position(|x| !x.is_finite()) {
            let got = values[col];
            return Err(Error::Tensor {
                file: shard.name.clone(),
                tensor: name.to_owned(),
                what: format!("row {row} column {col} is {got}, expected a finite number"),
            });
        }
    }
    Ok(())
}
