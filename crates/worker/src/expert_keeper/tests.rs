//! Slices that do not compute what their weights say are refused, in every format.

use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_model::Checkpoint;
use tramontane_testkit::tiny::TinyModel;

use super::*;

const SLICE: ExpertSlice = ExpertSlice {
    layer: LayerId(1),
    expert: ExpertId(2),
    range: SegmentRange::WHOLE,
};

/// A backend that packs gate and up projection in each other's place.
#[derive(Debug)]
struct Swapped(Arc<dyn Experts>);

impl Experts for Swapped {
    fn load(
        &self,
        slice: ExpertSlice,
        weights: &ExpertWeights<'_>,
    ) -> Result<(), tramontane_compute::Error> {
        let (w1, w3) = (weights.w3, weights.w1);
        self.0.load(slice, &ExpertWeights { w1, w3, ..*weights })
    }

    fn unload(&self, slice: ExpertSlice) {
        self.0.unload(slice);
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        self.0.held(layer, expert)
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), tramontane_compute::Error> {
        self.0.compute(layer, rows, num_rows, jobs, out)
    }
}

fn backend(geometry: &ModelGeometry, weights: WeightFormat) -> Box<dyn Backend> {
    if weights == WeightFormat::F32 {
        return Box::new(ReferenceBackend::new(geometry));
    }
    let config = CpuConfig {
        threads: std::num::NonZeroUsize::MIN,
        isa: None,
    };
    Box::new(CpuBackend::new(geometry, weights, config).unwrap())
}

#[test]
fn a_slice_that_was_packed_wrongly_is_refused_and_not_held() {
    let directory = tempfile::tempdir().unwrap();
    let model = TinyModel::mixtral().experts(4).hidden(64).ff(256);
    model.write(directory.path()).unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    let geometry = checkpoint.geometry();
    let bytes = checkpoint
        .expert_weights(SLICE.layer, SLICE.expert, SLICE.range)
        .unwrap();
    let weights = bytes.weights();
    for format in [
        WeightFormat::F32,
        WeightFormat::Bf16,
        WeightFormat::Q8,
        WeightFormat::Q4,
    ] {
        let backend = backend(geometry, format);
        let keep = |inner| KeptExperts::new(inner, geometry.clone(), backend.row_format(), format);
        let good = keep(backend.experts());
        assert_eq!(good.probed_ns(), None);
        good.load(SLICE, &weights).unwrap();
        assert_eq!(good.held(SLICE.layer, SLICE.expert), u8::MAX);
        assert!(good.probed_ns().is_some());
        let swapped = keep(Arc::new(Swapped(backend.experts())));
        let error = swapped.load(SLICE, &weights).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(
            source.contains("layer 1 expert 2") && source.contains("not those of its weights"),
            "{format}: {source}"
        );
        assert!(swapped.held(SLICE.layer, SLICE.expert) & 1 == 0, "{format}");
    }
}
