//! What compression adds to a model: the object `"lowkey"`, and to the tensors a basis for every
//! latent.
//!
//! It stands in an [adapter file](super::adapter) beside the model, or in a checkpoint that stands
//! alone, whose `config.json` has the object. There all of the model's tensors are kept, in its
//! names, some of them with their heads in another order. Beside them, for row `i` of `"rows"`
//! ([`LatentSpec`]), which codes a vector `y` of width `w` in `r` coordinates, `z = (y − μ)·A` and
//! `ŷ = ẑ·B + μ`:
//!
//! | tensor | shape | what |
//! |---|---|---|
//! | `rows.{i}.mean` | `[w]` | `μ`; of keys after RoPE the mean before it, which rotates with the token's position |
//! | `rows.{i}.down.weight` | `[r, w]` | `Aᵀ`; left out where it is `B` |
//! | `rows.{i}.up.weight` | `[w, r]` | `Bᵀ` |

use super::{Checkpoint, Config, Source};
use crate::kv::{Coder, Exact, LatentKind, LatentSet, LatentSpec};
use crate::{Error, Result};
use nalgebra::{DMatrix, DVector};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// The object `"lowkey"`: what was made, and of what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Factored {
    /// Version of this format: [`Factored::FORMAT`].
    pub format: u32,
    /// The method's name, as `--method` takes it.
    pub method: String,
    /// Its options, in words: `small, span 4`.
    pub options: String,
    /// Bytes that a token adds to the cache, over the whole model.
    pub kv_bytes_per_token: u64,
    /// SHA-256 of the calibration text.
    pub calibration_digest: String,
    /// SHA-256 of the source checkpoint's weights file(s).
    pub source_digest: String,
    /// What stays exact beside the rows unless a session asks otherwise.
    pub exact: Exact,
    /// The longest context that rows of keys after RoPE were made for.
    ///
    /// `None` where that does not matter.
    pub context: Option<usize>,
    /// The rows that a token leaves in the cache.
    pub rows: Vec<LatentSpec>,
    /// The model that it was made for; in an adapter file always there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

impl Factored {
    /// The version written and read by this release.
    pub const FORMAT: u32 = 4;

    /// Reads the object `"lowkey"` of the file at `path`.
    pub(super) fn parse(value: &Value, path: &Path) -> Result<Factored> {
        let bad = |message: String| Error::Checkpoint { path: path.into(), message };
        // The version comes first: a later format may well differ in everything else.
        match value["format"].as_u64() {
            Some(format) if format == Factored::FORMAT as u64 => {}
            Some(format) => {
                let message =
                    format!("\"lowkey\" has format {format}, and this release reads {}; compress the model again with it", Factored::FORMAT);
                return Err(Error::Unsupported { path: path.into(), message });
            }
            None => return Err(bad("\"lowkey\" has no format version".into())),
        }
        Factored::deserialize(value).map_err(|e| bad(format!("\"lowkey\" cannot be read: {e}")))
    }

    /// Whether it fits the model.
    pub(super) fn check(&self, config: &Config, path: &Path) -> Result<()> {
        let bad = |message: String| Error::Checkpoint { path: path.into(), message };
        LatentSet::check(&self.rows, &config.geometry()).map_err(|message| bad(format!("\"lowkey\": {message}")))?;
        let rows = LatentSet::bytes_per_token(&self.rows);
        if self.kv_bytes_per_token != rows {
            return Err(bad(format!("\"lowkey\" promises {} bytes per token of rows that take {rows}", self.kv_bytes_per_token)));
        }
        Ok(())
    }

    /// Reads the object `"lowkey"` of a model with this `config`; `path` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another version of the format, [`Error::Checkpoint`] where the
    /// object is incomplete or does not fit the model.
    pub fn from_json(value: &Value, config: &Config, path: &Path) -> Result<Factored> {
        let factored = Factored::parse(value, path)?;
        factored.check(config, path)?;
        Ok(factored)
    }
}

/// The tensors of row `index`: names and shapes of mean, down and up.
pub(crate) fn row_tensors(index: usize, spec: &LatentSpec, head_dim: usize) -> [(String, Vec<usize>); 3] {
    let (width, rank) = (spec.width(head_dim), spec.format.rank());
    [
        (format!("rows.{index}.mean"), vec![width]),
        (format!("rows.{index}.down.weight"), vec![rank, width]),
        (format!("rows.{index}.up.weight"), vec![width, rank]),
    ]
}

impl Checkpoint {
    /// By latent, the frequency pairs of RoPE in which a mean rotates, over all its heads.
    ///
    /// Reads no basis. None where the model is dense.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a mean is not finite, and those of reading.
    pub fn mean_pairs(&self) -> Result<Vec<usize>> {
        let (d, rows) = (self.config().head_dim, self.factored().map_or(&[][..], |factored| &factored.rows));
        let pairs = |(index, spec): (usize, &LatentSpec)| {
            if spec.kind != LatentKind::PostRopeKeys {
                return Ok(0);
            }
            let [(name, shape), ..] = row_tensors(index, spec, d);
            Ok(spec.mean_pairs(&self.f32(&name, &shape)?, d))
        };
        rows.iter().enumerate().map(pairs).collect()
    }

    /// The latents with their bases, where the model has been compressed.
    ///
    /// # Errors
    /// [`Error::Tensor`] where a basis is not finite.
    pub fn rows(&self) -> Result<Option<LatentSet>> {
        let Some(factored) = self.factored() else { return Ok(None) };
        let coder = |(index, spec): (usize, &LatentSpec)| -> Result<Coder> {
            let [mean, down, up] = row_tensors(index, spec, self.config().head_dim);
            let (width, rank) = (mean.1[0], down.1[0]);
            // Row by row `[out, in]` is column by column `[in, out]`.
            let up = DMatrix::from_vec(rank, width, self.f32(&up.0, &up.1)?);
            let down = match self.has(&down.0) {
                true => DMatrix::from_vec(width, rank, self.f32(&down.0, &down.1)?),
                false => up.transpose(),
            };
            Ok(Coder { format: spec.format.clone(), mean: DVector::from_vec(self.f32(&mean.0, &mean.1)?), down: Some(down), up })
        };
        let coders = factored.rows.iter().enumerate().map(coder).collect::<Result<_>>()?;
        Ok(Some(LatentSet { specs: factored.rows.clone(), coders, exact: factored.exact }))
    }
}
