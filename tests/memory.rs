//! What is counted before anything is allocated is what is then allocated.

mod common;

use common::{SyntheticModel, compressed};
use lowkey::checkpoint::{Checkpoint, WeightStorage};
use lowkey::compress::{Method, Output, Plan};
use lowkey::cpu::{self, RowType};
use lowkey::decoder;
use lowkey::gpu::Options;
use lowkey::kv::{CacheMethod, Read};
use lowkey::sequence::{Sequence, SequenceOptions};
use lowkey::task::quietly;
use lowkey::{Device, Error, LoadOptions, Model};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

fn rotated(checkpoint: &Checkpoint, output: &Path) -> Checkpoint {
    let plan = Plan::new(Method::Dense { bits: 4 });
    lowkey::compress::run(checkpoint, &plan, None, &Output::adapter(output), &mut |_| ControlFlow::Continue(())).unwrap();
    Checkpoint::open_with(checkpoint.path(), output).unwrap()
}

/// What is planned and what is taken, on a GPU and on the processor.
fn assert_planned(what: &str, checkpoint: &Checkpoint, options: SequenceOptions) {
    let model = Arc::new(decoder::Model::load(checkpoint, common::device(Options::default())).unwrap());
    let (plan, sequence) = (decoder::plan_memory(checkpoint, WeightStorage::Stored, &options), model.sequence(options).unwrap());
    let memory = sequence.memory();
    // Buffers are whole vectors.
    let planned = plan.exact_rows + plan.coded_rows;
    assert!((planned..planned + 1024).contains(&memory.allocated_bytes), "{what}: {plan:?} {memory:?}");
    let scratch = plan.scratch as f64 / memory.scratch_bytes as f64;
    assert!((1.0..4.0).contains(&scratch), "{what}: {} planned, {} taken", plan.scratch, memory.scratch_bytes);
    assert!(plan.weights >= model.matrix_bytes() && plan.weights < 2 * model.matrix_bytes(), "{what}");

    let model = Arc::new(cpu::Model::load_as(checkpoint, WeightStorage::Stored, &mut quietly).unwrap());
    let (plan, sequence) = (cpu::plan_memory(checkpoint, WeightStorage::Stored, &options), model.sequence(options, RowType::F16).unwrap());
    assert_eq!(plan.exact_rows + plan.coded_rows, sequence.memory().allocated_bytes, "{what}, processor: {plan:?}");
    assert!(plan.weights >= model.matrix_bytes() && plan.weights < 2 * model.matrix_bytes(), "{what}, processor");
}

#[test]
fn what_is_planned_is_taken() {
    let synthetic = SyntheticModel { hidden: 128, heads: 4, kv_heads: 2, head_dim: 64, ..SyntheticModel::default() };
    let directory = synthetic.write_temporary();
    let dense = Checkpoint::open(directory.path()).unwrap();
    let four = rotated(&dense, &directory.path().join("four.lowkey"));
    let low_rank = compressed(&dense, 0.5, 1, &directory.path().join("half.lowkey"));
    for capacity in [40, 333, 3000] {
        let options = SequenceOptions::from(capacity);
        assert_planned("dense", &dense, options);
        assert_planned("four bits", &four, options);
        assert_planned("low rank", &low_rank, options);
        let some = CacheMethod::Calibrated(Read::top(Some(64)));
        assert_planned("chosen", &low_rank, SequenceOptions { method: some, ..options });
    }
}

/// A context that no memory holds is refused before it is tried, with one that fits.
#[test]
fn what_does_not_fit_is_refused_with_what_does() {
    let directory = SyntheticModel { context: 512, ..SyntheticModel::default() }.write_temporary();
    for device in [Device::Auto, Device::Cpu] {
        let model = Model::load(directory.path(), LoadOptions { device, ..LoadOptions::default() }).unwrap();
        let Err(Error::OutOfMemory { what, bytes }) = model.sequence(1 << 30) else { panic!("a thousand million tokens were not refused") };
        assert!(bytes > 1 << 36 && what.contains("1073741824 tokens") && what.contains("would fit"), "{what} {bytes}");
        // As many as it was trained for.
        assert_eq!(model.session(Default::default()).unwrap().capacity(), 512);
    }
}
