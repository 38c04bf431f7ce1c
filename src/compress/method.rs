//! The methods, each with the options that it takes: what a method does not take cannot be written.

use super::Ranks;
use crate::checkpoint::Config;
use crate::kv::Budget;
use crate::{Error, Result};
use std::str::FromStr;

/// An offline method with its options.
#[derive(Debug, Clone, PartialEq)]
pub enum Method {
    /// lowkey's own: [`lowkey`](super::lowkey).
    LowKey(LowKey),
    /// Palu (arXiv 2407.21118): keys and values in groups of heads.
    Palu(Palu),
    /// ReCalKV (arXiv 2505.24357): keys in groups of similar heads, values over all heads.
    ReCalKv(ReCalKv),
    /// KQ-SVD (arXiv 2512.05916): keys after RoPE by head, as queries see them; values by head, as
    /// the output projection does.
    KqSvd(LowRank),
    /// K-SVD: keys after RoPE and values by head, by their own principal components.
    KSvd(LowRank),
    /// EigenAttention (arXiv 2408.05646): keys after RoPE by head, by what keys and queries have
    /// together.
    Eigen(LowRank),
    /// The keys and values themselves, rotated and quantised with equal steps: what llama.cpp's
    /// users know as q8_0 and q4_0.
    Dense {
        /// Bits of a number: 16, 8 or 4.
        bits: u8,
    },
    /// OSCAR (arXiv 2605.17757): keys after RoPE and values in rotations made from the queries, in
    /// few equal steps.
    Oscar {
        /// Bits of a number: 8, 4 or 2.
        bits: u8,
    },
    /// KIVI (arXiv 2402.02750): keys after RoPE by channel in groups of tokens, values by token.
    Kivi {
        /// Bits of a number: 8, 4 or 2.
        bits: u8,
    },
    /// KVarN (arXiv 2606.03458): keys after RoPE and values in rotated blocks of tokens, balanced
    /// before they are rounded.
    KVarN {
        /// Bits of a key's number: 8, 4 or 2.
        key_bits: u8,
        /// Bits of a value's number: 8, 4 or 2.
        value_bits: u8,
    },
}

/// Options of lowkey's own method.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LowKey {
    /// How small.
    pub budget: Budget,
    /// Which rows.
    pub layout: Layout,
    /// What weighs.
    pub sensing: Sensing,
    /// Whether rows have scales of their own.
    pub scales: Scales,
}

/// How lowkey's own rows are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Keys before RoPE and values in one row: smallest; keys are rebuilt when they are read.
    Small {
        /// Consecutive layers that share a row, at least 1.
        span: usize,
    },
    /// Keys after RoPE and values in rows of their own: nothing is rebuilt.
    Fast {
        /// The longest context, in tokens, whose positions keys are coded for; at least 1.
        context: usize,
        /// Key/value heads that share a row, at least 1; `None` for all.
        row_heads: Option<usize>,
    },
}

impl Layout {
    /// Keys after RoPE, for 8,192 tokens, in rows over all heads.
    pub const FAST: Layout = Layout::Fast { context: 8192, row_heads: None };

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Layout::Small { .. } => "small",
            Layout::Fast { .. } => "fast",
        }
    }
}

impl Default for Layout {
    fn default() -> Layout {
        Layout::Small { span: 1 }
    }
}

/// Which sensitivity weighs disturbances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sensing {
    /// The Gram matrix of the loss's gradient.
    #[default]
    Full,
    /// One number for each layer and side.
    Scalar,
}

/// Whether the bands of lowkey's rows have scales of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Scales {
    /// Where that is better, row by row.
    #[default]
    Chosen,
    /// Nowhere: [`Fixed`](crate::kv::Scale::Fixed).
    Fixed,
    /// Everywhere: [`Band`](crate::kv::Scale::Band).
    Band,
}

/// What all published low-rank methods take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LowRank {
    /// How small.
    pub budget: Budget,
    /// How ranks are dealt out; `None` for the paper's own rule.
    pub ranks: Option<Ranks>,
    /// Bits of a coordinate: 16, 8 or 4.
    pub bits: u8,
}

