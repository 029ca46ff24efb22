//! The CPU backend: checks the model's shape once and makes the two halves. Computes nothing itself.

use std::num::NonZeroUsize;
use std::sync::Arc;

use tramontane_compute::{
    Attention, AttentionConfig, AttentionWeights, Backend, Error, Experts, RowFormat, WeightFormat,
};
use tramontane_types::ModelGeometry;

use crate::attention::CpuAttention;
use crate::context::{Context, check_size};
use crate::experts::{CpuExperts, Segment};
use crate::isa::{Isa, UnsupportedIsa};
use crate::memory::Slab;
use crate::pack::PackFormat;
use crate::pool::Pool;

/// How a [`CpuBackend`] computes; neither field changes a result, but an `isa` changes the bf16 class.
#[derive(Clone, Copy, Debug)]
pub struct CpuConfig {
    /// Threads of the compute pool, the calling thread included.
    pub threads: NonZeroUsize,
    /// The instruction set; `None` takes the best that this machine has.
    pub isa: Option<Isa>,
}

/// Computes on this machine's CPU.
#[derive(Debug)]
pub struct CpuBackend {
    context: Arc<Context>,
    class: &'static str,
}

impl CpuBackend {
    /// A backend for one model. Starts the threads of the pool; they end with the last of the backend
    /// and its halves.
    ///
    /// # Errors
    /// When the geometry contradicts itself, there are no kernels for the weight format, this machine
    /// lacks the instruction set, or the system refuses a thread.
    pub fn new(
        geometry: &ModelGeometry,
        format: WeightFormat,
        config: CpuConfig,
    ) -> Result<Self, Error> {
        check_geometry(geometry)?;
        let format = PackFormat::try_from(format)?;
        let isa = config.isa.unwrap_or_else(Isa::detect);
        let dispatch = isa.dispatch().ok_or_else(|| Error::Library {
            operation: "choosing the instruction set",
            source: Box::new(UnsupportedIsa {
                wanted: isa,
                best: Isa::detect(),
            }),
        })?;
        let pool = Pool::new(config.threads).map_err(|e| Error::Library {
            operation: "starting the compute threads",
            source: Box::new(e),
        })?;
        let class = match format {
            PackFormat::Bf16 => dispatch.bf16_class(),
            PackFormat::Q8 => "cpu-q8",
            PackFormat::Q4 => "cpu-q4",
        };
        tracing::info!(%isa, class, threads = pool.threads(), "cpu backend ready");
        let context = Context {
            geometry: geometry.clone(),
            format,
            dispatch,
            pool,
            weights: Slab::new(),
        };
        Ok(Self {
            context: Arc::new(context),
            class,
        })
    }
}

impl Backend for CpuBackend {
    fn numeric_class(&self) -> &str {
        self.class
    }

    fn row_format(&self) -> RowFormat {
        self.context.row_format()
    }

    fn segment_bytes(&self) -> u64 {
        Segment::bytes_max(&self.context) as u64
    }

    fn attention(
        &self,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Box<dyn Attention>, Error> {
        let attention = CpuAttention::new(Arc::clone(&self.context), weights, config)?;
        Ok(Box::new(attention))
    }

    fn experts(&self) -> Arc<dyn Experts> {
        Arc::new(CpuExperts::new(Arc::clone(&self.context)))
    }
}

fn check_geometry(geometry: &ModelGeometry) -> Result<(), Error> {
    let counts = [
        ("hidden", geometry.hidden),
        ("num_layers", geometry.num_layers),
        ("num_heads", geometry.num_heads),
        ("num_kv_heads", geometry.num_kv_heads),
        ("head_dim", geometry.head_dim),
        ("ff", geometry.ff),
        ("num_experts", geometry.num_experts),
        ("top_k", geometry.top_k),
        ("vocab", geometry.vocab),
        ("max_positions", geometry.max_positions),
        ("sliding_window", geometry.sliding_window.unwrap_or(1)),
    ];
    for (what, count) in counts {
        if count == 0 {
            check_size(what, 1, 0)?;
        }
    }
    check_size(
        "num_heads modulo num_kv_heads",
        0,
        geometry.num_heads % geometry.num_kv_heads,
    )?;
    check_size("head_dim modulo 2", 0, geometry.head_dim % 2)?;
    if geometry.top_k > geometry.num_experts {
        check_size("top_k", geometry.num_experts, geometry.top_k)?;
    }
    if geometry.num_experts > usize::from(u16::MAX) {
        check_size("num_experts", usize::from(u16::MAX), geometry.num_experts)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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

    fn config(isa: Option<Isa>) -> CpuConfig {
        CpuConfig {
            threads: NonZeroUsize::MIN,
            isa,
        }
    }

    #[test]
    fn the_class_names_what_decides_the_bits() {
        for isa in Isa::ALL {
            let bf16 = CpuBackend::new(&geometry(), WeightFormat::Bf16, config(Some(isa)));
            if !isa.is_supported() {
                assert!(matches!(bf16, Err(Error::Library { .. })), "{isa}");
                continue;
            }
            let expected = match isa {
                Isa::Amx => "cpu-bf16-amx",
                Isa::Avx512Bf16 => "cpu-bf16-dp",
                Isa::Avx512 | Isa::Avx2 | Isa::Scalar => "cpu-bf16",
            };
            assert_eq!(bf16.unwrap().numeric_class(), expected);
            let q8 = CpuBackend::new(&geometry(), WeightFormat::Q8, config(Some(isa))).unwrap();
            assert_eq!(
                (q8.numeric_class(), q8.row_format()),
                ("cpu-q8", RowFormat::Q8)
            );
            let q4 = CpuBackend::new(&geometry(), WeightFormat::Q4, config(Some(isa))).unwrap();
            assert_eq!(
                (q4.numeric_class(), q4.row_format()),
                ("cpu-q4", RowFormat::Q8)
            );
        }
    }

    #[test]
    fn what_it_cannot_compute_it_refuses() {
        let refused = CpuBackend::new(&geometry(), WeightFormat::F32, config(None));
        assert!(matches!(refused, Err(Error::WeightFormat { .. })));
        let refused = CpuBackend::new(&geometry(), WeightFormat::E4m3, config(None));
        assert_eq!(
            refused.unwrap_err().to_string(),
            "backend cpu offers weights as bf16, q8 or q4, got e4m3"
        );
        for broken in [
            ModelGeometry {
                head_dim: 15,
                ..geometry()
            },
            ModelGeometry {
                num_kv_heads: 3,
                ..geometry()
            },
            ModelGeometry {
                top_k: 5,
                ..geometry()
            },
            ModelGeometry {
                vocab: 0,
                ..geometry()
            },
        ] {
            let refused = CpuBackend::new(&broken, WeightFormat::Q8, config(None));
            assert!(matches!(refused, Err(Error::Shape { .. })), "{broken:?}");
        }
    }
}
