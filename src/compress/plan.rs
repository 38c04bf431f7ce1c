//! What is asked for: a method, a budget, and the method's options.

use super::Ranks;
use super::recalkv::Grouping;
use crate::checkpoint::Config;
use crate::rows::{Budget, Exact, Scale};
use crate::{Error, Result};

/// An offline method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// lowkey's own: [`lowkey`](super::lowkey).
    LowKey,
    /// Palu (arXiv 2407.21118): keys and values in groups of heads.
    Palu,
    /// ReCalKV (arXiv 2505.24357): keys in groups of similar heads, values over all heads.
    ReCalKv,
    /// KQ-SVD (arXiv 2512.05916): turned keys by head, as queries see them; values by head, as the output projection does.
    KqSvd,
    /// K-SVD: turned keys and values by head, by their own principal components.
    KSvd,
    /// EigenAttention (arXiv 2408.05646): turned keys by head, by what keys and queries have together.
    Eigen,
    /// The keys and values themselves, rotated and quantised with equal steps: what llama.cpp's users know as q8_0 and q4_0.
    Dense,
    /// OSCAR (arXiv 2605.17757): turned keys and values in rotations made from the queries, in few equal steps.
    Oscar,
    /// KIVI (arXiv 2402.02750): turned keys by channel in groups of tokens, values by token.
    Kivi,
    /// KVarN (arXiv 2606.03458): turned keys and values in rotated blocks of tokens, balanced before they are rounded.
    KVarN,
}

impl Method {
    /// All of them, by the name that `--method` takes.
    pub const ALL: [(&'static str, Method); 10] = [
        ("lowkey", Method::LowKey),
        ("palu", Method::Palu),
        ("recalkv", Method::ReCalKv),
        ("kqsvd", Method::KqSvd),
        ("ksvd", Method::KSvd),
        ("eigen", Method::Eigen),
        ("dense", Method::Dense),
        ("oscar", Method::Oscar),
        ("kivi", Method::Kivi),
        ("kvarn", Method::KVarN),
    ];

    /// The method called `name`.
    ///
    /// # Errors
    /// [`Error::Argument`] with the names that there are.
    pub fn named(name: &str) -> Result<Method> {
        Method::ALL.iter().find(|(known, _)| *known == name).map(|(_, method)| *method).ok_or_else(|| {
            let known: Vec<_> = Method::ALL.iter().map(|(known, _)| *known).collect();
            Error::Argument { name: "method".into(), message: format!("there is no `{name}`; choose one of {}", known.join(", ")) }
        })
    }

    /// The rule for ranks that its paper has.
    pub fn own_ranks(self) -> Ranks {
        match self {
            Method::Palu | Method::ReCalKv => Ranks::Fisher,
            Method::KqSvd | Method::KSvd | Method::Eigen => Ranks::Energy,
            Method::LowKey | Method::Dense | Method::Oscar | Method::Kivi | Method::KVarN => Ranks::Spectrum,
        }
    }

    /// Whether its size is that of its numbers: there is no budget to spend, and no rank to choose.
    pub fn fixed(self) -> bool {
        matches!(self, Method::Dense | Method::Oscar | Method::Kivi | Method::KVarN)
    }

    /// Whether it needs statistics of the model.
    pub fn calibrates(self) -> bool {
        !matches!(self, Method::Dense | Method::Kivi | Method::KVarN)
    }

    /// Bits of a number that can be asked for.
    pub fn widths(self) -> [u8; 3] {
        if matches!(self, Method::Oscar | Method::Kivi | Method::KVarN) { [2, 4, 8] } else { [4, 8, 16] }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        Method::ALL.iter().find(|(_, method)| *method == self).map_or("", |(name, _)| name)
    }
}

/// How lowkey's own rows are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Layout {
    /// Keys before RoPE and values in one row: smallest; keys are rebuilt when they are read.
    #[default]
    Small,
    /// Keys after RoPE and values in rows of their own: nothing is rebuilt.
    Fast,
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

/// A method, a budget and options.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// Whose bases.
    pub method: Method,
    /// How small.
    pub budget: Budget,
    /// `lowkey`: which rows.
    pub layout: Layout,
    /// `lowkey`, small: consecutive layers that share a row.
    pub span: usize,
    /// `lowkey`: what weighs.
    pub sensing: Sensing,
    /// `lowkey`: whether rows have scales of their own, [`Fixed`](Scale::Fixed) or [`Band`](Scale::Band); `None` for what is better row by row.
    pub scale: Option<Scale>,
    /// `palu`, `recalkv`: key heads that share a row; for `palu` value heads as well.
    pub group_heads: usize,
    /// `recalkv`: by what heads are put into groups.
    pub grouping: Grouping,
    /// Published methods: how ranks are dealt out; `None` for the paper's own rule.
    pub ranks: Option<Ranks>,
    /// Published methods and `dense`: bits of a coordinate, one of [`Method::widths`].
    pub bits: u8,
    /// `kvarn`: bits of a value's coordinate, where they are other than a key's.
    pub value_bits: Option<u8>,
    /// What stays exact beside the rows.
    pub exact: Exact,
    /// `lowkey`, fast: the longest context whose positions keys after RoPE are coded for.
    pub context: usize,
}

