//! What all sequences of a model use in turns: scratch, what is bound to nothing else, and the way
//! logits are read back.

use super::Model;
use super::decode::DecodePlan;
use super::prefill::{AllLogits, PrefillPlan};
use super::scratch::{Buffers, CHUNK, Needs, Scratch, View, ropes};
use super::verify::VerifyPlan;
use crate::Result;
use crate::cache::Cache;
use crate::checkpoint::Rope;
use crate::decoder::latents::Latents;
use crate::kernels::AttentionBuffers;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// No submit should keep the device for longer: drivers stop those that take seconds, and the
/// screen stands still meanwhile.
const SUBMIT_SECONDS: f64 = 0.2;

/// One for a model. A call of a sequence has it to itself ([`lock`](Self::lock)).
pub(super) struct Executor(Mutex<Shared>);

/// What of a step belongs to no sequence: a new one plans its attention alone.
pub(super) struct ModelPlans {
    pub decode: DecodePlan,
    pub prefill: PrefillPlan,
}

/// The executor's state.
pub(super) struct Shared {
    /// What the largest of its sequences need, and the scratch for that.
    needs: Needs,
    scratch: Option<Scratch>,
    plans: Option<Arc<ModelPlans>>,
    /// How many times the scratch was made: plans are bound to one.
    pub generation: u64,
    /// Logits after every token of a chunk, once they have been asked for.
    pub all: Option<AllLogits>,
    /// What verifies drafts, once it has been asked for.
    verify: Option<Arc<VerifyPlan>>,
    /// The latest of any sequence, with which the next one begins.
    pub pacing: Pacing,
}

/// How much a submit is given, as the device turned out to be fast. Layouts and depths differ, so
/// each sequence has its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pacing {
    pub tokens_per_chunk: usize,
    pub layers_per_submit: usize,
}

impl Executor {
    pub fn new() -> Executor {
        let pacing = Pacing { tokens_per_chunk: CHUNK, layers_per_submit: 2 };
        Executor(Mutex::new(Shared { needs: Needs::default(), scratch: None, plans: None, generation: 0, all: None, verify: None, pacing }))
    }

    /// Waits for its turn.
    pub fn lock(&self) -> MutexGuard<'_, Shared> {
        // A call that panicked has left numbers behind that no other reads.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    /// Scratch for a sequence with this cache, which reads `coded` rows or none.
    ///
    /// Made anew where it is larger than any before.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory).
    pub fn buffers(&mut self, model: &Model, coded: Option<&Latents>, cache: &Cache) -> Result<Buffers> {
        let View { needs, columns, block } = View::new(model, coded, cache);
        // Where frequencies depend on the context they are a sequence's own.
        let own = model.config.ropes.iter().any(Rope::depends_on_context).then_some(needs.positions);
        let needs = needs.or(self.needs);
        let scratch = match &self.scratch {
            Some(scratch) if needs == self.needs => scratch.clone(),
            _ => {
                // The old one goes first: both may be too much. Sequences that are bound to it keep
                // it until their next call.
                (self.scratch, self.plans, self.all, self.verify) = (None, None, None, None);
                let scratch = Scratch::new(model, &needs)?;
                self.generation += 1;
                self.needs = needs;
                self.scratch.insert(scratch).clone()
            }
        };
        let attention = AttentionBuffers { columns, ..scratch.attention.clone() };
        let ropes = match own {
            Some(context) => ropes(&model.device, &model.config, context)?,
            None => scratch.ropes.clone(),
        };
        Ok(Buffers { scratch: Scratch { attention, ropes, ..scratch }, block })
    }

    /// What is bound to this scratch and to no sequence.
    ///
    /// # Errors
    /// [`Gpu`](crate::Error::Gpu) where the driver refuses a kernel.
    pub fn plans(&mut self, model: &Model, scratch: &Scratch) -> Result<Arc<ModelPlans>> {
        let plans = match self.plans.take() {
            Some(plans) => plans,
            None => Arc::new(ModelPlans {
                decode: DecodePlan::plan(model, scratch, [&scratch.logits, &scratch.token], 1)?,
                prefill: PrefillPlan::plan(model, scratch)?,
            }),
        };
        Ok(self.plans.insert(plans).clone())
    }

    /// Has all plans made anew, those of other sequences at their next call.
    pub fn replan(&mut self) {
        (self.plans, self.verify) = (None, None);
        self.generation += 1;
    }

    /// What verifies drafts.
    ///
    /// # Errors
    /// As [`all_logits`](Self::all_logits).
    pub fn verify(&mut self, model: &Model, scratch: &Scratch) -> Result<Arc<VerifyPlan>> {
        let plan = match self.verify.take() {
            Some(plan) => plan,
            None => Arc::new(VerifyPlan::plan(model, scratch)?),
        };
        Ok(self.verify.insert(plan).clone())
    }

    /// Plans logits after every token of a chunk, where they have not been.
    ///
    /// # Errors
    /// [`OutOfMemory`](crate::Error::OutOfMemory), and [`Gpu`](crate::Error::Gpu) where the driver
    /// refuses a kernel.
    pub fn all_logits(&mut self, model: &Model, buffers: &Buffers) -> Result<&AllLogits> {
        let all = match self.all.take() {
            Some(all) => all,
            None => AllLogits::plan(model, buffers, CHUNK)?,
        };
        Ok(self.all.insert(all))
    }

    /// Bytes of the scratch.
    pub fn bytes(&self) -> u64 {
        let all = self.all.as_ref().map_or(0, |all| all.logits.size() + all.readback.size());
        self.scratch.as_ref().map_or(0, Scratch::bytes) + all + self.verify.as_ref().map_or(0, |plan| plan.bytes())
    }
}

impl Pacing {
    /// By how long a layer takes a whole chunk, of a model of so many layers.
    pub fn new(layer_seconds: f64, layers: usize) -> Pacing {
        let tokens = if layer_seconds > SUBMIT_SECONDS { (CHUNK as f64 * SUBMIT_SECONDS / layer_seconds) as usize } else { CHUNK };
        let layers_per_submit = ((SUBMIT_SECONDS / layer_seconds) as usize).clamp(1, layers.max(1));
        Pacing { tokens_per_chunk: tokens.max(1), layers_per_submit }
    }
}
