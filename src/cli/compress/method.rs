//! The method's options, flat as they are given, and the method with the options that it takes.

use clap::ValueEnum;
use lowkey::checkpoint::Config;
use lowkey::compress::{self, Budget, LowKey, Method, Palu, Ranks, ReCalKv};
use lowkey::{Error, Result};

#[derive(clap::Args, Clone)]
pub(super) struct MethodArgs {
    /// lowkey's own, a published system, or `dense`: keys and values themselves in 8 or 4 bits.
    #[arg(long, default_value = "lowkey", value_parser = Method::all().map(|method| method.name()))]
    method: String,
    /// How many times smaller than in f16 the cache is to be [default: 8].
    #[arg(long, value_name = "F", group = "budget")]
    times: Option<f64>,
    /// The share of the f16 cache to keep, above 0 and up to 1.
    #[arg(long, value_name = "F", group = "budget")]
    keep: Option<f64>,
    /// Bytes that a token may take, over the whole model.
    #[arg(long, value_name = "N", group = "budget")]
    kv_bytes: Option<u64>,
    /// lowkey: which rows [default: small].
    #[arg(long)]
    layout: Option<Layout>,
    /// lowkey, small: consecutive layers that share a row, 1, 2 or 4 [default: 1]. With
    /// --statistics, for any method that calibrates: how many layers are correlated with each other
    /// there.
    #[arg(long, value_name = "N")]
    pub(super) span: Option<usize>,
    /// lowkey, fast: the longest context that rows are made for; beyond it keys are coded worse
    /// [default: 8192, or the model's own where that is shorter].
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// lowkey, fast: key/value heads that share a row, a number or `all`; fewer decode faster, and
    /// are farther from the model [default: all].
    #[arg(long, value_name = "N", value_parser = row_heads)]
    row_heads: Option<usize>,
    /// palu, recalkv: key heads that share a row [default: 4, or all where there are fewer].
    #[arg(long, value_name = "N")]
    group_heads: Option<usize>,
    /// recalkv: by what heads are put into groups [default: cka].
    #[arg(long)]
    grouping: Option<Grouping>,
    /// Published methods: how ranks are dealt out [default: by the paper's rule].
    #[arg(long, value_parser = Ranks::ALL.map(|(name, _)| name))]
    ranks: Option<String>,
    /// Published methods and dense: bits of a number, 16, 8 or 4 [default: 16; dense: 4]; oscar,
    /// kivi: 8, 4 or 2 [default: 2]; kvarn: the same, of keys and values [default: keys 4, values
    /// 2].
    #[arg(long, value_name = "N")]
    bits: Option<u8>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Layout {
    /// Keys before RoPE and values in one row: the smallest; keys are rebuilt when they are read.
    Small,
    /// Keys after RoPE, and values: nothing is rebuilt.
    Fast,
}

#[derive(Clone, Copy, ValueEnum)]
enum Grouping {
    /// By similarity, as in the paper.
    Cka,
    /// By what the groups lose.
    Loss,
}

fn row_heads(text: &str) -> std::result::Result<usize, String> {
    match text {
        "all" => Ok(usize::MAX),
        number => number.parse().map_err(|_| "a number of heads, or all".to_owned()),
    }
}

impl MethodArgs {
    /// The method with its options, and the options that are given and that it does not take.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that there is not.
    pub(super) fn method(&self, config: &Config) -> Result<(Method, MethodArgs)> {
        let (mut method, mut left): (Method, _) = (self.method.parse()?, self.clone());
        if let Some(budget) = method.budget_mut() {
            *budget = left.take_budget().unwrap_or_default();
        }
        if let Some(low_rank) = method.low_rank_mut() {
            low_rank.ranks = left.ranks.take().as_deref().map(Ranks::named).transpose()?;
            low_rank.bits = left.bits.take().unwrap_or(low_rank.bits);
        }
        let heads = |group_heads: usize| group_heads.min(config.num_key_value_heads);
        match &mut method {
            Method::LowKey(LowKey { layout, .. }) => *layout = left.take_layout(config),
            Method::Palu(Palu { group_heads, .. }) => *group_heads = left.group_heads.take().unwrap_or(heads(*group_heads)),
            Method::ReCalKv(ReCalKv { group_heads, grouping, .. }) => {
                *group_heads = left.group_heads.take().unwrap_or(heads(*group_heads));
                *grouping = left.grouping.take().map_or(*grouping, |grouping| match grouping {
                    Grouping::Cka => compress::Grouping::Cka,
                    Grouping::Loss => compress::Grouping::Loss,
                });
            }
            Method::KqSvd(_) | Method::KSvd(_) | Method::Eigen(_) => {}
            Method::Dense { bits } | Method::Oscar { bits } | Method::Kivi { bits } => *bits = left.bits.take().unwrap_or(*bits),
            Method::KVarN { key_bits, value_bits } => {
                if let Some(bits) = left.bits.take() {
                    (*key_bits, *value_bits) = (bits, bits);
                }
            }
        }
        Ok((method, left))
    }

    fn take_budget(&mut self) -> Option<Budget> {
        let bytes = self.kv_bytes.take().map(Budget::Bytes);
        bytes.or(self.keep.take().map(Budget::Keep)).or(self.times.take().map(Budget::Times))
    }

    fn take_layout(&mut self, config: &Config) -> compress::Layout {
        let layout = match self.layout.take() {
            Some(Layout::Fast) => compress::Layout::FAST,
            Some(Layout::Small) | None => compress::Layout::default(),
        };
        match layout {
            compress::Layout::Small { span } => compress::Layout::Small { span: self.span.take().unwrap_or(span) },
            compress::Layout::Fast { context, row_heads } => compress::Layout::Fast {
                context: self.context.take().unwrap_or(context.min(config.max_position_embeddings)),
                row_heads: self.row_heads.take().map(|heads| heads.min(config.num_key_value_heads)).or(row_heads),
            },
        }
    }

    /// Of options that nothing has taken, the first one that is given, and why it is not taken.
    pub(super) fn left_over(&self) -> Option<(&'static str, &'static str)> {
        const BUDGET: &str = "this method has no budget to spend: its size is that of its numbers; choose --bits";
        const SPAN: &str = "only `--method lowkey --layout small` has rows over several layers, and no --statistics are kept for that";
        let options = [
            ("times", self.times.is_some(), BUDGET),
            ("keep", self.keep.is_some(), BUDGET),
            ("kv-bytes", self.kv_bytes.is_some(), BUDGET),
            ("layout", self.layout.is_some(), "only `--method lowkey` has a choice of rows"),
            ("context", self.context.is_some(), "only `--method lowkey --layout fast` codes keys by their position"),
            ("row-heads", self.row_heads.is_some(), "only `--method lowkey --layout fast` has rows over as many heads as one likes"),
            ("span", self.span.is_some(), SPAN),
            ("group-heads", self.group_heads.is_some(), "only palu and recalkv put heads into groups"),
            ("grouping", self.grouping.is_some(), "only `--method recalkv` reorders heads"),
            ("ranks", self.ranks.is_some(), "only published low-rank methods have ranks to deal out"),
            ("bits", self.bits.is_some(), "lowkey deals out bits itself, as its budget allows"),
        ];
        options.into_iter().find(|(_, given, _)| *given).map(|(name, _, why)| (name, why))
    }
}

/// What the library calls an option, as the command line calls it.
pub(super) fn flag(error: Error) -> Error {
    match error {
        Error::Argument { name, message } => {
            let name = if name == "budget" { "kv-bytes".into() } else { name.replace('_', "-") };
            Error::Argument { name, message }
        }
        error => error,
    }
}
