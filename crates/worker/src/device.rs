//! Decides once what a worker computes on, and what memory that has. Computes nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
pub use tramontane_compute_cuda::device::Device;
use tramontane_compute_cuda::{
    CudaConfig, DeviceChoice, DeviceSummary, KernelCache, LibraryDirs, Unusable, working_bytes,
};
use tramontane_runtime::config::cache_dir;
use tramontane_types::ModelGeometry;

use crate::{ConfigError, WorkerConfig};

/// What of a device's memory is left to the driver, one part in so many.
const DRIVER_PARTS: u64 = 20;
/// Of what the other weights and the buffers of a step leave, the parts that experts and the KV cache get when nobody says how much:
/// of Mixtral's weights experts are 97 %.
const EXPERT_PARTS: u64 = 7;
const KV_PARTS: u64 = 2;

/// Devices of this process that are in use, by number: workers of one process share them.
static IN_USE: Mutex<BTreeMap<u32, Weak<dyn Device>>> = Mutex::new(BTreeMap::new());

/// Keeps the chosen device in use, so that what follows finds it open.
#[derive(Clone, Debug, Default)]
pub struct ChosenDevice {
    device: Option<Arc<dyn Device>>,
}

impl ChosenDevice {
    /// The GPU; none is the CPU.
    #[must_use]
    pub const fn gpu(&self) -> Option<&Arc<dyn Device>> {
        self.device.as_ref()
    }
}

/// Puts a device in the place of a GPU, for tests; as long as the caller keeps it.
#[doc(hidden)]
pub fn provide(ordinal: u32, device: &Arc<dyn Device>) {
    IN_USE.lock().insert(ordinal, Arc::downgrade(device));
}

/// Decides what `config` computes a model of `geometry` on, and puts it there: the device, and the memory where none
/// was said. `auto` says in one line of the log what it takes and why not a GPU.
///
/// # Errors
/// When a GPU was asked for that cannot be used: what is missing, and how to go on.
pub fn choose(
    config: &mut WorkerConfig,
    geometry: &ModelGeometry,
) -> Result<ChosenDevice, ConfigError> {
    match config.device {
        DeviceChoice::Cpu => Ok(ChosenDevice::default()),
        DeviceChoice::Cuda(ordinal) => {
            let fits = fits(config, geometry);
            let opened = fits.and_then(|()| open_for(config, ordinal));
            let device = opened.map_err(|why| {
                let rule = format!("a device that can be used, but {why}");
                ConfigError::new("device", &rule, &config.device)
            })?;
            take(config, device.info().memory_bytes, geometry);
            Ok(ChosenDevice {
                device: Some(device),
            })
        }
        DeviceChoice::Auto => Ok(automatic(config, geometry)),
    }
}

/// A GPU if one can be used, otherwise the CPU.
fn automatic(config: &mut WorkerConfig, geometry: &ModelGeometry) -> ChosenDevice {
    let found = fits(config, geometry).and_then(|()| {
        let found = tramontane_compute_cuda::find();
        let DeviceSummary { ordinal, .. } = found.map_err(|error| with_cause(&error))?;
        Ok((open_for(config, ordinal)?, ordinal))
    });
    match found {
        Ok((device, ordinal)) => {
            tracing::info!(
                device = ordinal,
                name = device.info().name,
                "computing on a gpu"
            );
            config.device = DeviceChoice::Cuda(ordinal);
            take(config, device.info().memory_bytes, geometry);
            ChosenDevice {
                device: Some(device),
            }
        }
        Err(why_no_gpu) => {
            tracing::info!(why_no_gpu, "computing on the cpu");
            config.device = DeviceChoice::Cpu;
            ChosenDevice::default()
        }
    }
}

/// Whether the CUDA backend has these formats and shapes on some device.
fn fits(config: &WorkerConfig, geometry: &ModelGeometry) -> Result<(), String> {
    tramontane_compute_cuda::check_format(config.weights, None)
        .and_then(|()| tramontane_compute_cuda::check_geometry(geometry))
        .map_err(|error| error.to_string())
}

/// The device, if it has kernels for the weights.
fn open_for(config: &WorkerConfig, ordinal: u32) -> Result<Arc<dyn Device>, String> {
    let device = open(config, ordinal).map_err(|error| with_cause(&error))?;
    tramontane_compute_cuda::check_format(config.weights, Some(device.info().target))
        .map_err(|error| error.to_string())?;
    Ok(device)
}

