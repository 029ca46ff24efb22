//! The exactness contract on the reference backend: no bit of a row depends on anything but its own sequence.

use std::path::Path;

use tramontane_compute::reference::ReferenceBackend;
use tramontane_model::Checkpoint;
use tramontane_testkit::tiny::TinyModel;
use tramontane_types::TokenId;

use super::driver::{Driver, Part, pages};

/// Seven segments of which the last is short, a window that ends inside a page.
fn checkpoint(directory: &Path) -> Checkpoint {
    let model = TinyModel::mixtral().experts(5).top_k(3).hidden(40).ff(200);
    let model = model.heads(4, 2).head_dim(6).sliding_window(70);
    model.write(directory).unwrap();
    Checkpoint::open(directory).unwrap()
}

fn prompt(seed: u32, len: usize) -> Vec<TokenId> {
    (0..len as u32)
        .map(|i| (i * 31 + seed * 17 + i * i) % 97)
        .collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn neither_batch_nor_chunks_nor_pages_nor_slices_change_a_bit() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint(folder.path());
    let backend = ReferenceBackend::new(checkpoint.geometry());
    let prompts = [prompt(1, 150), prompt(2, 9), prompt(3, 70)];
    let whole = |tokens: &[TokenId]| {
        let part = Part {
            tokens,
            begin: 0,
            pages: pages(0, tokens.len()),
        };
        bits(&Driver::new(&checkpoint, &backend, &[0, 8]).step(&[part]))
    };
    let alone: Vec<Vec<u32>> = prompts.iter().map(|p| whole(p)).collect();
    for (cuts, chunk) in [
        (vec![0, 8], 7),
        (vec![0, 3, 8], 64),
        (vec![0, 1, 2, 5, 6, 7, 8], 33),
    ] {
        let mut driver = Driver::new(&checkpoint, &backend, &cuts);
        let mut together = [const { Vec::new() }; 3];
        let mut begin = 0;
        while begin < 150 {
            let mut parts = Vec::new();
            let mut owners = Vec::new();
            for (i, tokens) in prompts.iter().enumerate() {
                let end = (begin + chunk).min(tokens.len());
                if begin < end {
                    let tokens = &tokens[begin..end];
                    parts.push(Part {
                        tokens,
                        begin,
                        pages: pages(5 * i, 150),
                    });
                    owners.push((i, tokens.len() * checkpoint.geometry().vocab));
                }
            }
            let logits = driver.step(&parts);
            let mut rest = logits.as_slice();
            for (i, len) in owners {
                let (mine, others) = rest.split_at(len);
                together[i].extend(bits(mine));
                rest = others;
            }
            begin += chunk;
        }
        assert!(together.as_slice() == alone, "cuts {cuts:?} chunk {chunk}");
    }
}