impl Plan {
    /// `method` within `budget`, all options as they come.
    pub fn new(method: Method, budget: Budget) -> Plan {
        Plan {
            method,
            budget,
            layout: Layout::default(),
            span: 1,
            sensing: Sensing::default(),
            scale: None,
            group_heads: 4,
            grouping: Grouping::default(),
            ranks: None,
            bits: match method {
                Method::Oscar | Method::Kivi => 2,
                Method::KVarN => 4,
                _ => 16,
            },
            value_bits: (method == Method::KVarN).then_some(2),
            exact: Exact::default(),
            context: 8192,
        }
    }

    /// Whether the options are possible ones for a model of this shape.
    ///
    /// # Errors
    /// [`Error::Argument`] with the option and what it may be.
    pub fn check(&self, config: &Config) -> Result<()> {
        let refuse = |name: &str, message: String| Err(Error::Argument { name: name.into(), message });
        self.budget.bytes(config.dense_kv_bytes_per_token())?;
        if self.context == 0 {
            return refuse("context", "a context of no tokens; choose at least 1".into());
        }
        if self.span == 0 {
            return refuse("span", "rows of no layers; choose at least 1".into());
        }
        if self.span > 1 && (self.method, self.layout) != (Method::LowKey, Layout::Small) {
            return refuse("span", "only `--method lowkey --layout small` has rows over several layers".into());
        }
        if self.scale == Some(Scale::Affine) {
            return refuse("scale", "affine ones are for rows of a single band; choose fixed or band".into());
        }
        if self.group_heads == 0 {
            return refuse("group-heads", "groups of no heads; choose at least 1".into());
        }
        if self.grouping == Grouping::Loss && self.method != Method::ReCalKv {
            return refuse("grouping", "only `--method recalkv` reorders heads".into());
        }
        if self.ranks.is_some() && (self.method == Method::LowKey || self.method.fixed()) {
            return refuse("ranks", format!("`--method {}` has no ranks to deal out", self.method.name()));
        }
        let [a, b, c] = self.method.widths();
        if let Some(bits) = [self.bits].into_iter().chain(self.value_bits).find(|bits| ![a, b, c].contains(bits)) {
            return refuse("bits", format!("rows of {bits} bits; choose {a}, {b} or {c}"));
        }
        if self.value_bits.is_some() && self.method != Method::KVarN {
            return refuse("bits", "only `--method kvarn` has values of other bits than keys".into());
        }
        Ok(())
    }

    /// How ranks are dealt out: as asked for, or by the paper's rule.
    pub fn rule(&self) -> Ranks {
        self.ranks.unwrap_or(self.method.own_ranks())
    }

    /// Whether the method asks what disturbances do to the output.
    pub fn weighs(&self) -> bool {
        !self.method.fixed() && matches!(self.rule(), Ranks::Fisher | Ranks::Spectrum)
    }

    /// The options in words, as far as they say something about the rows.
    pub fn options(&self) -> String {
        let mut words = Vec::new();
        match self.method {
            Method::LowKey => {
                words.push(if self.layout == Layout::Small { "small".to_string() } else { "fast".to_string() });
                if self.span > 1 {
                    words.push(format!("span {}", self.span));
                }
                if self.sensing == Sensing::Scalar {
                    words.push("scalar sensitivity".to_string());
                }
            }
            Method::Dense => words.push(format!("q{}", self.bits)),
            Method::Palu => words.push(format!("groups of {}", self.group_heads)),
            Method::ReCalKv => {
                words.push(format!("groups of {}", self.group_heads));
                if self.grouping == Grouping::Loss {
                    words.push("grouped by loss".to_string());
                }
            }
            Method::KqSvd | Method::KSvd | Method::Eigen | Method::Oscar | Method::Kivi | Method::KVarN => {}
        }
        if let Some(ranks) = self.ranks {
            words.push(format!("ranks by {}", ranks.name()));
        }
        if self.bits < 16 && self.method != Method::Dense {
            words.push(match self.value_bits {
                Some(values) => format!("{} bits, values {values}", self.bits),
                None => format!("{} bits", self.bits),
            });
        }
        words.join(", ")
    }
}
