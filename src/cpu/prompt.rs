//! Reads a prompt and codes it in bases of its own: xKV, as [`compress::xkv`](crate::compress::xkv)
//! has it.
//!
//! The prompt goes through the model group by group of layers, not chunk by chunk: when it has gone
//! through one group its keys and values there are coded, and the exact ones are forgotten but for
//! sinks and the newest. So no more than one group's exact rows are ever in memory.

use super::cache::Cache;
use super::layer::ForwardPass;
use super::rope::Ropes;
use super::{CpuSequence, Model, RowType};
use crate::kv::{Call, Energy, Exact, KvSide, LatentSet, Saved};
use crate::linalg::{Moments, gram};
use crate::sequence::{Logits, Prompt, SequenceOptions};
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};
use std::ops::Range;
use std::sync::Arc;

impl Model {
    /// A sequence that has read `prompt`, coded in bases of its own, and the logits asked for.
    ///
    /// # Errors
    /// As [`PromptBases::rows`](crate::kv::PromptBases::rows) and
    /// [`CpuSequence::forward`](crate::sequence::Sequence::forward), and [`Error::Interrupted`]
    /// where the prompt is cancelled.
    pub fn read_prompt(self: &Arc<Self>, prompt: &Prompt, options: SequenceOptions, row_type: RowType) -> Result<(CpuSequence, Vec<f32>)> {
        let (config, tokens, count) = (&self.config, prompt.tokens, prompt.tokens.len());
        let (geometry, xkv) = (config.geometry(), prompt.bases.options());
        xkv.check_prompt(&geometry, count, options.capacity)?;
        let mut sequence = CpuSequence::for_prompt(self.clone(), options, xkv.layers > 1, row_type)?;
        sequence.cursor.check(tokens, config.vocab_size)?;
        sequence.ropes.reach(count);
        let exact_tokens = sequence.cursor.coding().map_or(Exact::default(), |coding| coding.schedule.exact);
        let coded = exact_tokens.coded(count);
        let mut set = LatentSet { specs: Vec::new(), coders: Vec::new(), exact: exact_tokens };
        let (mut words, mut energy) = (Vec::new(), Energy::default());
        let mut x = self.embed(tokens);
        for group in xkv.groups(&geometry) {
            let mut exact = Cache::new(group.clone(), geometry.kv_width(), count, row_type, None);
            for start in (0..count).step_by(CpuSequence::CHUNK) {
                prompt.cancel.check()?;
                let chunk = CpuSequence::CHUNK.min(count - start);
                let mut part = x.columns(start, chunk).into_owned();
                let call = Call::exact(start..start + chunk);
                for (within, layer) in self.layers[group.clone()].iter().enumerate() {
                    layer.apply(&mut part, within, &mut exact, ForwardPass { call: &call, ropes: &sequence.ropes }, None);
                }
                x.columns_mut(start, chunk).copy_from(&part);
            }
            let fitted = exact_tokens.sinks.min(count - 1)..count;
            let [keys, values] = [KvSide::Keys, KvSide::Values].map(|side| moments(&exact, side, fitted.clone(), &sequence.ropes));
            for ((spec, coder), side) in
                prompt.bases.rows(&geometry, &group, [&keys, &values], count)?.into_iter().zip([KvSide::Keys, KvSide::Values])
            {
                let mut packed = Vec::new();
                for tokens in blocks(0..coded) {
                    let (some, held) = coder.encode_measured(&exact.vectors(side, tokens, &sequence.ropes));
                    packed.extend(some);
                    energy += held;
                }
                words.push(packed);
                set.specs.push(spec);
                set.coders.push(coder);
            }
            sequence.cache.keep_exact(group.start, &exact, count);
            sequence.cache.make_landmarks(group.start, &exact, exact_tokens.sinks.min(coded)..coded);
        }
        sequence.adopt(Arc::new(set), words, energy, coded, count);
        let wanted = match prompt.logits {
            Logits::None => DMatrix::zeros(config.vocab_size, 0),
            Logits::Last => self.head(&x.columns(count - 1, 1).into_owned()),
            Logits::All => self.head(&x),
        };
        match wanted.iter().position(|logit| !logit.is_finite()) {
            None => Ok((sequence, wanted.data.into())),
            Some(at) => {
                let what = format!("the logits of the prompt, number {at}");
                Err(Error::Numeric { what, message: format!("is {}: the weights or the cached rows overflow", wanted[at]) })
            }
        }
    }

    /// A sequence that goes on from `saved`, which has bases of its own.
    ///
    /// # Errors
    /// As [`Sequence::restore`](crate::sequence::Sequence::restore), and [`Error::Argument`] where
    /// it has none.
    pub fn resume(self: &Arc<Self>, saved: &Saved, options: SequenceOptions, row_type: RowType) -> Result<CpuSequence> {
        CpuSequence::resumed(self.clone(), saved, saved.bases()?, options, row_type)
    }
}

/// Runs of tokens that are looked at together.
fn blocks(tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = tokens.end;
    tokens.step_by(CpuSequence::CHUNK).map(move |start| start..(start + CpuSequence::CHUNK).min(end))
}

/// Mean and second moment of one side over `tokens`.
fn moments(exact: &Cache, side: KvSide, tokens: Range<usize>, ropes: &Ropes) -> Moments {
    let count = tokens.len() as f64;
    let mut sums: Option<(DVector<f64>, DMatrix<f64>)> = None;
    for block in blocks(tokens) {
        let y = exact.vectors(side, block, ropes);
        let (mean, second) = sums.get_or_insert_with(|| (DVector::zeros(y.nrows()), DMatrix::zeros(y.nrows(), y.nrows())));
        y.column_iter().for_each(|column| mean.zip_apply(&column, |sum, x| *sum += f64::from(x)));
        second.zip_apply(&gram(&y), |sum, x| *sum += f64::from(x));
    }
    let (mean, second) = sums.unwrap_or_default();
    Moments { mean: mean.map(|x| (x / count) as f32), second: second.map(|x| (x / count) as f32) }
}
