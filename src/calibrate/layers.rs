//! Calibration, layer by layer: all windows forward through each, then back.

use super::file::{Named, layer_name};
use super::moments::{Gathered, Group};
use super::options::{Need, Options, Seconds, SensitivityKind};
use super::sensitivity::{Gradients, sampled_loss};
use super::statistics::LayerStatistics;
use super::work::Work;
use crate::Result;
use crate::cpu::{ByLayer, Heads, Model, Observer};
use crate::kv::Exact;
use crate::linalg::{Moments, Random};
use crate::task::{OnProgress, report};
use nalgebra::DMatrix;
use sha2::{Digest, Sha256};
use std::ops::Range;
use std::time::Instant;

/// A layer takes about so many times as long backward as forward.
const BACKWARD: usize = 2;

/// A run.
pub(super) struct Layers<'a> {
    model: &'a Model,
    by_layer: ByLayer<'a>,
    windows: &'a [&'a [u32]],
    options: &'a Options,
    work: Work,
    pub(super) seconds: Seconds,
    /// Tokens through layers so far, and in all; those of other stages as it takes them.
    done: usize,
    total: usize,
}

/// Shown a layer on its way forward.
struct Watch<'a> {
    group: &'a mut Group,
    /// What enters the MLP, where a backward pass will want it.
    before_mlp: Option<DMatrix<f32>>,
}

impl Observer for Watch<'_> {
    fn residual(&mut self, state: usize, position: usize, x: &DMatrix<f32>) {
        if let (Some(before_mlp), false) = (&mut self.before_mlp, state.is_multiple_of(2)) {
            before_mlp.columns_mut(position, x.ncols()).copy_from(x);
        }
    }

    fn heads(&mut self, layer: usize, position: usize, heads: &Heads) {
        self.group.heads(layer, position, heads);
    }
}

impl<'a> Layers<'a> {
    /// `digests`: of what the run is of.
    pub(super) fn new(model: &'a Model, windows: &'a [&'a [u32]], options: &'a Options, digests: &[&str]) -> Result<Layers<'a>> {
        let tokens: usize = windows.iter().map(|window| window.len()).sum();
        let by_layer = ByLayer::new(model, windows.iter().map(|window| window.len()).max().unwrap_or(0))?;
        let work =
            Work::open(options.keep.as_deref(), &key(windows, options, digests), [model.config().hidden_size, tokens, states(model, options)])?;
        let layers = model.config().num_hidden_layers;
        let total = tokens * if full(options) { layers * (1 + BACKWARD) + loss_layers(model) } else { layers };
        Ok(Layers { model, by_layer, windows, options, work, seconds: Seconds::default(), done: 0, total })
    }

    /// Runs all that has not been run yet.
    pub(super) fn run(&mut self, on_progress: OnProgress<'_>) -> Result<()> {
        let layers = self.model.config().num_hidden_layers;
        for (index, group) in groups(layers, self.options.span).enumerate() {
            let part = format!("forward.{index}");
            if self.skipped(&part, group.len()) {
                continue;
            }
            let Gathered { moments, layers } = self.forward(group.clone(), on_progress)?;
            let mut tensors = Vec::from(Named::group(index, &moments));
            tensors.extend(group.zip(&layers).flat_map(|(layer, found)| Named::forward(layer, &found.post_rope_keys, &found.sample, &found.queries)));
            self.work.keep(&part, tensors)?;
        }
        if !full(self.options) {
            return Ok(());
        }
        if !self.skipped("loss", loss_layers(self.model)) {
            self.loss(on_progress)?;
            self.work.keep("loss", Vec::new())?;
        }
        for layer in (0..layers).rev() {
            let part = format!("backward.{layer}");
            if self.skipped(&part, BACKWARD) {
                continue;
            }
            let (sensitivity, fisher) = self.backward(layer, on_progress)?.finish()?;
            let mut tensors = Vec::from(Named::sensitivity(layer, &sensitivity));
            tensors.push(Named::line(layer_name(layer, "fisher"), &fisher));
            self.work.keep(&part, tensors)?;
        }
        Ok(())
    }

