//! The one choice of instruction set. Nothing else in this crate asks what the CPU can do.

use std::fmt;
use std::sync::OnceLock;

use crate::kernels::tile::Tile;
use crate::scalar::Scalar;
use crate::simd::{Operation, Simd};

#[cfg(target_arch = "x86_64")]
use crate::{amx::Amx, avx2::Avx2, avx512::Avx512};

/// Instruction sets with kernels, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// [`Avx512Bf16`](Self::Avx512Bf16) and the matrix unit, AMX (Sapphire Rapids and later; Linux).
    Amx,
    /// AVX-512 with VNNI and the bfloat16 dot product (Zen 4, Sapphire Rapids and later).
    Avx512Bf16,
    /// AVX-512 with VNNI (Ice Lake and later).
    Avx512,
    /// AVX2, FMA and F16C.
    Avx2,
    /// Plain Rust: the specification.
    Scalar,
}

impl Isa {
    /// Every instruction set, best first.
    pub const ALL: [Self; 5] = [
        Self::Amx,
        Self::Avx512Bf16,
        Self::Avx512,
        Self::Avx2,
        Self::Scalar,
    ];

    /// The best one that this machine has.
    #[must_use]
    pub fn detect() -> Self {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let supported = Self::ALL.into_iter().find(|isa| isa.is_supported());
            supported.unwrap_or(Self::Scalar)
        })
    }

    /// Whether this machine has it.
    #[must_use]
    pub fn is_supported(self) -> bool {
        self.dispatch().is_some()
    }

    /// The kernels of this instruction set, `None` where this machine lacks it.
    pub(crate) fn dispatch(self) -> Option<Dispatch> {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Amx::detect().map(Dispatch::Amx),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Avx512::<true>::detect().map(Dispatch::Avx512Bf16),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Avx512::<false>::detect().map(Dispatch::Avx512),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Avx2::detect().map(Dispatch::Avx2),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Amx | Self::Avx512Bf16 | Self::Avx512 | Self::Avx2 => None,
            Self::Scalar => Some(Dispatch::Scalar(Scalar)),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Scalar => "scalar",
        })
    }
}

/// An instruction set that was asked for and that this machine lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this cpu does not have {wanted}, best is {best}")]
pub struct UnsupportedIsa {
    /// What was asked for.
    pub wanted: Isa,
    /// What this machine has.
    pub best: Isa,
}

/// The chosen instruction set, proven to be there.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Dispatch {
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16(Avx512<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    Scalar(Scalar),
}

impl Dispatch {
    /// Runs an operation compiled for the chosen instruction set.
    #[inline]
    pub(crate) fn run<O: Operation>(self, operation: O) -> O::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(amx) => amx.vectors().vectorize(operation),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(s) => s.vectorize(operation),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(s) => s.vectorize(operation),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(s) => s.vectorize(operation),
            Self::Scalar(s) => s.vectorize(operation),
        }
    }

    /// Computes a tile on the unit that is fastest for it.
    ///
    /// # Panics
    /// When the rows are not of the format that the matrix is multiplied with.
    #[inline]
    pub(crate) fn tile(self, tile: Tile<'_>) {
        let (rows, wanted) = (tile.rows.format(), tile.matrix.format().row_format());
        assert_eq!(rows, wanted, "format of the rows of a product");
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(amx) => amx.tile(tile),
            other => other.run(tile),
        }
    }

    /// The numeric class of bfloat16 products: an instruction that sums several of them rounds in its own
    /// way.
    pub(crate) fn bf16_class(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "cpu-bf16-amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16(_) => "cpu-bf16-dp",
            _ => "cpu-bf16",
        }
    }
}