/// Memory that nobody said is a share of what the device has left. What was only measured on CPUs is off.
fn take(config: &mut WorkerConfig, memory: u64, geometry: &ModelGeometry) {
    let working = working_bytes(geometry, config.weights, config.max_step_rows);
    let left = memory.saturating_sub(memory / DRIVER_PARTS + working);
    let class = config.numeric_class.as_ref();
    let (experts, kv) = match class.is_some_and(|c| c.parts_attention() && config.roles.0.attention)
    {
        true => (0, 1),
        false => (EXPERT_PARTS, KV_PARTS),
    };
    let part = left / (experts + kv);
    config.expert_memory.get_or_insert(experts * part);
    config.kv_memory.get_or_insert(kv * part);
    config.lookup_tokens.get_or_insert(0);
}

/// The device, opened by whoever asks first.
fn open(config: &WorkerConfig, ordinal: u32) -> Result<Arc<dyn Device>, Unusable> {
    let mut in_use = IN_USE.lock();
    if let Some(device) = in_use.get(&ordinal).and_then(Weak::upgrade) {
        return Ok(device);
    }
    let cache = config.kernel_cache.clone().or_else(cache_dir);
    let config = CudaConfig {
        libraries: LibraryDirs {
            named: config.cuda_libraries.clone(),
        },
        cache: cache.map(KernelCache::new),
    };
    let device = tramontane_compute_cuda::open(ordinal, &config)?;
    in_use.insert(ordinal, Arc::downgrade(&device));
    Ok(device)
}

fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) if !error.to_string().contains(&cause.to_string()) => {
            format!("{error}: {}", with_cause(cause))
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use tramontane_compute::WeightFormat;

    use super::*;

    fn geometry() -> ModelGeometry {
        ModelGeometry {
            hidden: 64,
            num_layers: 1,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            ff: 96,
            num_experts: 4,
            top_k: 2,
            vocab: 50,
            rope_theta: 1e6,
            rms_eps: 1e-5,
            sliding_window: None,
            max_positions: 256,
        }
    }

    fn config(device: DeviceChoice, weights: WeightFormat) -> WorkerConfig {
        WorkerConfig {
            device,
            weights,
            ..WorkerConfig::default()
        }
    }

    #[test]
    fn a_gpu_for_weights_that_it_does_not_have_is_refused_by_name() {
        let mut config = config(DeviceChoice::Cuda(0), WeightFormat::Q8);
        let error = choose(&mut config, &geometry()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "device must be a device that can be used, but backend cuda offers weights as bf16, e4m3 or q4, got q8, got cuda:0"
        );
    }

    #[test]
    fn automatic_takes_the_cpu_where_the_formats_need_it() {
        let mut config = config(DeviceChoice::Auto, WeightFormat::Q8);
        assert!(choose(&mut config, &geometry()).unwrap().gpu().is_none());
        assert_eq!(config.device, DeviceChoice::Cpu);
        assert_eq!(config.expert_memory, None);
    }

    #[test]
    fn a_gpu_that_is_not_there_is_a_configuration_error() {
        // No machine has so many.
        let mut config = config(DeviceChoice::Cuda(99), WeightFormat::Bf16);
        let error = choose(&mut config, &geometry()).unwrap_err();
        assert_eq!(
            (error.key.as_str(), error.got.as_str()),
            ("device", "cuda:99")
        );
    }

    #[test]
    fn what_the_other_weights_leave_is_for_experts_and_cache() {
        let mixtral = ModelGeometry {
            hidden: 4096,
            num_layers: 32,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            ff: 14_336,
            num_experts: 8,
            vocab: 32_000,
            ..geometry()
        };
        let shares = |config: WorkerConfig, memory: u64| {
            let mut config = config;
            take(&mut config, memory, &mixtral);
            (config.expert_bytes() >> 20, config.kv_bytes() >> 20)
        };
        let bf16 = || config(DeviceChoice::Cuda(0), WeightFormat::Bf16);
        // Attention, embedding and head are 3.2 GB, buffers of 2,048 rows 0.8.
        assert_eq!(shares(bf16(), 24 << 30), (15_074, 4_307));
        // All experts of Mixtral 8x7B in bf16: 86,016 MiB.
        assert_eq!(shares(bf16(), 141_000_000_000).0, 96_272);
        assert_eq!(shares(bf16(), 2 << 30), (0, 0));
        let attends = WorkerConfig {
            numeric_class: Some("a+b".parse().unwrap()),
            roles: "attention".parse().unwrap(),
            ..bf16()
        };
        assert_eq!(shares(attends, 24 << 30), (0, 19_381));
        let told = WorkerConfig {
            kv_memory: Some(1 << 20),
            ..bf16()
        };
        assert_eq!(shares(told, 24 << 30), (15_074, 1));
    }
}
