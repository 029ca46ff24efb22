//! Chooses the backend by device and weight format. The only place that knows more than one.

use std::sync::Arc;

use tramontane_compute::{Backend, WeightFormat, reference::ReferenceBackend};
use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_compute_cuda::CudaBackend;
use tramontane_types::ModelGeometry;

use crate::device::ChosenDevice;
use crate::{Error, WorkerConfig};

/// The backend of a GPU, for whoever knows more of it than other backends have.
pub(crate) fn on_gpu(
    device: &ChosenDevice,
    geometry: &ModelGeometry,
) -> Result<Option<Arc<CudaBackend>>, Error> {
    let backend = device.gpu().map(|gpu| CudaBackend::new(gpu, geometry));
    let backend = backend.transpose().map_err(Error::Backend)?;
    Ok(backend.map(Arc::new))
}

/// The backend that a worker of this configuration computes with on the CPU, when no device was chosen.
pub(crate) fn on_cpu(
    config: &WorkerConfig,
    geometry: &ModelGeometry,
) -> Result<Arc<dyn Backend>, Error> {
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
