//! Sums over tokens of what enters attention, and a sample of it, gathered as the model runs
//! forward.

use super::options::Options;
use super::statistics::{ForwardStatistics, Sample};
use crate::Result;
use crate::checkpoint::Config;
use crate::cpu::{Heads, Observer};
use crate::linalg::{Moments, check_finite, gram};
use nalgebra::{DMatrix, DVector};
use std::ops::Range;
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

/// All that is gathered forward in one group of consecutive layers; an observer of the model, whose
/// layers it is shown one by one, each on all of the text.
pub(super) struct Group {
    d: usize,
    sinks: usize,
    recent: usize,
    /// The first layer of the group.
    first: usize,
    /// By chunk of tokens, while there are layers to come: the rows `y = [k ; v]` of the group's
    /// layers so far, `[layers·2n, tokens]`.
    rows: Vec<DMatrix<f32>>,
    /// The chunk of tokens that the current layer is at.
    chunk: usize,
    sum: Sum,
    /// One token of so many is in the sample.
    every: usize,
    layers: Vec<LayerSums>,
    queries_count: usize,
    /// Time spent here.
    pub(super) seconds: f64,
}

/// What is gathered of one layer.
struct LayerSums {
    post_rope_keys: Sum,
    sample: Kept,
    /// By key/value head.
    queries: Vec<DMatrix<f64>>,
}

/// A [`Sample`] on the way: column after column.
#[derive(Default)]
struct Kept {
    rows: Vec<f32>,
    post_rope_keys: Vec<f32>,
}

/// What a [`Group`] comes to.
pub(super) struct Gathered {
    /// Of the rows of all its layers together.
    pub(super) moments: Moments,
    pub(super) layers: Vec<ForwardStatistics>,
}

impl Group {
    /// Tokens in a sample, at most: enough to see how a row's energy varies, and a small part of
    /// the statistics.
    pub(super) const SAMPLE: usize = 256;

    /// For these windows' tokens, and these layers of a model.
    pub(super) fn new(config: &Config, options: &Options, windows: &[&[u32]], layers: Range<usize>) -> Group {
        let d = config.head_dim;
        let n = config.num_key_value_heads * d;
        let beyond = |first: usize| windows.iter().map(|window| window.len().saturating_sub(first)).sum::<usize>();
        let sums =
            || LayerSums { post_rope_keys: Sum::new(n), sample: Kept::default(), queries: vec![DMatrix::zeros(d, d); config.num_key_value_heads] };
        Group {
            d,
            sinks: options.sinks,
            recent: options.recent,
            first: layers.start,
            rows: Vec::new(),
            chunk: 0,
            sum: Sum::new(layers.len() * 2 * n),
            every: beyond(options.sinks).div_ceil(Self::SAMPLE),
            layers: layers.map(|_| sums()).collect(),
            queries_count: beyond(options.recent),
            seconds: 0.0,
        }
    }

    /// Begins with the text again, for the next layer.
    pub(super) fn restart(&mut self) {
        self.chunk = 0;
    }

    /// Means, in f32.
    ///
    /// # Errors
    /// [`crate::Error::Numeric`] where one is not finite.
    pub(super) fn finish(self) -> Result<Gathered> {
        let (first, every, count) = (self.first, self.every, self.queries_count as f64);
        let finish = |(index, sums): (usize, LayerSums)| {
            let what = |what: &str| format!("the second moment of {what} of layer {}", first + index);
            let LayerSums { post_rope_keys, sample, queries } = sums;
            let (n, tokens) = (post_rope_keys.mean.len(), post_rope_keys.count.div_ceil(every));
            let sample =
                Sample { rows: DMatrix::from_vec(2 * n, tokens, sample.rows), post_rope_keys: DMatrix::from_vec(n, tokens, sample.post_rope_keys) };
            let queries: Vec<DMatrix<f32>> = queries.into_iter().map(|sum| sum.map(|x| (x / count) as f32)).collect();
            queries.iter().try_for_each(|head| check_finite(&what("the queries"), head))?;
            Ok(ForwardStatistics { post_rope_keys: post_rope_keys.finish(&what("the keys"))?, sample, queries })
        };
        Ok(Gathered {
            moments: self.sum.finish(&format!("the second moment of keys and values from layer {first} on"))?,
            layers: self.layers.into_iter().enumerate().map(finish).collect::<Result<_>>()?,
        })
    }
}

/// The columns at `first` positions and later, where the matrix begins at `position`.
fn from(first: usize, position: usize, columns: &DMatrix<f32>) -> DMatrix<f32> {
    let left_out = first.saturating_sub(position).min(columns.ncols());
    columns.columns_range(left_out..).into_owned()
}

impl Observer for Group {
    fn heads(&mut self, layer: usize, position: usize, heads: &Heads) {
        let start = Instant::now();
        let [counted, values, post_rope_keys] = [heads.keys, heads.values, heads.post_rope_keys].map(|columns| from(self.sinks, position, columns));
        let (n, count, within) = (counted.nrows(), counted.ncols(), layer - self.first);
        let width = self.layers.len() * 2 * n;
        let mut rows =
            self.rows.get_mut(self.chunk).map_or_else(|| DMatrix::zeros(width, count), |rows| std::mem::replace(rows, DMatrix::zeros(0, 0)));
        rows.rows_mut(within * 2 * n, n).copy_from(&counted);
        rows.rows_mut(within * 2 * n + n, n).copy_from(&values);
        if within + 1 == self.layers.len() {
            self.sum.add(&rows);
        } else if within == 0 {
            self.rows.push(rows);
        } else {
            self.rows[self.chunk] = rows;
        }
        self.chunk += 1;

        let LayerSums { post_rope_keys: sum, sample, queries: sums } = &mut self.layers[within];
        for token in (0..count).filter(|token| (sum.count + token).is_multiple_of(self.every)) {
            sample.rows.extend(counted.column(token).iter().chain(values.column(token).iter()));
            sample.post_rope_keys.extend(post_rope_keys.column(token).iter());
        }
        sum.add(&post_rope_keys);

        let queries = from(self.recent, position, heads.queries);
        let width = queries.nrows() / sums.len();
        for (head, sum) in sums.iter_mut().enumerate() {
            for query_head in (head * width..(head + 1) * width).step_by(self.d) {
                add(sum, &gram(&queries.rows(query_head, self.d).into_owned()), 1.0);
            }
        }
        self.seconds += start.elapsed().as_secs_f64();
    }
}
