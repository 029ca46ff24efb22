//! Chooses the backend by device and weight format. The only place that knows more than one.

use std::sync::Arc;

use tramontane_compute::{Backend, WeightFormat, reference::ReferenceBackend};
use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_compute_cuda::CudaBackend;
use tramontane_types::ModelGeometry;

use crate::device::ChosenDevice;
use crate::{Error, WorkerConfig};

/// The backend that a worker of this configuration computes with.
pub(crate) fn make(
    config: &WorkerConfig,
    device: &ChosenDevice,
    geometry: &ModelGeometry,
) -> Result<Arc<dyn Backend>, Error> {
    if let Some(gpu) = device.gpu() {
        let backend = CudaBackend::new(gpu, geometry, config.weights).map_err(Error::Backend)?;
        return Ok(Arc::new(backend));
    }
    if config.weights == WeightFormat::F32 {
        return Ok(Arc::new(ReferenceBackend::new(geometry)));
    }
    let cpu = CpuConfig {
        threads: config.num_threads(),
        isa: None,
    };
    let backend = CpuBackend::new(geometry, config.weights, cpu).map_err(Error::Backend)?;
    Ok(Arc::new(backend))
}
