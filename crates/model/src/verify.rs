//! Reads every byte of a checkpoint: digests, and that every number is finite. Changes nothing.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;
use tramontane_compute::HostTensor;

use crate::shard::Shard;
use crate::tensors::Entry;
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
        let bytes = self.shards().iter().map(Shard::len).sum();
        let (tensors, done) = (AtomicUsize::new(0), AtomicU64::new(0));
        let digests = Mutex::new(Vec::new());
        parallel::for_each(self.shards(), |shard| {
            for (name, entry) in &shard.tensors {
                check_finite(shard, name, entry)?;
                tensors.fetch_add(1, Ordering::Relaxed);
            }
            let digest = (shard.name.clone(), manifest::digest(shard.bytes.get()));
            let mut digests = digests.lock().unwrap_or_else(PoisonError::into_inner);
            digests.push(digest);
            let done = done.fetch_add(shard.len(), Ordering::Relaxed) + shard.len();
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

fn check_finite(shard: &Shard, name: &str, entry: &Entry) -> Result<(), Error> {
    // In range: `read_header` compared every offset with the file's length.
    let data = shard.bytes.get().get(entry.begin..entry.end);
    let data = data.unwrap_or_default();
    let cols = entry.shape.last().copied().unwrap_or(1).max(1);
    let row_bytes = entry.dtype.row_bytes(cols).unwrap_or(1).max(1);
    let rows = data.len() / row_bytes;
    let tensor = HostTensor {
        dtype: entry.dtype,
        rows,
        cols,
        order: Default::default(),
        data,
    };
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
