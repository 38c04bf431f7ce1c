//! A sequence with no model behind it: logits that depend on every token before them, and a count
//! of the tokens that were run.

// Each test file uses a part of it.
#![allow(dead_code)]

use lowkey::sequence::{KvMemory, Logits, Sequence, StepCounters};
use lowkey::{Error, Result};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// Logits are a pseudo-random function of the whole prefix, so a cache that is off by one token
/// gives itself away.
pub struct Toy {
    pub vocab: usize,
    pub capacity: usize,
    pub chunk: usize,
    /// Added to every logit, scaled by the token's id: two toys that differ in it predict
    /// differently.
    pub tilt: f32,
    /// Tokens run through the model, by all calls.
    pub run: Arc<AtomicUsize>,
    /// How many tokens each call of `forward` was given.
    pub calls: Arc<Mutex<Vec<usize>>>,
    /// Calls of `forward` that fail, counted down: the last one does.
    pub fail_in: Option<usize>,
    /// What the cache holds.
    pub tokens: Vec<u32>,
}

impl Toy {
    pub fn new(vocab: usize, capacity: usize) -> Toy {
        Toy { vocab, capacity, chunk: 4, tilt: 0.0, run: Arc::default(), calls: Arc::default(), fail_in: None, tokens: Vec::new() }
    }

    /// What the model predicts after `prefix`, by definition.
    pub fn logits(&self, prefix: &[u32]) -> Vec<f32> {
        let state = prefix.iter().fold(0x1234_5678_9abc_def0u64, |state, &token| mix(state ^ u64::from(token)));
        (0..self.vocab as u64).map(|id| (mix(state ^ (id << 32)) >> 40) as f32 / (1 << 21) as f32 + self.tilt * id as f32).collect()
    }

    /// The greedy continuation of `prompt`, by definition.
    pub fn continuation(&self, prompt: &[u32], count: usize) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        for _ in 0..count {
            tokens.push(lowkey::logits::argmax(&self.logits(&tokens)).unwrap());
        }
        tokens.split_off(prompt.len())
    }
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 31)).wrapping_mul(0x7fb5_d329_728e_a185);
    let x = (x ^ (x >> 27)).wrapping_mul(0x81da_def4_bc2d_d44d);
    x ^ (x >> 33)
}

impl Sequence for Toy {
    fn position(&self) -> usize {
        self.tokens.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn chunk(&self) -> usize {
        self.chunk
    }

    fn forward(&mut self, tokens: &[u32], logits: Logits) -> Result<Vec<f32>> {
        let needed = self.tokens.len() + tokens.len();
        if needed > self.capacity {
            return Err(Error::Context { needed, capacity: self.capacity });
        }
        self.calls.lock().unwrap().push(tokens.len());
        self.run.fetch_add(tokens.len(), Ordering::Relaxed);
        let mut all = Vec::new();
        for (index, &token) in tokens.iter().enumerate() {
            self.tokens.push(token);
            if logits == Logits::All || (logits == Logits::Last && index + 1 == tokens.len()) {
                all.extend(self.logits(&self.tokens));
            }
        }
        if let Some(left) = &mut self.fail_in {
            *left = left.saturating_sub(1);
            if *left == 0 {
                // Half-way: the tokens are in the cache, the answer is not to be had. It works
                // again afterwards.
                self.fail_in = None;
                return Err(Error::DeviceLost { message: "the toy broke".into() });
            }
        }
        Ok(all)
    }

    fn step(&mut self, token: u32) -> Result<u32> {
        lowkey::logits::argmax(&self.forward(&[token], Logits::Last)?)
    }

    fn truncate(&mut self, position: usize) {
        self.tokens.truncate(position);
    }

    fn memory(&self) -> KvMemory {
        KvMemory { kv_bytes_per_token: 24, kv_fixed_bytes: 8, allocated_bytes: 24 * self.capacity as u64 + 8, scratch_bytes: 0 }
    }

    fn counters(&self) -> StepCounters {
        StepCounters { dispatches: 3, submits: 1, readback_bytes: 4 }
    }
}
