//! Brings the tensors of experts under one set of names, whatever a file has them as: a router, and
//! three matrices for each expert, which are pieces of one tensor in most files.

use super::Config;
use super::design::Experts;
use super::encoding::Encoding;
use super::strewn::Strewn;
use super::weights::{Stored, Weights};
use crate::Result;

/// Parts of a layer that are called otherwise, by what they begin with.
const NAMES: [(&str, &str); 7] = [
    ("mlp.gate.", "mlp.router."),
    ("block_sparse_moe.gate.", "mlp.router."),
    ("block_sparse_moe.router.layer.", "mlp.router."),
    ("block_sparse_moe.router.", "mlp.router."),
    ("block_sparse_moe.input_linear.", "mlp.experts.gate_up_proj."),
    ("block_sparse_moe.output_linear.", "mlp.experts.down_proj."),
    ("block_sparse_moe.experts.", "mlp.experts."),
];

/// The matrices of one expert that are called otherwise.
const MATRICES: [(&str, &str); 3] = [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")];

/// Where in a tensor a matrix of every expert stands.
struct Piece<'a> {
    /// What the matrix is called.
    name: &'a str,
    /// Of an expert's rows its first one, and how many rows further the next is.
    first: usize,
    apart: usize,
}

/// Renames, and takes apart what is stored in one; `gguf` has gpt-oss' experts as all others'.
///
/// # Errors
/// [`Error::Tensor`](crate::Error::Tensor) where a tensor has another shape than its parts, or is
/// there twice.
pub(super) fn arrange(weights: &mut Weights, config: &Config, gguf: bool) -> Result<()> {
    let Some(experts) = &config.design.experts else { return Ok(()) };
    let in_turns = experts.swiglu.is_some() && !gguf;
    let names: Vec<String> = weights.names().map(String::from).collect();
    for name in &names {
        let Some((layer, part)) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) else { continue };
        if let Some(part) = renamed(part) {
            weights.rename(name, format!("model.layers.{layer}.{part}"))?;
        }
    }
    (0..config.num_hidden_layers).try_for_each(|layer| {
        let prefix = format!("model.layers.{layer}.mlp");
        Stacks { weights, experts, hidden: config.hidden_size, in_turns, prefix: &format!("{prefix}.experts") }.take_apart()?;
        as_row(weights, &format!("{prefix}.shared_expert_gate.weight"));
        Ok(())
    })
}

/// What a part of a layer is called here, if that is something else.
fn renamed(part: &str) -> Option<String> {
    if part == "self_attn.sinks.weight" {
        return Some("self_attn.sinks".into());
    }
    let begun = NAMES.iter().find_map(|(from, to)| Some(format!("{to}{}", part.strip_prefix(from)?)));
    let now = begun.as_deref().unwrap_or(part);
    // `experts.3.w1.weight`, and `experts.gate_up_proj_bias` as if it were `….bias`.
    let Some(rest) = now.strip_prefix("mlp.experts.") else { return begun };
    let mut words: Vec<&str> = rest.split('.').collect();
    words.iter_mut().for_each(|word| *word = MATRICES.iter().find(|(from, _)| from == word).map_or(*word, |(_, to)| to));
    let rest = match &words[..] {
        [one] if one.ends_with("_bias") => format!("{}.bias", one.trim_end_matches("_bias")),
        [one] if one.ends_with("_proj") => format!("{one}.weight"),
        [one, "weight"] if one.parse::<usize>().is_err() => format!("{one}.weight"),
        words => words.join("."),
    };
    let all = format!("mlp.experts.{rest}");
    if all == part { begun } else { Some(all) }
}

/// A list of numbers is a matrix of one row.
fn as_row(weights: &mut Weights, name: &str) {
    if let Some(stored) = weights.get_mut(name).filter(|stored| stored.shape.len() == 1) {
        stored.shape.insert(0, 1);
    }
}

/// The experts of a layer.
struct Stacks<'a> {
    weights: &'a mut Weights,
    experts: &'a Experts,
    hidden: usize,
    /// Whether rows of gate and up stand in turns, and floats by input first.
    in_turns: bool,
    prefix: &'a str,
}

