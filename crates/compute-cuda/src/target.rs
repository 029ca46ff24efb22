//! What kernels are compiled for: one name per kind of device. Knows no device.

use std::fmt;
use std::str::FromStr;

/// A real architecture, as NVRTC's `--gpu-architecture` names it: its machine code, never PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A100, and by compatibility every other Ampere.
    Sm80,
    /// L4, L40, RTX 40.
    Sm89,
    /// H100, H200, with what only Hopper has (wgmma).
    Sm90a,
    /// B200.
    Sm100a,
    /// RTX PRO 6000, RTX 50.
    Sm120,
}

impl Target {
    /// All targets, oldest first.
    pub const ALL: [Self; 5] = [
        Self::Sm80,
        Self::Sm89,
        Self::Sm90a,
        Self::Sm100a,
        Self::Sm120,
    ];

    /// The name that the compiler knows.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm89 => "sm_89",
            Self::Sm90a => "sm_90a",
            Self::Sm100a => "sm_100a",
            Self::Sm120 => "sm_120",
        }
    }

    /// Whether a kernel may begin before the one in front has ended (programmatic dependent launch).
    #[must_use]
    pub const fn overlaps_kernels(self) -> bool {
        matches!(self, Self::Sm90a | Self::Sm100a | Self::Sm120)
    }

    /// What a device of compute capability `major.minor` runs; `None` when nothing here does.
    ///
    /// Machine code runs on later minor versions of its major one, but for that of `a` targets.
    #[must_use]
    pub const fn of_capability(major: i32, minor: i32) -> Option<Self> {
        match (major, minor) {
            (8, 9) => Some(Self::Sm89),
            (8, _) => Some(Self::Sm80),
            (9, 0) => Some(Self::Sm90a),
            (10, 0) => Some(Self::Sm100a),
            (12, _) => Some(Self::Sm120),
            _ => None,
        }
    }

    /// The numeric class of a backend on it with weights of `format`: tensor cores of two generations round alike
    /// nowhere that anybody promises.
    #[must_use]
    pub fn class(self, format: &str) -> String {
        format!("cuda-{}-{format}", self.name().replace('_', ""))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|target| target.name() == text);
        named.ok_or_else(|| {
            let names = Self::ALL.map(Self::name).join(", ");
            format!("target must be one of {names}, got {text:?}")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_names_and_devices() {
        for target in Target::ALL {
            assert_eq!(target.to_string().parse(), Ok(target));
        }
        assert!("sm_90".parse::<Target>().is_err());
        assert_eq!(Target::of_capability(8, 6), Some(Target::Sm80));
        assert_eq!(Target::of_capability(9, 0), Some(Target::Sm90a));
        assert_eq!(Target::of_capability(12, 1), Some(Target::Sm120));
        for none in [(7, 5), (10, 3), (11, 0), (13, 0)] {
            assert_eq!(Target::of_capability(none.0, none.1), None);
        }
        assert_eq!(Target::Sm90a.class("bf16"), "cuda-sm90a-bf16");
    }
}