    /// What was found: by group of layers and by layer.
    pub(super) fn finish(self) -> Result<(Vec<Moments>, Vec<LayerStatistics>)> {
        let config = self.model.config();
        let (d, n) = (config.head_dim, config.num_key_value_heads * config.head_dim);
        let (mut moments, mut layers) = (Vec::new(), Vec::new());
        for (index, group) in groups(config.num_hidden_layers, self.options.span).enumerate() {
            self.work.part(&format!("forward.{index}"), |reader| {
                moments.push(reader.group(index, group.len() * 2 * n)?);
                let sampled = reader.shape(&layer_name(group.start, "sample.rows"))?[0];
                for layer in group {
                    let found = reader.forward(layer, [n, d, sampled])?;
                    layers.push(LayerStatistics {
                        post_rope_keys: found.post_rope_keys,
                        sample: found.sample,
                        queries: found.queries,
                        scalar: None,
                        fisher: None,
                        sensitivity: None,
                    });
                }
                Ok(())
            })?;
        }
        if full(self.options) {
            for (index, layer) in layers.iter_mut().enumerate() {
                (layer.sensitivity, layer.fisher) = self.work.part(&format!("backward.{index}"), |reader| {
                    Ok((Some(reader.sensitivity(index, n)?), reader.numbers(&layer_name(index, "fisher"), &[2])?.try_into().ok()))
                })?;
            }
        }
        self.work.finish()?;
        Ok((moments, layers))
    }

    /// Whether a part was done by an earlier run; it is counted as `layers`.
    fn skipped(&mut self, part: &str, layers: usize) -> bool {
        let skipped = self.work.has(part);
        if skipped {
            self.done += layers * self.windows.iter().map(|window| window.len()).sum::<usize>();
        }
        skipped
    }