impl Stacks<'_> {
    fn take_apart(&mut self) -> Result<()> {
        let (hidden, inner) = (self.hidden, self.experts.width);
        let one = |name| [Piece { name, first: 0, apart: 1 }];
        let pair = |second, apart| [Piece { name: "gate_proj", first: 0, apart }, Piece { name: "up_proj", first: second, apart }];
        let both = if self.in_turns { pair(1, 2) } else { pair(inner, 1) };
        for (name, pieces, rows, cols) in [
            ("gate_up_proj", &both[..], inner, hidden),
            ("gate_proj", &one("gate_proj"), inner, hidden),
            ("up_proj", &one("up_proj"), inner, hidden),
            ("down_proj", &one("down_proj"), hidden, inner),
        ] {
            self.weight(name, pieces, [rows, cols])?;
            self.packed(name, pieces, [rows, cols])?;
            self.bias(name, pieces, rows)?;
        }
        Ok(())
    }

    /// Takes a tensor's place by its pieces, which `make` makes of it for every expert.
    fn replace(&mut self, name: &str, kind: &str, pieces: &[Piece], make: impl Fn(&Stored, usize, &Piece) -> Stored) {
        let Some(stored) = self.weights.get(name) else { return };
        let each = (0..self.experts.count).flat_map(|expert| pieces.iter().map(move |piece| (expert, piece)));
        let parts = each.map(|(expert, piece)| (format!("{}.{expert}.{}.{kind}", self.prefix, piece.name), make(stored, expert, piece))).collect();
        self.weights.take_apart(name, parts);
    }

    /// Checks a shape.
    fn expect(&self, name: &str, shape: &[usize]) -> Result<()> {
        match self.weights.get(name) {
            Some(stored) if stored.shape != shape => {
                let message = format!("has shape {:?} where the model needs {shape:?}", stored.shape);
                Err(self.weights.error(stored, name, message))
            }
            _ => Ok(()),
        }
    }

    /// `[experts][rows][cols]`, or floats by input first.
    fn weight(&mut self, name: &str, pieces: &[Piece], [rows, cols]: [usize; 2]) -> Result<()> {
        let (name, count, all) = (format!("{}.{name}.weight", self.prefix), self.experts.count, rows * pieces.len());
        let by_input = self.in_turns;
        self.expect(&name, &if by_input { [count, cols, all] } else { [count, all, cols] })?;
        self.replace(&name, "weight", pieces, |stored, expert, piece| {
            let each = stored.range.len() / count;
            let begin = stored.range.start + expert * each;
            let (at, length, strewn) = match stored.encoding.filter(|_| by_input) {
                Some(float) => {
                    let bytes = float.bytes(1);
                    let strewn = Strewn::Steps { bytes, rows: piece.apart, columns: all };
                    (piece.first * bytes, strewn.span([rows, cols]), Some(strewn))
                }
                None => (piece.first * (each / all), rows * (each / all), None),
            };
            let range = begin + at..begin + at + length;
            Stored { range, shape: vec![rows, cols], dtype: stored.dtype.clone(), strewn, ..*stored }
        });
        Ok(())
    }

    /// Codes `[experts][rows][cols / 32][16]` and scales `[experts][rows][cols / 32]` of MXFP4.
    fn packed(&mut self, name: &str, pieces: &[Piece], [rows, cols]: [usize; 2]) -> Result<()> {
        let [blocks, scales] = ["blocks", "scales"].map(|kind| format!("{}.{name}_{kind}", self.prefix));
        let (count, all) = (self.experts.count, rows * pieces.len());
        match (self.weights.get(&blocks), self.weights.get(&scales)) {
            (None, None) => return Ok(()),
            (Some(one), None) => return Err(self.weights.error(one, &scales, "missing, though there are blocks".into())),
            (None, Some(one)) => return Err(self.weights.error(one, &blocks, "missing, though there are scales".into())),
            (Some(_), Some(_)) => {}
        }
        self.expect(&blocks, &[count, all, cols / 32, 16])?;
        self.expect(&scales, &[count, all, cols / 32])?;
        for name in [&blocks, &scales] {
            let Some(stored) = self.weights.get(name) else { continue };
            if stored.dtype != "U8" || stored.range.len() != stored.len() {
                return Err(self.weights.error(stored, name, format!("is stored as {} where MXFP4 has bytes, U8", stored.dtype)));
            }
        }
        let of_scales = self.weights.get(&scales).map_or((0, 0), |stored| (stored.file, stored.range.start));
        self.replace(&blocks, "weight", pieces, |stored, expert, piece| {
            let row = expert * all + piece.first;
            let strewn = Strewn::Mxfp4 { apart: piece.apart, scales: (of_scales.0, of_scales.1 + row * (cols / 32)) };
            let start = stored.range.start + row * cols / 2;
            let range = start..start + strewn.span([rows, cols]);
            let encoding = Some(Encoding::Mxfp4);
            Stored { range, shape: vec![rows, cols], dtype: "MXFP4".into(), encoding, strewn: Some(strewn), ..*stored }
        });
        self.weights.take_apart(&scales, Vec::new());
        Ok(())
    }

    /// `[experts][rows]`.
    fn bias(&mut self, name: &str, pieces: &[Piece], rows: usize) -> Result<()> {
        let (name, count, all) = (format!("{}.{name}.bias", self.prefix), self.experts.count, rows * pieces.len());
        self.expect(&name, &[count, all])?;
        self.replace(&name, "bias", pieces, |stored, expert, piece| {
            let bytes = stored.range.len() / (count * all);
            let start = stored.range.start + (expert * all + piece.first) * bytes;
            let strewn = (piece.apart > 1).then_some(Strewn::Steps { bytes, rows: 0, columns: piece.apart });
            let length = strewn.as_ref().map_or(rows * bytes, |strewn| strewn.span([1, rows]));
            Stored { range: start..start + length, shape: vec![rows], dtype: stored.dtype.clone(), strewn, ..*stored }
        });
        Ok(())
    }
}
