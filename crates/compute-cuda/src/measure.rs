//! How fast a device moves memory, the yardstick of everything that is bound by it. Judges nothing.

use std::sync::Arc;

use crate::device::{Buffer, Device, DeviceError, Event, Stream};

/// Copied at once: far more than caches hold.
const COPY_BYTES: usize = 1 << 30;
/// Copies that are timed, after one that is not.
const COPIES: usize = 10;

/// Bytes per second of a copy on the device, read and written bytes together.
///
/// # Errors
/// When the device has not twice a gibibyte left, or refuses.
pub fn copy_bandwidth(device: &Arc<dyn Device>) -> Result<f64, DeviceError> {
    let [from, to] = [
        Buffer::new(device, COPY_BYTES)?,
        Buffer::new(device, COPY_BYTES)?,
    ];
    let stream = Stream::new(device)?;
    stream.fill(&from, 1)?;
    let (begin, end) = (Event::new(device)?, Event::new(device)?);
    for copy in 0..=COPIES {
        if copy == 1 {
            begin.record(&stream)?;
        }
        // SAFETY: both buffers live until the wait in `elapsed_ms`.
        unsafe {
            device.copy_within(to.address(), from.address(), COPY_BYTES, stream.handle())?;
        }
    }
    end.record(&stream)?;
    let seconds = f64::from(begin.elapsed_ms(&end)?) / 1000.0;
    stream.synchronize()?;
    Ok((2 * COPIES * COPY_BYTES) as f64 / seconds)
}
