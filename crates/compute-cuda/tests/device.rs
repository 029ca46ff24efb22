//! The seam on the emulator: queues, graphs and refusals as the CUDA driver has them.
#![expect(clippy::unwrap_used, reason = "a test may panic, its functions too")]
#![expect(unsafe_code, reason = "what is queued is the caller's to keep")]

use std::path::Path;
use std::sync::Arc;

use tramontane_compute_cuda::Target;
use tramontane_compute_cuda::device::{Buffer, Device, DeviceError, Event, Pinned, Stream};
use tramontane_compute_cuda::emulator::Emulator;

fn device() -> Arc<dyn Device> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    Emulator::new(&dir, Target::Sm80).unwrap()
}

fn pinned(device: &Arc<dyn Device>, byte: u8) -> Pinned {
    let mut memory = Pinned::new(device, 64).unwrap();
    memory.as_mut_slice::<u8>().fill(byte);
    memory
}

fn read(stream: &Stream, buffer: &Buffer) -> Vec<u8> {
    let mut out = vec![0; buffer.bytes()];
    stream.read(buffer, 0, &mut out).unwrap();
    out
}

#[test]
fn what_is_queued_is_done_when_the_stream_is_waited_for() {
    let device = device();
    let stream = Stream::new(&device).unwrap();
    let buffer = Buffer::new(&device, 64).unwrap();
    let mut memory = pinned(&device, 1);
    // SAFETY: both live until the wait; that the memory changes meanwhile is what is looked at.
    unsafe { stream.upload(&buffer, &memory, 64) }.unwrap();
    memory.as_mut_slice::<u8>().fill(2);
    stream.synchronize().unwrap();
    assert_eq!(read(&stream, &buffer), [2; 64]);
}

#[test]
fn a_graph_does_nothing_until_it_is_launched() {
    let device = device();
    let stream = Stream::new(&device).unwrap();
    let buffer = Buffer::new(&device, 64).unwrap();
    let mut memory = pinned(&device, 1);
    stream.write(&buffer, 0, &[9; 64]).unwrap();
    // SAFETY: buffer and memory outlive the graph.
    let queue = || unsafe { stream.upload(&buffer, &memory, 32) };
    let graph = stream.capture::<DeviceError>(queue).unwrap();
    assert_eq!(read(&stream, &buffer), [9; 64]);
    for byte in [3, 4] {
        memory.as_mut_slice::<u8>().fill(byte);
        // SAFETY: as above.
        unsafe { stream.launch_graph(&graph) }.unwrap();
        stream.synchronize().unwrap();
        assert_eq!(read(&stream, &buffer)[31..33], [byte, 9]);
    }
}

#[test]
fn an_event_orders_two_streams() {
    let device = device();
    let [first, second] = [(); 2].map(|()| Stream::new(&device).unwrap());
    let [from, to] = [(); 2].map(|()| Buffer::new(&device, 64).unwrap());
    let memory = pinned(&device, 7);
    let mut out = pinned(&device, 0);
    let event = Event::new(&device).unwrap();
    first.fill(&to, 1).unwrap();
    // SAFETY: all of them live until both streams were waited for.
    unsafe {
        first.upload(&from, &memory, 64).unwrap();
        event.record(&first).unwrap();
        event.hold(&second).unwrap();
        second.download(&mut out, &from, 0, 64).unwrap();
    }
    second.synchronize().unwrap();
    assert_eq!(out.as_slice::<u8>(), [7; 64]);
    first.synchronize().unwrap();
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_queued() {
    let device = device();
    let stream = Stream::new(&device).unwrap();
    let buffer = Buffer::new(&device, 64).unwrap();
    for (begin, len) in [(0, 65), (64, 1), (usize::MAX, 2)] {
        let refused = stream.write(&buffer, begin, &vec![0; len]);
        assert!(
            matches!(refused, Err(DeviceError::Outside { .. })),
            "{begin} {len}"
        );
    }
    let memory = pinned(&device, 0);
    let large = Buffer::new(&device, 128).unwrap();
    // SAFETY: refused.
    let refused = unsafe { stream.upload(&large, &memory, 65) };
    assert!(matches!(refused, Err(DeviceError::Outside { .. })));
    assert!(matches!(
        Buffer::new(&device, 1 << 40),
        Err(DeviceError::OutOfMemory { .. })
    ));
    let missing = device.kernel("tr_no_such_kernel", 0).unwrap_err();
    assert_eq!(
        missing.to_string(),
        "no module has a kernel tr_no_such_kernel"
    );
    stream.synchronize().unwrap();
}
