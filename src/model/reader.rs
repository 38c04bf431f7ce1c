//! Sequences of a model, on whatever it was loaded on.

use super::Weights;
use crate::kv::Saved;
use crate::sequence::{Prompt, Reader, Sequence, SequenceOptions};
use crate::{Result, cpu};

impl Reader for Weights {
    fn sequence(&self, options: SequenceOptions) -> Result<Box<dyn Sequence>> {
        match self {
            Weights::Cpu(model) => Ok(Box::new(model.sequence(options, cpu::RowType::F16)?)),
            Weights::Gpu(model) => Ok(Box::new(model.sequence(options)?)),
        }
    }

    fn resume(&self, saved: &Saved, options: SequenceOptions) -> Result<Box<dyn Sequence>> {
        match self {
            Weights::Cpu(model) => Ok(Box::new(model.resume(saved, options, cpu::RowType::F16)?)),
            Weights::Gpu(model) => Ok(Box::new(model.resume(saved, options)?)),
        }
    }

    fn prompt(&self, prompt: &Prompt, options: SequenceOptions) -> Result<(Box<dyn Sequence>, Vec<f32>)> {
        match self {
            Weights::Cpu(model) => model.read_prompt(prompt, options, cpu::RowType::F16).map(|(sequence, found)| (Box::new(sequence) as _, found)),
            Weights::Gpu(model) => model.read_prompt(prompt, options).map(|(sequence, found)| (Box::new(sequence) as _, found)),
        }
    }
}