    /// The windows, with the place of their first token among all.
    fn windows(&self) -> impl Iterator<Item = (usize, &'a [u32])> + use<'a> {
        let mut next = 0;
        self.windows.iter().map(move |window| {
            next += window.len();
            (next - window.len(), *window)
        })
    }

    fn advance(&mut self, count: usize, on_progress: OnProgress<'_>) -> Result<()> {
        self.done += count;
        report(on_progress, "calibrate", self.done, self.total)
    }

    /// A group of layers, one after the other.
    fn forward(&mut self, layers: Range<usize>, on_progress: OnProgress<'_>) -> Result<Gathered> {
        let start = Instant::now();
        let mut group = Group::new(self.model.config(), self.options, self.windows, layers.clone());
        report(on_progress, "calibrate", self.done, self.total)?;
        for layer in layers {
            group.restart();
            for (first, tokens) in self.windows() {
                let mut x = match layer {
                    0 => self.by_layer.embed(tokens)?,
                    _ => self.work.read(state(self.options, layer, false), first, tokens.len())?,
                };
                if layer == 0 && full(self.options) {
                    self.work.write(0, first, &x)?;
                }
                let before_mlp = full(self.options).then(|| DMatrix::zeros(x.nrows(), x.ncols()));
                let mut watch = Watch { group: &mut group, before_mlp };
                self.by_layer.forward(layer, &mut x, &mut watch)?;
                if let Some(before_mlp) = watch.before_mlp {
                    self.work.write(state(self.options, layer, true), first, &before_mlp)?;
                }
                self.work.write(state(self.options, layer + 1, false), first, &x)?;
                self.advance(tokens.len(), on_progress)?;
            }
            self.by_layer.release(layer);
        }
        self.seconds.forward += start.elapsed().as_secs_f64() - group.seconds;
        self.seconds.moments += group.seconds;
        group.finish()
    }

    /// The loss, whose labels are drawn.
    fn loss(&mut self, on_progress: OnProgress<'_>) -> Result<()> {
        let start = Instant::now();
        let (mut random, layers) = (Random::new(self.options.seed), self.model.config().num_hidden_layers);
        for (first, tokens) in self.windows() {
            let draws: Vec<f64> = tokens.iter().map(|_| random.unit()).collect();
            let output = self.work.read(state(self.options, layers, false), first, tokens.len())?;
            let loss = |position: usize, logits: &mut [f32]| sampled_loss(logits, draws[position]);
            let gradient = self.by_layer.loss(&output, self.options.loss_from, &loss)?;
            self.work.write(self.gradient(layers), first, &gradient)?;
            self.advance(tokens.len() * loss_layers(self.model), on_progress)?;
        }
        self.by_layer.release_head();
        self.seconds.backward += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// A layer, from the gradient with respect to what leaves it.
    fn backward(&mut self, layer: usize, on_progress: OnProgress<'_>) -> Result<Gradients> {
        let start = Instant::now();
        let exact = Exact { sinks: self.options.sinks, recent: self.options.recent };
        let mut sums = Gradients::new(self.model.config(), self.options, layer);
        report(on_progress, "calibrate", self.done, self.total)?;
        for (first, tokens) in self.windows() {
            let read = |state: usize| self.work.read(state, first, tokens.len());
            let mut gradient = read(self.gradient(layer + 1))?;
            let [before_attention, before_mlp] = [read(state(self.options, layer, false))?, read(state(self.options, layer, true))?];
            let gradients = self.by_layer.backward(layer, [&before_attention, &before_mlp], &mut gradient, exact)?;
            self.work.write(self.gradient(layer), first, &gradient)?;
            sums.add(&gradients, tokens.len());
            self.advance(tokens.len() * BACKWARD, on_progress)?;
        }
        self.by_layer.release(layer);
        self.seconds.backward += start.elapsed().as_secs_f64() - sums.seconds;
        self.seconds.moments += sums.seconds;
        Ok(sums)
    }

    /// The state that is the gradient with respect to what enters a layer.
    fn gradient(&self, layer: usize) -> usize {
        2 * self.model.config().num_hidden_layers + 1 + layer % 2
    }
}

/// Consecutive layers whose rows are moments together.
fn groups(layers: usize, span: usize) -> impl Iterator<Item = Range<usize>> {
    (0..layers).step_by(span).map(move |first| first..(first + span).min(layers))
}

fn full(options: &Options) -> bool {
    options.sensitivity == SensitivityKind::Full
}

/// The state that enters a layer's attention, or its MLP, which no one asks for again where there
/// is no backward pass.
fn state(options: &Options, layer: usize, mlp: bool) -> usize {
    if full(options) { 2 * layer + usize::from(mlp) } else { layer }
}

fn states(model: &Model, options: &Options) -> usize {
    let layers = model.config().num_hidden_layers;
    if full(options) { 2 * layers + 3 } else { layers + 1 }
}

/// How many times a layer's time forward the loss takes for a token, forward and back.
fn loss_layers(model: &Model) -> usize {
    let [layer, head] = model.layer_weights();
    // Two products, and what becomes of logits.
    (2 * head).div_ceil(layer.max(1))
}

/// What tells a run from others: everything that its parts depend on.
fn key(windows: &[&[u32]], options: &Options, digests: &[&str]) -> String {
    let Options { sinks, recent, span, sensitivity, loss_from, seed, .. } = options;
    let mut sha =
        Sha256::new_with_prefix(format!("{} {digests:?} {sinks} {recent} {span} {sensitivity:?} {loss_from} {seed}", env!("CARGO_PKG_VERSION")));
    for window in windows {
        sha.update((window.len() as u64).to_le_bytes());
        window.iter().for_each(|token| sha.update(token.to_le_bytes()));
    }
    sha.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// What a run needs at the most.
pub(super) fn need(model: &Model, windows: &[&[u32]], options: &Options) -> Need {
    let config = model.config();
    let (hidden, n, layers) = (config.hidden_size, config.num_key_value_heads * config.head_dim, config.num_hidden_layers);
    let (queries, inner, vocab) = (config.num_attention_heads * config.head_dim, config.intermediate_size, config.vocab_size);
    let longest = windows.iter().map(|window| window.len()).max().unwrap_or(0);
    let tokens: usize = windows.iter().map(|window| window.len()).sum();
    let threads = rayon::current_num_threads();
    let (single, double) = (size_of::<f32>(), size_of::<f64>());
    // Forward: the stream three times; exact rows, and as they are read; a chunk's activations, and
    // each thread's attention weights; sums, and what they are made of.
    let rows = options.span * 2 * n;
    let kept = if options.span > 1 { tokens * rows } else { 0 };
    let chunk = 256 * (4 * inner + 8 * hidden + 3 * queries + 6 * n + threads * longest);
    let forward = single * (3 * longest * hidden + 6 * longest * n + chunk + kept + 2 * rows * rows) + double * (rows * rows + n * n);
    // Backward: streams and gradients, queries and what becomes of them, each head's keys and
    // values, attention weights, a block of the MLP, gradients of weights and their sums.
    let mlp = ByLayer::MLP_BLOCK.min(longest) * (6 * inner + 4 * hidden);
    let heads = longest * (12 * queries + 12 * n) + threads * 3 * 256 * longest;
    let backward = single * (8 * longest * hidden + heads + mlp + 6 * hidden * n) + double * 2 * n * n;
    let loss = single * (3 * longest * hidden + 2 * ByLayer::HEAD_BLOCK * vocab);
    // What is found, which is read when all of it is done.
    let sample = Group::SAMPLE.min(tokens) * 3 * n;
    let found =
        single * layers * (rows * rows / options.span.max(1) + n * n + config.head_dim * n + sample + if full(options) { 2 * n * n } else { 0 });
    let most = if full(options) { forward.max(backward).max(loss) } else { forward };
    // Weights in memory or mapped, and rows of them that are decoded.
    let weights = model.resident_bytes() + (4 << 20) * (1 + threads as u64);
    Need { memory: most.max(found) as u64 + weights, disk: Work::bytes(hidden, tokens, states(model, options)) }
}
