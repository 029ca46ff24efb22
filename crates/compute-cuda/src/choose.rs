//! Which device computes: what was asked for, what is there, and what to do when they do not fit. Computes nothing.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cache::KernelCache;
use crate::cuda::{CudaDevice, DeviceSummary, Driver, NoDriver};
use crate::device::{Device, DeviceError};
use crate::kernels::{BuildError, KernelBuilder};
use crate::libraries::LibraryDirs;
use crate::target::Target;

/// What somebody wants to compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU when there is one that can be used, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// This GPU and nothing else.
    Cuda(u32),
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ordinal = text.strip_prefix("cuda:").map(str::parse);
        match (text, ordinal) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(Ok(ordinal))) => Ok(Self::Cuda(ordinal)),
            _ => Err(format!(
                "device must be auto, cpu or cuda:N such as cuda:0, got {text:?}"
            )),
        }
    }
}

impl Serialize for DeviceChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for DeviceChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a GPU cannot be used, and how to go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// No driver.
    #[error(
        "{0}. Install the driver, or start the container with GPUs; device cpu computes without"
    )]
    Driver(NoDriver),
    /// No such device.
    #[error("there is no device cuda:{ordinal}: this process sees {}", seen(.names))]
    NoDevice {
        /// What was asked for.
        ordinal: u32,
        /// Names of those that are there.
        names: Vec<String>,
    },
    /// There are no kernels for it.
    #[error("{name} has compute capability {}.{}, expected one of 8.x, 9.0, 10.0 or 12.x", capability.0, capability.1)]
    Capability {
        /// The device.
        name: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// Its kernels cannot be had.
    #[error("{}", build_text(.0))]
    Kernels(#[source] BuildError),
    /// The driver refuses the device.
    #[error("{name} cannot be used")]
    Device {
        /// The device.
        name: String,
        /// Why.
        #[source]
        source: DeviceError,
    },
}

fn seen(names: &[String]) -> String {
    match names {
        [] => "no GPU. Is CUDA_VISIBLE_DEVICES empty, or the container without GPUs?".to_owned(),
        names => names.join(", "),
    }
}

fn build_text(error: &BuildError) -> String {
    let BuildError::NoCompiler { target, source, .. } = error else {
        return error.to_string();
    };
    format!(
        "{error}: {source}. Install it (pip install nvidia-cuda-nvrtc==13.0.88) and name its directory with \
         cuda_libraries, or fill the cache elsewhere: tramontane kernels build --target {target}"
    )
}

/// What is needed to use a GPU, beside the GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CudaConfig {
    /// Where libraries are.
    pub libraries: LibraryDirs,
    /// Where compiled kernels are kept.
    pub cache: Option<KernelCache>,
}

/// Takes one GPU into use: finds it, gets its kernels, loads them.
///
/// # Errors
/// Why that is impossible, and how to go on.
pub fn open(ordinal: u32, config: &CudaConfig) -> Result<Arc<dyn Device>, Unusable> {
    let driver = Driver::open().map_err(Unusable::Driver)?;
    let devices = driver.devices().map_err(|source| Unusable::Device {
        name: format!("cuda:{ordinal}"),
        source,
    })?;
    let Some(device) = devices.iter().find(|device| device.ordinal == ordinal) else {
        let names = devices
            .into_iter()
            .map(|d| format!("cuda:{} ({})", d.ordinal, d.name));
        return Err(Unusable::NoDevice {
            ordinal,
            names: names.collect(),
        });
    };
    let target = target_of(device)?;
    let builder = KernelBuilder::new(&config.libraries, config.cache.clone());
    let modules = builder.build_all(target).map_err(Unusable::Kernels)?;
    let opened = CudaDevice::open(driver, device, target, &modules, &config.libraries);
    let opened = opened.map_err(|source| Unusable::Device {
        name: device.name.clone(),
        source,
    })?;
    tracing::info!(
        device = ordinal,
        name = device.name,
        %target,
        memory_bytes = device.memory_bytes,
        "gpu ready"
    );
    Ok(Arc::new(opened))
}

/// The first GPU that there are kernels for. Takes none into use, so it costs next to nothing.
///
/// # Errors
/// Why there is none.
pub fn find() -> Result<DeviceSummary, Unusable> {
    let driver = Driver::open().map_err(Unusable::Driver)?;
    let devices = driver.devices().map_err(|source| Unusable::Device {
        name: "the driver".to_owned(),
        source,
    })?;
    let mut refused = Unusable::NoDevice {
        ordinal: 0,
        names: Vec::new(),
    };
    for device in devices {
        match target_of(&device) {
            Ok(_) => return Ok(device),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

fn target_of(device: &DeviceSummary) -> Result<Target, Unusable> {
    device.target().ok_or_else(|| Unusable::Capability {
        name: device.name.clone(),
        capability: device.capability,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_survives_its_text() {
        for choice in [DeviceChoice::Auto, DeviceChoice::Cpu, DeviceChoice::Cuda(3)] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        for wrong in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "CUDA:0"] {
            let error = wrong.parse::<DeviceChoice>().unwrap_err();
            assert!(error.contains(&format!("{wrong:?}")), "{error}");
        }
    }

    #[test]
    fn a_machine_without_a_driver_says_so_and_does_not_panic() {
        let Err(error) = open(0, &CudaConfig::default()) else {
            println!("skipped: this machine has a GPU");
            return;
        };
        let Unusable::Driver(NoDriver::Missing) = error else {
            println!("skipped: this machine has a driver: {error}");
            return;
        };
        let text = error.to_string();
        assert!(text.contains("libcuda.so.1 was not found"), "{text}");
        assert!(text.contains("device cpu"), "{text}");
        assert_eq!(find().unwrap_err().to_string(), text);
    }
}
