//! The matrix unit of Intel's CPUs: tiles of 16 rows by 64 bytes. Never runs where the CPU or the system lacks it.
//!
//! A packed panel of a block is a right-hand tile as it lies in memory, and a group of rows a left-hand
//! one, so tiles are loaded without rearranging anything. Instructions are those of Intel's "Software
//! Developer's Manual", volume 2, and are written as assembly because the compiler's intrinsics are not
//! stable.

mod bf16;
mod int8;

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use crate::avx512::Avx512;
use crate::kernels::tile::Tile;
use crate::pack::PackFormat;
use crate::rows::GROUP_ROWS;
use crate::simd::Simd;

/// Rows behind the last whole group that vectors multiply as fast as the matrix unit.
const VECTOR_ROWS_MAX: usize = 4;

/// The right to use the tile registers in this process, on a CPU that has them, and its vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Avx512<true>);

impl Amx {
    /// The proof, when this CPU has the instructions and the system lets this process use them.
    pub(crate) fn detect() -> Option<Self> {
        /// Features of CPUID leaf 7, register edx: bfloat16, tiles, int8.
        const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
        static PERMITTED: OnceLock<bool> = OnceLock::new();
        let vectors = Avx512::<true>::detect()?;
        let has_tiles = __cpuid_count(7, 0).edx & FEATURES == FEATURES;
        let is_permitted = has_tiles && *PERMITTED.get_or_init(ask_permission);
        is_permitted.then_some(Self(vectors))
    }

    /// The vector instructions beside the tiles.
    pub(crate) fn vectors(self) -> Avx512<true> {
        self.0
    }

    /// Computes a tile with the unit that is fastest for it; bfloat16 always on the matrix unit, whose
    /// rounding is part of the numeric class.
    pub(crate) fn tile(self, tile: Tile<'_>) {
        match tile.matrix.format() {
            PackFormat::Bf16 => self.0.vectorize(bf16::TileBf16 { proof: self, tile }),
            PackFormat::Q8 | PackFormat::Q4 => self.tile_int8(tile),
        }
    }

    /// Groups with more than a few rows on the matrix unit.
    fn tile_int8(self, tile: Tile<'_>) {
        let rest = tile.num_rows % GROUP_ROWS;
        let few = if rest <= VECTOR_ROWS_MAX { rest } else { 0 };
        let many = tile.num_rows - few;
        if many == 0 {
            return self.0.vectorize(tile);
        }
        let (out, rest_out) = tile.out.split_at_mut(many.next_multiple_of(GROUP_ROWS));
        let row_begin = tile.row_begin + many;
        let many = Tile {
            num_rows: many,
            out,
            ..tile
        };
        self.0.vectorize(int8::TileInt8 {
            proof: self,
            tile: many,
        });
        if few > 0 {
            let few = Tile {
                row_begin,
                num_rows: few,
                out: rest_out,
                ..tile
            };
            self.0.vectorize(few);
        }
    }
}

/// Asks Linux for the state of the tile registers, for all threads of this process: see
/// `Documentation/arch/x86/xstate.rst` of the kernel.
#[cfg(target_os = "linux")]
fn ask_permission() -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let mut result = SYS_ARCH_PRCTL;
    // SAFETY: this call takes two numbers, reads and writes no memory of ours, and changes nothing but
    // what the process may use. A kernel that does not know it answers with an error.
    unsafe {
        asm!(
            "syscall",
            inout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn ask_permission() -> bool {
    false
}

/// The shapes of the eight tile registers, in the layout of `ldtilecfg`.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// All registers 16 rows of 64 bytes.
    const FULL: Self = Self::new(16, 64, 16);

    /// For products of `rows` rows and 32 columns of bytes: left-hand tiles (4, 5) have rows of 32 bytes, right-hand
    /// ones (6, 7) 8 rows of 64.
    const fn of_32_bytes(rows: u8) -> Self {
        Self::new(rows, 32, 8)
    }

    const fn new(left_rows: u8, left_row_bytes: u16, right_rows: u8) -> Self {
        let mut row_bytes = [0; 16];
        let mut rows = [0; 16];
        let mut register = 0;
        while register < 8 {
            let is_left = register == 4 || register == 5;
            row_bytes[register] = if is_left { left_row_bytes } else { 64 };
            rows[register] = if register < 6 { left_rows } else { right_rows };
            register += 1;
        }
        Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes,
            rows,
        }
    }

    /// Sets the shapes on this thread and clears the registers.
    #[inline(always)]
    fn load(&'static self, _proof: Amx) {
        // SAFETY: the CPU has tiles and the process may use them, as `_proof` says; the shapes are valid,
        // and nothing else on this thread keeps anything in tile registers.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) self, options(nostack, readonly));
        }
    }
}
