//! From a budget to the rank of every group of heads.

use crate::checkpoint::{Config, FactoredLayer, Group};
use crate::{Error, Result};

/// A published system that factors a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// ReCalKV (arXiv 2505.24357): keys in groups of similar heads, values over all heads.
    ReCalKv,
}

impl Method {
    /// All of them, by the name that `--method` takes.
    pub const ALL: [(&'static str, Method); 1] = [("recalkv", Method::ReCalKv)];

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

    /// Its name.
    pub fn name(self) -> &'static str {
        Method::ALL.iter().find(|(_, method)| *method == self).map_or("", |(name, _)| name)
    }
}

/// Method and budget, resolved: the group and rank of every head.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    method: Method,
    keep: f64,
    group_heads: usize,
    layers: Vec<FactoredLayer>,
}

impl Plan {
    /// Spreads `keep` uniformly: every group gets that share of its width, rounded to the multiple of 8 that its width allows (of 4, 2 or 1 in groups
    /// narrower than 64, 32 and 16). What rounding takes from one group or adds to it is carried to the next, so that the total hits the budget as
    /// closely as a single group's rounding allows, and layers share the difference evenly. At `keep = 1` all ranks are full.
    ///
    /// Keys stand in groups of `group_heads` heads (the last may be smaller), values in one group of all heads. The values' up-projection is folded into the output
    /// projection where their rank is no larger than a head, so that folding does not make it larger.
    ///
    /// # Errors
    /// [`Error::Argument`] where `keep` is not in `(0, 1]` or `group_heads` is zero.
    pub fn new(config: &Config, method: Method, keep: f64, group_heads: usize) -> Result<Plan> {
        if !(keep > 0.0 && keep <= 1.0) {
            return Err(Error::Argument { name: "keep".into(), message: format!("{keep} is not a fraction to keep; choose one above 0, up to 1") });
        }
        if group_heads == 0 {
            return Err(Error::Argument { name: "group-heads".into(), message: "groups of no heads; choose at least 1".into() });
        }
        let (heads, d) = (config.num_key_value_heads, config.head_dim);
        let mut carried = 0.0;
        let mut group = |kv_heads: usize| {
            let width = kv_heads * d;
            let step = [8, 4, 2].into_iter().find(|step| width.is_multiple_of(*step) && width >= 8 * step).unwrap_or(1);
            let wanted = keep * width as f64 + carried;
            let rank = if keep == 1.0 { width } else { ((wanted / step as f64).round() as usize * step).clamp(step, width) };
            carried = wanted - rank as f64;
            Group { kv_heads, rank }
        };
        let layers = (0..config.num_hidden_layers)
            .map(|_| {
                let key_groups = (0..heads).step_by(group_heads).map(|first| group(group_heads.min(heads - first))).collect();
                let value_groups = vec![group(heads)];
                let fused = value_groups.iter().all(|group| group.rank <= d);
                FactoredLayer { key_groups, value_groups, fused }
            })
            .collect();
        Ok(Plan { method, keep, group_heads, layers })
    }

    /// Whether this is a plan for models of the shape of `config`.
    ///
    /// # Errors
    /// [`Error::Argument`] where it is another shape's.
    pub fn check(&self, config: &Config) -> Result<()> {
        if *self == Plan::new(config, self.method, self.keep, self.group_heads)? {
            return Ok(());
        }
        Err(Error::Argument { name: "plan".into(), message: "was made for a model of another shape; make it anew from this model's config".into() })
    }

    /// Whose factors.
    pub fn method(&self) -> Method {
        self.method
    }

    /// The kept fraction asked for.
    pub fn keep(&self) -> f64 {
        self.keep
    }

    /// Groups and ranks by layer. Heads stand in the order of the groups, to which the method permutes them.
    pub fn layers(&self) -> &[FactoredLayer] {
        &self.layers
    }

    /// Numbers that a token adds to the cache, over the whole model.
    pub fn numbers_per_token(&self) -> usize {
        self.layers.iter().flat_map(|layer| layer.key_groups.iter().chain(&layer.value_groups)).map(|group| group.rank).sum()
    }

