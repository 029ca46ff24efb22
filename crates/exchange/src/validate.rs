//! Checks a call that came from somebody else, once, before it is queued. Trusts no length.

use tramontane_types::ModelGeometry;

use crate::{CallLimits, ExpertCall, Job};

/// Says what in `call` does not fit the model or the limits.
pub(crate) fn check_call(
    call: &ExpertCall,
    geometry: &ModelGeometry,
    limits: &CallLimits,
) -> Result<(), String> {
    below("layer", usize::from(call.layer.0), geometry.num_layers)?;
    if call.num_rows == 0 || call.num_rows > limits.rows_max {
        return Err(format!(
            "{} rows, expected 1 to {}",
            call.num_rows, limits.rows_max
        ));
    }
    let expected = call.num_rows * limits.row_bytes;
    if call.rows.len() != expected {
        let (num_rows, got) = (call.num_rows, call.rows.len());
        return Err(format!(
            "{num_rows} rows of {got} bytes, expected {expected}"
        ));
    }
    if call.jobs.is_empty() {
        return Err("no jobs".to_owned());
    }
    let mut num_vectors = 0;
    for job in &call.jobs {
        num_vectors += check_job(job, call.num_rows, geometry)?;
        if num_vectors > limits.vectors_max {
            return Err(format!("more than {} output vectors", limits.vectors_max));
        }
    }
    Ok(())
}

/// The number of vectors that the job returns.
fn check_job(job: &Job, num_rows: usize, geometry: &ModelGeometry) -> Result<usize, String> {
    below("expert", usize::from(job.expert.0), geometry.num_experts)?;
    let num_nodes = job.range.num_nodes(geometry.num_segments());
    if num_nodes == 0 || job.row_ids.is_empty() {
        return Err(format!(
            "job of expert {} segments {} is empty",
            job.expert, job.range
        ));
    }
    for &row in &job.row_ids {
        below("row", row as usize, num_rows)?;
    }
    Ok(num_nodes * job.row_ids.len())
}

fn below(what: &str, got: usize, limit: usize) -> Result<(), String> {
    if got < limit {
        return Ok(());
    }
    Err(format!("{what} {got}, expected less than {limit}"))
}
