//! Sums over tokens of what enters attention, and a sample of it, gathered as the model runs
//! forward.

use super::statistics::Sample;
use crate::Result;
use crate::checkpoint::Config;
use crate::cpu::{Heads, Observer, Residuals};
use crate::linalg::{Moments, check_finite, gram};
use nalgebra::{DMatrix, DVector};
use std::time::Instant;

/// The mean and second moment of some columns, on the way: products in f32 within a chunk of
/// tokens, in f64 from chunk to chunk.
pub(super) struct Sum {
    mean: DVector<f64>,
    second: DMatrix<f64>,
    count: usize,
}

impl Sum {
    fn new(width: usize) -> Sum {
        Sum { mean: DVector::zeros(width), second: DMatrix::zeros(width, width), count: 0 }
    }

    fn add(&mut self, columns: &DMatrix<f32>) {
        for column in columns.column_iter() {
            self.mean.zip_apply(&column, |sum, x| *sum += f64::from(x));
        }
        add(&mut self.second, &gram(columns), 1.0);
        self.count += columns.ncols();
    }

    fn finish(self, what: &str) -> Result<Moments> {
        let count = self.count as f64;
        let moments = Moments { mean: self.mean.map(|x| (x / count) as f32), second: self.second.map(|x| (x / count) as f32) };
        check_finite(what, &moments.second)?;
        Ok(moments)
    }
}

/// `sum += weight · more`.
pub(super) fn add(sum: &mut DMatrix<f64>, more: &DMatrix<f32>, weight: f64) {
    sum.zip_apply(more, |sum, x| *sum += weight * f64::from(x));
}

/// All that is gathered forward; an observer of the model.
pub(super) struct Forward {
    d: usize,
    sinks: usize,
    recent: usize,
    span: usize,
    /// The rows `y = [k ; v]` of the current group of layers and chunk of tokens,
    /// `[layers·2n, tokens]`.
    rows: DMatrix<f32>,
    groups: Vec<Sum>,
    post_rope_keys: Vec<Sum>,
    /// One token of so many is in the sample.
    every: usize,
    samples: Vec<Kept>,
    /// By layer and key/value head.
    queries: Vec<Vec<DMatrix<f64>>>,
    queries_count: usize,
    /// The residual stream of the current window, where a backward pass will want it.
    pub(super) residuals: Option<Residuals>,
    /// Time spent here.
    pub(super) seconds: f64,
}

/// A [`Sample`] on the way: column after column.
#[derive(Clone, Default)]
struct Kept {
    rows: Vec<f32>,
    post_rope_keys: Vec<f32>,
}

/// What [`Forward`] comes to.
pub(super) struct Gathered {
    pub(super) moments: Vec<Moments>,
    pub(super) post_rope_keys: Vec<Moments>,
    pub(super) samples: Vec<Sample>,
    pub(super) queries: Vec<Vec<DMatrix<f32>>>,
}

impl Forward {
    /// Tokens in a sample, at most: enough to see how a row's energy varies, and a small part of
    /// the statistics.
    const SAMPLE: usize = 256;

    /// For these windows' tokens of a model.
    pub(super) fn new(config: &Config, options: &super::Options, windows: &[&[u32]]) -> Forward {
        let (layers, d) = (config.num_hidden_layers, config.head_dim);
        let n = config.num_key_value_heads * d;
        let beyond = |first: usize| windows.iter().map(|window| window.len().saturating_sub(first)).sum::<usize>();
        Forward {
            d,
            sinks: options.sinks,
            recent: options.recent,
            span: options.span,
            rows: DMatrix::zeros(0, 0),
            groups: (0..layers).step_by(options.span).map(|first| Sum::new(options.span.min(layers - first) * 2 * n)).collect(),
            post_rope_keys: (0..layers).map(|_| Sum::new(n)).collect(),
            every: beyond(options.sinks).div_ceil(Self::SAMPLE),
            samples: vec![Kept::default(); layers],
            queries: vec![vec![DMatrix::zeros(d, d); config.num_key_value_heads]; layers],
            queries_count: beyond(options.recent),
            residuals: None,
            seconds: 0.0,
        }
    }