    /// Bytes that a token adds to a cache of f16 rows.
    pub fn kv_bytes_per_token(&self) -> u64 {
        2 * self.numbers_per_token() as u64
    }

    /// The kept fraction that rounding has led to.
    pub fn achieved_keep(&self, config: &Config) -> f64 {
        self.kv_bytes_per_token() as f64 / config.dense_kv_bytes_per_token() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Architecture, RopeScaling};

    fn config(layers: usize, query_heads: usize, kv_heads: usize, head_dim: usize) -> Config {
        Config {
            architecture: Architecture::Llama,
            hidden_size: query_heads * head_dim,
            intermediate_size: 8,
            num_hidden_layers: layers,
            num_attention_heads: query_heads,
            num_key_value_heads: kv_heads,
            head_dim,
            vocab_size: 8,
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            tie_word_embeddings: true,
            attention_bias: false,
            qk_norm: false,
            sliding_window: None,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
        }
    }

    #[test]
    fn budgets_are_met_within_two_percent_on_real_shapes() {
        // SmolLM2-135M, Llama-3.1-8B, Llama-2-7B, stories15M.
        for shape in [(30, 9, 3, 64), (32, 32, 8, 128), (32, 32, 32, 128), (6, 6, 6, 48)] {
            let config = config(shape.0, shape.1, shape.2, shape.3);
            for percent in 10..=100 {
                let keep = percent as f64 / 100.0;
                let plan = Plan::new(&config, Method::ReCalKv, keep, 4).unwrap();
                let achieved = plan.achieved_keep(&config);
                assert!((achieved / keep - 1.0).abs() < 0.02, "{shape:?} {keep}: {achieved}");
                for group in plan.layers().iter().flat_map(|layer| layer.key_groups.iter().chain(&layer.value_groups)) {
                    assert!(group.rank % 8 == 0 && group.rank > 0 && group.rank <= group.kv_heads * config.head_dim);
                }
            }
        }
    }

    #[test]
    fn all_is_all_and_the_last_group_may_be_smaller() {
        let plan = Plan::new(&config(2, 7, 7, 10), Method::ReCalKv, 1.0, 3).unwrap();
        let groups = [(3, 30), (3, 30), (1, 10)].map(|(kv_heads, rank)| Group { kv_heads, rank });
        assert_eq!(plan.layers()[1].key_groups, groups);
        assert_eq!(plan.layers()[1].value_groups, [Group { kv_heads: 7, rank: 70 }]);
        assert!(!plan.layers()[1].fused);
    }

    #[test]
    fn values_are_folded_where_the_output_projection_does_not_grow() {
        for (keep, fused) in [(0.25, true), (0.3125, true), (0.5, false)] {
            assert_eq!(Plan::new(&config(1, 9, 3, 64), Method::ReCalKv, keep, 4).unwrap().layers()[0].fused, fused, "{keep}");
        }
        assert!(Plan::new(&config(1, 4, 1, 16), Method::ReCalKv, 1.0, 4).unwrap().layers()[0].fused);
    }

    #[test]
    fn neighbouring_layers_differ_by_one_step_at_most() {
        let plan = Plan::new(&config(30, 9, 3, 64), Method::ReCalKv, 0.45, 4).unwrap();
        let ranks: Vec<_> = plan.layers().iter().map(|layer| layer.key_groups[0].rank).collect();
        assert!(ranks.iter().all(|rank| [80, 88].contains(rank)), "{ranks:?}");
    }

    #[test]
    fn impossible_budgets_are_refused() {
        for keep in [0.0, -1.0, 1.01, f64::NAN, f64::INFINITY] {
            assert!(Plan::new(&config(1, 2, 1, 8), Method::ReCalKv, keep, 4).unwrap_err().to_string().starts_with("keep: "));
        }
        assert!(Plan::new(&config(1, 2, 1, 8), Method::ReCalKv, 0.5, 0).is_err());
        assert!(Method::named("nothing").unwrap_err().to_string().contains("recalkv"));
        assert_eq!(Method::named("recalkv").unwrap().name(), "recalkv");
    }
}
