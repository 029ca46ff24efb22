//! Chooses the backend by device and weight format, and who computes with it: this process, or an island of them. The only
//! place that knows more than one.

use std::sync::Arc;

use tramontane_compute::{Backend, Bf16Rows, Experts, WeightFormat, reference::ReferenceBackend};
use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_compute_cuda::CudaBackend;
use tramontane_model::Checkpoint;
use tramontane_types::ModelGeometry;

use crate::device::ChosenDevice;
use crate::island::rank::hello;
use crate::island::{Hub, HubConfig, IslandExperts};
use crate::part::Place;
use crate::{ConfigError, Error, WorkerConfig};

/// What a worker computes with.
#[derive(Clone, Debug)]
pub(crate) struct Computing {
    pub(crate) backend: Arc<dyn Backend>,
    /// Its experts; those of all ranks on an island.
    pub(crate) experts: Arc<dyn Experts>,
    /// Of a worker that is an island.
    pub(crate) hub: Option<Arc<Hub>>,
    pub(crate) place: Place,
}

impl Computing {
    /// What a worker of this configuration computes with, made on a thread that may take its time.
    pub(crate) async fn make(
        config: &WorkerConfig,
        device: &ChosenDevice,
        checkpoint: &Arc<Checkpoint>,
    ) -> Result<Self, Error> {
        let (config, device, checkpoint) = (config.clone(), device.clone(), Arc::clone(checkpoint));
        let what = "making the backend";
        tokio::task::spawn_blocking(move || Self::new(&config, &device, &checkpoint))
            .await
            .map_err(|source| Error::Task { what, source })?
    }

    fn new(
        config: &WorkerConfig,
        device: &ChosenDevice,
        checkpoint: &Checkpoint,
    ) -> Result<Self, Error> {
        let geometry = checkpoint.geometry();
        let on_gpu = on_gpu(device, geometry, config.weights)?;
        if config.leads() {
            return Self::of_leader(config, device, checkpoint, on_gpu);
        }
        let backend: Arc<dyn Backend> = match on_gpu {
            Some(backend) => backend,
            None => on_cpu(config, geometry)?,
        };
        let place = Place::of(config, &*backend, geometry.num_layers)?;
        let (own, format) = (backend.experts(), backend.row_format());
        let experts = match place.row_format == format {
            true => own,
            false => Arc::new(Bf16Rows::new(own, format, geometry.hidden)),
        };
        Ok(Self {
            experts,
            backend,
            hub: None,
            place,
        })
    }

    fn of_leader(
        config: &WorkerConfig,
        device: &ChosenDevice,
        checkpoint: &Checkpoint,
        backend: Option<Arc<CudaBackend>>,
    ) -> Result<Self, Error> {
        let Some((gpu, backend)) = device.gpu().zip(backend) else {
            let rule = "a GPU for an island";
            return Err(ConfigError::new("device", rule, &config.device).into());
        };
        let hub_config = HubConfig {
            num_ranks: config.island_ranks,
            form_wait: config.island_form_wait,
            step_max: config.island_step_deadline,
            hello: hello(config, &backend, checkpoint),
            geometry: checkpoint.geometry().clone(),
        };
        let (own, row_format) = (backend.experts(), backend.row_format());
        let (of_hub, gpu) = (Arc::clone(&backend), Arc::clone(gpu));
        let hub = Hub::new(hub_config, of_hub, gpu, Arc::clone(&own));
        let experts = IslandExperts::new(Arc::clone(&hub), own, row_format);
        let place = Place::of(config, &*backend, checkpoint.geometry().num_layers)?;
        Ok(Self {
            backend,
            experts: Arc::new(experts),
            hub: Some(hub),
            place,
        })
    }
}

/// The backend of a GPU, for whoever knows more of it than other backends have.
fn on_gpu(
    device: &ChosenDevice,
    geometry: &ModelGeometry,
    weights: WeightFormat,
) -> Result<Option<Arc<CudaBackend>>, Error> {
    let backend = device
        .gpu()
        .map(|gpu| CudaBackend::new(gpu, geometry, weights));
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