impl Default for LowRank {
    fn default() -> LowRank {
        LowRank { budget: Budget::default(), ranks: None, bits: 16 }
    }
}

/// Options of Palu.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Palu {
    /// What all such methods take.
    pub low_rank: LowRank,
    /// Heads that share a row, of keys and of values alike; at least 1.
    pub group_heads: usize,
}

impl Default for Palu {
    fn default() -> Palu {
        Palu { low_rank: LowRank::default(), group_heads: 4 }
    }
}

/// Options of ReCalKV.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReCalKv {
    /// What all such methods take.
    pub low_rank: LowRank,
    /// Key heads that share a row; at least 1.
    pub group_heads: usize,
    /// By what heads are put into groups.
    pub grouping: Grouping,
}

impl Default for ReCalKv {
    fn default() -> ReCalKv {
        ReCalKv { low_rank: LowRank::default(), group_heads: 4, grouping: Grouping::default() }
    }
}

/// By what heads are put into groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Grouping {
    /// By the similarity of heads, as in the paper.
    #[default]
    Cka,
    /// By what the groups lose at their ranks: the best of all partitions where these are few;
    /// where they are many, from the partition by similarity on, heads are exchanged as long as
    /// that helps.
    Loss,
}

impl Method {
    /// All of them, with the options that they come with.
    pub fn all() -> [Method; 10] {
        let low_rank = LowRank::default();
        [
            Method::LowKey(LowKey::default()),
            Method::Palu(Palu::default()),
            Method::ReCalKv(ReCalKv::default()),
            Method::KqSvd(low_rank),
            Method::KSvd(low_rank),
            Method::Eigen(low_rank),
            Method::Dense { bits: 4 },
            Method::Oscar { bits: 2 },
            Method::Kivi { bits: 2 },
            Method::KVarN { key_bits: 4, value_bits: 2 },
        ]
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Method::LowKey(_) => "lowkey",
            Method::Palu(_) => "palu",
            Method::ReCalKv(_) => "recalkv",
            Method::KqSvd(_) => "kqsvd",
            Method::KSvd(_) => "ksvd",
            Method::Eigen(_) => "eigen",
            Method::Dense { .. } => "dense",
            Method::Oscar { .. } => "oscar",
            Method::Kivi { .. } => "kivi",
            Method::KVarN { .. } => "kvarn",
        }
    }

    /// What it takes as a published low-rank method; `None` where it is none.
    pub fn low_rank(&self) -> Option<LowRank> {
        self.clone().low_rank_mut().copied()
    }

    /// [`low_rank`](Self::low_rank), to be changed.
    pub fn low_rank_mut(&mut self) -> Option<&mut LowRank> {
        match self {
            Method::Palu(Palu { low_rank, .. })
            | Method::ReCalKv(ReCalKv { low_rank, .. })
            | Method::KqSvd(low_rank)
            | Method::KSvd(low_rank)
            | Method::Eigen(low_rank) => Some(low_rank),
            _ => None,
        }
    }

    /// How small it is to be; `None` where its size is that of its numbers.
    pub fn budget(&self) -> Option<Budget> {
        self.clone().budget_mut().copied()
    }

    /// [`budget`](Self::budget), to be changed.
    pub fn budget_mut(&mut self) -> Option<&mut Budget> {
        match self {
            Method::LowKey(LowKey { budget, .. }) => Some(budget),
            method => Some(&mut method.low_rank_mut()?.budget),
        }
    }

    /// The rule by which it deals ranks out, the one asked for or its paper's.
    ///
    /// `None` where it has no ranks.
    pub fn ranks(&self) -> Option<Ranks> {
        let own = if matches!(self, Method::Palu(_) | Method::ReCalKv(_)) { Ranks::Fisher } else { Ranks::Energy };
        Some(self.low_rank()?.ranks.unwrap_or(own))
    }

    /// Whether it needs statistics of the model.
    pub fn calibrates(&self) -> bool {
        !matches!(self, Method::Dense { .. } | Method::Kivi { .. } | Method::KVarN { .. })
    }

    /// Whether it asks what disturbances do to the output.
    pub fn weighs(&self) -> bool {
        matches!(self, Method::LowKey(_)) || matches!(self.ranks(), Some(Ranks::Fisher | Ranks::Spectrum))
    }

    /// Whether its options are possible ones for a model of this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] with the option and what it may be.
    pub fn check(&self, config: &Config) -> Result<()> {
        let refuse = |name: &str, message: &str| Err(Error::Argument { name: name.into(), message: message.into() });
        if let Some(budget) = self.budget() {
            budget.bytes(config.dense_kv_bytes_per_token())?;
        }
        match self {
            Method::LowKey(LowKey { layout: Layout::Fast { context: 0, .. }, .. }) => refuse("context", "a context of no tokens; choose at least 1"),
            Method::LowKey(LowKey { layout: Layout::Fast { row_heads: Some(0), .. }, .. }) => {
                refuse("row_heads", "rows over no heads; choose at least 1")
            }
            Method::LowKey(LowKey { layout: Layout::Small { span: 0 }, .. }) => refuse("span", "rows of no layers; choose at least 1"),
            Method::Palu(Palu { group_heads: 0, .. }) | Method::ReCalKv(ReCalKv { group_heads: 0, .. }) => {
                refuse("group_heads", "groups of no heads; choose at least 1")
            }
            _ => self.check_bits(),
        }
    }

    fn check_bits(&self) -> Result<()> {
        let ([a, b, c], bits) = match self {
            Method::LowKey(_) => return Ok(()),
            Method::Dense { bits } => ([4, 8, 16], vec![*bits]),
            Method::Oscar { bits } | Method::Kivi { bits } => ([2, 4, 8], vec![*bits]),
            Method::KVarN { key_bits, value_bits } => ([2, 4, 8], vec![*key_bits, *value_bits]),
            low_rank => ([4, 8, 16], low_rank.low_rank().iter().map(|low_rank| low_rank.bits).collect()),
        };
        match bits.into_iter().find(|bits| ![a, b, c].contains(bits)) {
            Some(bits) => Err(Error::Argument { name: "bits".into(), message: format!("rows of {bits} bits; choose {a}, {b} or {c}") }),
            None => Ok(()),
        }
    }

    /// The options in words, as far as they say something about the rows.
    pub fn options(&self) -> String {
        let mut words = match self {
            Method::LowKey(LowKey { layout, sensing, .. }) => {
                let mut words = vec![layout.name().to_string()];
                if let Layout::Small { span: span @ 2.. } = layout {
                    words.push(format!("span {span}"));
                }
                words.extend((*sensing == Sensing::Scalar).then(|| "scalar sensitivity".to_string()));
                words
            }
            Method::Palu(Palu { group_heads, .. }) => vec![format!("groups of {group_heads}")],
            Method::ReCalKv(ReCalKv { group_heads, grouping, .. }) => {
                let loss = (*grouping == Grouping::Loss).then(|| "grouped by loss".to_string());
                [format!("groups of {group_heads}")].into_iter().chain(loss).collect()
            }
            Method::KqSvd(_) | Method::KSvd(_) | Method::Eigen(_) => Vec::new(),
            Method::Dense { bits } => vec![format!("q{bits}")],
            Method::Oscar { bits } | Method::Kivi { bits } => vec![format!("{bits} bits")],
            Method::KVarN { key_bits, value_bits } if key_bits == value_bits => vec![format!("{key_bits} bits")],
            Method::KVarN { key_bits, value_bits } => vec![format!("{key_bits} bits, values {value_bits}")],
        };
        if let Some(LowRank { ranks, bits, .. }) = self.low_rank() {
            words.extend(ranks.map(|ranks| format!("ranks by {}", ranks.name())));
            words.extend((bits < 16).then(|| format!("{bits} bits")));
        }
        words.join(", ")
    }
}

impl FromStr for Method {
    type Err = Error;

    /// The method called so, with the options that it comes with.
    fn from_str(name: &str) -> Result<Method> {
        Method::all().into_iter().find(|method| method.name() == name).ok_or_else(|| {
            let message = format!("there is no `{name}`; choose one of {}", Method::all().map(|method| method.name()).join(", "));
            Error::Argument { name: "method".into(), message }
        })
    }
}