    /// Means, in f32.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`] where one is not finite.
    pub(super) fn finish(self) -> Result<Gathered> {
        let layered = |what: &str, layer: usize| format!("the second moment of {what} of layer {layer}");
        let (span, count) = (self.span, self.queries_count as f64);
        let samples = self.samples.into_iter().zip(&self.post_rope_keys).map(|(kept, sum)| {
            let (n, tokens) = (sum.mean.len(), sum.count.div_ceil(self.every));
            Sample { rows: DMatrix::from_vec(2 * n, tokens, kept.rows), post_rope_keys: DMatrix::from_vec(n, tokens, kept.post_rope_keys) }
        });
        let samples = samples.collect();
        let queries: Vec<Vec<_>> =
            self.queries.into_iter().map(|heads| heads.into_iter().map(|sum| sum.map(|x| (x / count) as f32)).collect()).collect();
        for (layer, heads) in queries.iter().enumerate() {
            heads.iter().try_for_each(|head| check_finite(&layered("the queries", layer), head))?;
        }
        Ok(Gathered {
            moments: self
                .groups
                .into_iter()
                .enumerate()
                .map(|(group, sum)| sum.finish(&format!("the second moment of keys and values from layer {} on", group * span)))
                .collect::<Result<_>>()?,
            post_rope_keys: self
                .post_rope_keys
                .into_iter()
                .enumerate()
                .map(|(layer, sum)| sum.finish(&layered("the keys", layer)))
                .collect::<Result<_>>()?,
            samples,
            queries,
        })
    }
}

/// The columns at `first` positions and later, where the matrix begins at `position`.
fn from(first: usize, position: usize, columns: &DMatrix<f32>) -> DMatrix<f32> {
    let left_out = first.saturating_sub(position).min(columns.ncols());
    columns.columns_range(left_out..).into_owned()
}

impl Observer for Forward {
    fn residual(&mut self, state: usize, position: usize, x: &DMatrix<f32>) {
        if let Some(residuals) = &mut self.residuals {
            residuals.residual(state, position, x);
        }
    }

    fn heads(&mut self, layer: usize, position: usize, heads: &Heads) {
        let start = Instant::now();
        let [counted, values, post_rope_keys] = [heads.keys, heads.values, heads.post_rope_keys].map(|columns| from(self.sinks, position, columns));
        let (n, count, within) = (counted.nrows(), counted.ncols(), layer % self.span);
        if within == 0 {
            self.rows = DMatrix::zeros(self.groups[layer / self.span].mean.len(), count);
        }
        self.rows.rows_mut(within * 2 * n, n).copy_from(&counted);
        self.rows.rows_mut(within * 2 * n + n, n).copy_from(&values);
        if (within + 1) * 2 * n == self.rows.nrows() {
            self.groups[layer / self.span].add(&self.rows);
        }
        for token in (0..count).filter(|token| (self.post_rope_keys[layer].count + token).is_multiple_of(self.every)) {
            let Kept { rows, post_rope_keys: keys } = &mut self.samples[layer];
            rows.extend(counted.column(token).iter().chain(values.column(token).iter()));
            keys.extend(post_rope_keys.column(token).iter());
        }
        self.post_rope_keys[layer].add(&post_rope_keys);

        let queries = from(self.recent, position, heads.queries);
        let sums = &mut self.queries[layer];
        let width = queries.nrows() / sums.len();
        for (head, sum) in sums.iter_mut().enumerate() {
            for query_head in (head * width..(head + 1) * width).step_by(self.d) {
                add(sum, &gram(&queries.rows(query_head, self.d).into_owned()), 1.0);
            }
        }
        self.seconds += start.elapsed().as_secs_f64();
    }
}
