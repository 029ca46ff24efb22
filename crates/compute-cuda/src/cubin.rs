//! Reads what a compiled module needs from its ELF: registers, shared memory, stack. Runs nothing.

use std::collections::BTreeMap;

/// What one kernel takes of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelUsage {
    /// Registers of a thread.
    pub registers: u32,
    /// Shared memory of a block that is fixed at compile time, in bytes.
    pub shared_bytes: u32,
    /// Local memory of a thread: what did not fit its registers, in bytes.
    pub stack_bytes: u32,
}

/// `.nv.info` attributes; not documented, but the same since CUDA 11.
const ATTRIBUTE_FRAME_SIZE: u8 = 0x11;
const ATTRIBUTE_REGISTERS: u8 = 0x2f;
/// An attribute whose size stands behind its name.
const FORMAT_SIZED: u8 = 0x04;
/// Types of ELF sections.
const SECTION_SYMBOLS: u32 = 2;

/// The kernels of a module, by name; `None` when the bytes are no such module.
#[must_use]
pub(crate) fn kernels(cubin: &[u8]) -> Option<BTreeMap<String, KernelUsage>> {
    let elf = Elf::parse(cubin)?;
    let mut kernels = BTreeMap::new();
    for section in &elf.sections {
        if let Some(kernel) = section.name.strip_prefix(".text.") {
            kernels.insert(kernel.to_owned(), KernelUsage::default());
        }
    }
    for section in &elf.sections {
        let kernel = section.name.strip_prefix(".nv.shared.");
        if let Some(usage) = kernel.and_then(|kernel| kernels.get_mut(kernel)) {
            usage.shared_bytes = section.size as u32;
        }
    }
    if kernels.is_empty() {
        // Everything in it is for other targets.
        return Some(kernels);
    }
    let symbols = elf.symbols()?;
    let info = elf.sections.iter().find(|s| s.name == ".nv.info")?;
    for (attribute, symbol, value) in info_values(elf.bytes_of(info)?) {
        let kernel = symbols.get(symbol as usize);
        let Some(usage) = kernel.and_then(|kernel| kernels.get_mut(*kernel)) else {
            continue;
        };
        match attribute {
            ATTRIBUTE_REGISTERS => usage.registers = value,
            ATTRIBUTE_FRAME_SIZE => usage.stack_bytes = value,
            _ => {}
        }
    }
    Some(kernels)
}

/// `(attribute, symbol, value)` of all attributes that say a number of a symbol.
fn info_values(mut info: &[u8]) -> Vec<(u8, u32, u32)> {
    let mut values = Vec::new();
    while let [format, attribute, low, high, rest @ ..] = info {
        let size = match *format {
            FORMAT_SIZED => usize::from(u16::from_le_bytes([*low, *high])),
            _ => 0,
        };
        let Some((payload, after)) = rest.split_at_checked(size) else {
            break;
        };
        if let (Some(symbol), Some(value)) = (u32_at(payload, 0), u32_at(payload, 4)) {
            values.push((*attribute, symbol, value));
        }
        info = after;
    }
    values
}

/// The parts of an ELF file of 64 bits that are used here.
struct Elf<'a> {
    bytes: &'a [u8],
    sections: Vec<Section<'a>>,
}

struct Section<'a> {
    name: &'a str,
    kind: u32,
    offset: usize,
    size: usize,
    link: u32,
}

impl<'a> Elf<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        if !bytes.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let table = u64_at(bytes, 0x28)?;
        let entry_bytes = usize::from(u16_at(bytes, 0x3a)?);
        let count = usize::from(u16_at(bytes, 0x3c)?);
        let names = usize::from(u16_at(bytes, 0x3e)?);
        let header = |index: usize| bytes.get(table + index * entry_bytes..);
        let names_at = u64_at(header(names)?, 0x18)?;
        let mut sections = Vec::with_capacity(count);
        for index in 0..count {
            let header = header(index)?;
            sections.push(Section {
                name: text_at(bytes, names_at + u32_at(header, 0)? as usize)?,
                kind: u32_at(header, 4)?,
                offset: u64_at(header, 0x18)?,
                size: u64_at(header, 0x20)?,
                link: u32_at(header, 0x28)?,
            });
        }
        Some(Self { bytes, sections })
    }

    fn bytes_of(&self, section: &Section<'_>) -> Option<&'a [u8]> {
        self.bytes
            .get(section.offset..section.offset.checked_add(section.size)?)
    }

    /// Names of all symbols, in order.
    fn symbols(&self) -> Option<Vec<&'a str>> {
        const SYMBOL_BYTES: usize = 24;
        let table = self.sections.iter().find(|s| s.kind == SECTION_SYMBOLS)?;
        let names = self.sections.get(table.link as usize)?.offset;
        self.bytes_of(table)?
            .chunks_exact(SYMBOL_BYTES)
            .map(|symbol| text_at(self.bytes, names + u32_at(symbol, 0)? as usize))
            .collect()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    let value = u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?);
    usize::try_from(value).ok()
}

fn text_at(bytes: &[u8], at: usize) -> Option<&str> {
    let rest = bytes.get(at..)?;
    let end = rest.iter().position(|&byte| byte == 0)?;
    std::str::from_utf8(&rest[..end]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_module_is_none() {
        assert_eq!(kernels(b""), None);
        assert_eq!(kernels(b"\x7fELF\x02\x01"), None);
        assert_eq!(kernels(&[0x7f; 200]), None);
    }

    #[test]
    fn attributes_without_a_size_are_stepped_over() {
        let info = [
            [0x03, 0x01, 0, 0].as_slice(),
            &[0x04, ATTRIBUTE_REGISTERS, 8, 0, 5, 0, 0, 0, 40, 0, 0, 0],
            &[0x04, ATTRIBUTE_FRAME_SIZE, 8, 0],
        ]
        .concat();
        assert_eq!(info_values(&info), [(ATTRIBUTE_REGISTERS, 5, 40)]);
    }
}
