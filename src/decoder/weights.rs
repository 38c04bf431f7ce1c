//! A checkpoint's weights on the device, laid out as the kernels read them.

use crate::cache::Layout;
use crate::checkpoint::{Checkpoint, Config};
use crate::gpu::{Device, Matrix, pad};
use crate::kernels::coded::{Coded, by_coordinates, by_dimensions};
use crate::kernels::{merge, pack::Pack, prepare, values};
use crate::rows::{Holds, RowSet, RowSpec, Side};
use crate::{Error, Result};
use half::f16;

/// Rows of a matrix that must stay in one part: a block of the widest kernel.
const ALIGN: usize = 128;

/// One layer.
pub(super) struct Layer {
    pub attention_gain: wgpu::Buffer,
    /// Query heads, key heads and value heads, each padded to four rows: `[stride][D]`.
    pub projection: Matrix,
    /// QK-norm's gains and the projection's biases, where the family has either.
    pub added: Option<wgpu::Buffer>,
    pub bias: bool,
    pub value_groups: wgpu::Buffer,
    pub coded: Option<CodedLayer>,
    /// `[D][H·pad(head_dim)]`.
    pub output: Matrix,
    pub output_bias: Option<wgpu::Buffer>,
    pub mlp_gain: wgpu::Buffer,
    /// Rows in pairs: gate, up.
    pub gate_up: Matrix,
    pub down: Matrix,
}

/// What a layer reads coded rows with.
pub(super) struct CodedLayer {
    pub keys: Coded,
    pub values: Coded,
    /// Whether keys are coded after RoPE, and queries taken to them.
    pub taken: bool,
    pub key_table: wgpu::Buffer,
    pub key_up: wgpu::Buffer,
    pub value_table: wgpu::Buffer,
    pub query_heads: wgpu::Buffer,
    pub value_up: wgpu::Buffer,
    pub value_means: wgpu::Buffer,
}

/// What a row is coded with.
pub(super) struct Basis {
    /// `Aᵀ`, `[r][w]` in f32: rounding would move coordinates from one code to the next.
    pub down: Matrix,
    pub mean: wgpu::Buffer,
    pub table: wgpu::Buffer,
}

fn padded(mut v: Vec<f32>) -> Vec<f32> {
    v.resize(pad(v.len()), 0.0);
    v
}

/// Appends `numbers` in runs of `width`, each padded to four; each number stands for `unit` of them.
fn widen<T: Copy>(to: &mut Vec<T>, numbers: &[T], width: usize, unit: usize, zero: T) {
    for run in numbers.chunks_exact(width * unit) {
        to.extend_from_slice(run);
        to.resize(to.len() + (pad(width) - width) * unit, zero);
    }
}

/// The numbers, or an error that names them.
fn checked(what: &str, numbers: Vec<f16>) -> Result<Vec<f16>> {
    if numbers.iter().all(|x| x.is_finite()) {
        return Ok(numbers);
    }
    Err(Error::Numeric { what: what.into(), message: "a number is beyond what 16 bits hold; --device cpu runs it".into() })
}

impl Basis {
    pub fn load(device: &Device, rows: &RowSet, row: usize) -> Result<Basis> {
        let coder = &rows.coders[row];
        let label = |what: &str| format!("row {row}'s {what}");
        Ok(Basis {
            // Column by column `[w, r]` is row by row `[r, w]`.
            down: Matrix::upload(device, &label("down-projection"), coder.down.as_slice(), coder.down.ncols(), coder.down.nrows(), ALIGN)?,
            mean: device.upload(&label("mean"), coder.mean.as_slice())?,
            table: device.upload(&label("table"), &Pack::table(&coder.format))?,
        })
    }
}

/// A side's means by key/value head, `[H_kv][head_dim]`.
fn means(config: &Config, rows: &RowSet, coded: &Coded) -> Vec<f32> {
    let slice =
        |slice: &crate::kernels::coded::Slice| rows.coders[slice.row].mean.as_slice()[slice.offset..][..slice.kv_heads * config.head_dim].to_vec();
    coded.slices.iter().flat_map(slice).collect()
}

/// A side's up-projections by key/value head, as `lay` lays them out.
fn ups(config: &Config, rows: &RowSet, coded: &Coded, lay: impl Fn(&dyn Fn(usize, usize) -> f32, usize, usize) -> Vec<f16>) -> Vec<f16> {
    let head = |kv: usize| {
        let (_, slice) = coded.of_head(kv);
        let first = slice.offset + (kv - slice.first_head) * config.head_dim;
        let up = &rows.coders[slice.row].up;
        lay(&|coordinate, dim| up[(coordinate, first + dim)], up.nrows(), config.head_dim)
    };
    (0..config.num_key_value_heads).flat_map(head).collect()
}

impl CodedLayer {
    fn load(device: &Device, config: &Config, rows: &RowSet, layout: &Layout, layer: usize) -> Result<CodedLayer> {
        let [keys, values] = [Side::Keys, Side::Values].map(|side| Coded::new(config, &rows.specs, layout, layer, side));
        let label = |what: &str| format!("layer {layer}'s {what} of coded rows");
        let taken = rows.specs[keys.slices[0].row].holds == Holds::TurnedKeys;
        let key_up = match taken {
            true => ups(config, rows, &keys, |up, rank, dim| by_dimensions(up, rank, dim)),
            false => ups(config, rows, &keys, |up, rank, dim| by_coordinates(up, rank, dim)),
        };
        let value_up = ups(config, rows, &values, |up, rank, dim| by_coordinates(up, rank, dim));
        let upload = |what: &str, up: Vec<f16>| device.upload(&label(what), &checked(&label(what), up)?);
        Ok(CodedLayer {
            taken,
            key_table: device.upload(&label("key table"), &keys.key_table(config, taken, &means(config, rows, &keys)))?,
            key_up: upload("key up-projection", key_up)?,
            value_table: device.upload(&label("value table"), &values.value_table())?,
            query_heads: device.upload(&label("query heads"), &merge::heads(config, &values))?,
            value_up: upload("value up-projection", value_up)?,
            value_means: device.upload(&label("value means"), &means(config, rows, &values))?,
            keys,
            values,
        })
    }
}

/// The tensors of a layer's attention.
struct Attention<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Config,
    prefix: String,
}

impl Attention<'_> {
    fn name(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    fn bias(&self, rest: &str, width: usize) -> Result<Option<Vec<f32>>> {
        let name = self.name(rest);
        if self.checkpoint.has(&name) { self.checkpoint.f32(&name, &[width]).map(Some) } else { Ok(None) }
    }

    /// Query heads, key heads, value heads: their tensors and numbers.
    fn sides(&self) -> [(&'static str, usize); 3] {
        let c = self.config;
        [("q_proj", c.num_attention_heads), ("k_proj", c.num_key_value_heads), ("v_proj", c.num_key_value_heads)]
    }

    /// All heads, each with zero rows up to a multiple of four.
    fn projection(&self) -> Result<Vec<f16>> {
        let (hidden, dim) = (self.config.hidden_size, self.config.head_dim);
        let mut rows = Vec::new();
        for (side, heads) in self.sides() {
            let weight = self.checkpoint.f16(&self.name(&format!("{side}.weight")), &[heads * dim, hidden])?;
            widen(&mut rows, &weight, dim, hidden, f16::ZERO);
        }
        Ok(rows)
    }

    /// QK-norm's gains `[2][head_dim]`, then the biases of the projection's rows; and whether there are any of these.
    fn added(&self) -> Result<(Vec<f32>, bool)> {
        let dim = self.config.head_dim;
        let (mut added, mut biases, mut any) = (Vec::new(), Vec::new(), false);
        if self.config.qk_norm {
            for name in ["q_norm.weight", "k_norm.weight"] {
                added.extend(self.checkpoint.f32(&self.name(name), &[dim])?);
            }
        }
        for (side, heads) in self.sides() {
            let bias = self.bias(&format!("{side}.bias"), heads * dim)?;
            any |= bias.is_some();
            widen(&mut biases, &bias.unwrap_or_else(|| vec![0.0; heads * dim]), dim, 1, 0.0);
        }
        added.extend(biases.into_iter().filter(|_| any));
        Ok((added, any))
    }

    /// `[D][H·pad(head_dim)]`.
    fn output(&self, device: &Device, label: &str) -> Result<Matrix> {
        let (c, hidden) = (self.config, self.config.hidden_size);
        let mut wide = Vec::new();
        let weight = self.checkpoint.f16(&self.name("o_proj.weight"), &[hidden, c.num_attention_heads * c.head_dim])?;
        widen(&mut wide, &weight, c.head_dim, 1, f16::ZERO);
        Matrix::upload(device, label, &wide, hidden, c.num_attention_heads * pad(c.head_dim), ALIGN)
    }
}

impl Layer {
    pub fn load(device: &Device, checkpoint: &Checkpoint, rows: Option<(&RowSet, &Layout)>, l: usize) -> Result<Layer> {
        let c = checkpoint.config();
        let (hidden, ffn) = (c.hidden_size, c.intermediate_size);
        let prefix = format!("model.layers.{l}");
        let at = |rest: &str| format!("{prefix}.{rest}");
        let label = |what: &str| format!("layer {l}'s {what}");
        let gain = |rest: &str, width: usize| device.upload(&at(rest), &padded(checkpoint.f32(&at(rest), &[width])?));
        let attention = Attention { checkpoint, config: c, prefix: at("self_attn") };

        let projection = attention.projection()?;
        let (added, bias) = attention.added()?;
        let coded = rows.map(|(rows, layout)| CodedLayer::load(device, c, rows, layout, l)).transpose()?;
        let output = attention.output(device, &label("output projection"))?;
        let gate = checkpoint.f16(&at("mlp.gate_proj.weight"), &[ffn, hidden])?;
        let up = checkpoint.f16(&at("mlp.up_proj.weight"), &[ffn, hidden])?;
        let pairs: Vec<f16> = gate.chunks_exact(hidden).zip(up.chunks_exact(hidden)).flat_map(|(g, u)| g.iter().chain(u).copied()).collect();
        let down = checkpoint.f16(&at("mlp.down_proj.weight"), &[hidden, ffn])?;
        let output_bias = attention.bias("o_proj.bias", hidden)?.map(|b| device.upload(&label("output bias"), &padded(b))).transpose()?;
        Ok(Layer {
            attention_gain: gain("input_layernorm.weight", hidden)?,
            projection: Matrix::upload(device, &label("projection"), &projection, prepare::stride(c), hidden, ALIGN)?,
            added: if added.is_empty() { None } else { Some(device.upload(&label("norms and biases"), &added)?) },
            bias,
            value_groups: device.upload(&label("value groups"), &values::groups(c, coded.as_ref().map(|coded| &coded.values)).0)?,
            coded,
            output,
            output_bias,
            mlp_gain: gain("post_attention_layernorm.weight", hidden)?,
            gate_up: Matrix::upload(device, &label("gate and up projection"), &pairs, 2 * ffn, hidden, ALIGN)?,
            down: Matrix::upload(device, &label("down projection"), &down, hidden, ffn, ALIGN)?,
        })
    }
}

/// The embedding table, final norm and head.
pub(super) struct Ends {
    pub embedding: Matrix,
    pub final_gain: wgpu::Buffer,
    /// `None` where the head is the embedding table.
    pub head: Option<Matrix>,
}

impl Ends {
    pub fn load(device: &Device, checkpoint: &Checkpoint) -> Result<Ends> {
        let c = checkpoint.config();
        let table = |name: &str| {
            let data = checkpoint.f16(name, &[c.vocab_size, c.hidden_size])?;
            Matrix::upload(device, name, &data, c.vocab_size, c.hidden_size, ALIGN)
        };
        Ok(Ends {
            embedding: table("model.embed_tokens.weight")?,
            final_gain: device.upload("model.norm.weight", &padded(checkpoint.f32("model.norm.weight", &[c.hidden_size])?))?,
            head: if c.tie_word_embeddings { None } else { Some(table("lm_head.weight")?) },
        })
    }
}

/// What the kernels cannot be made for, said before weights are read.
pub(super) fn check(checkpoint: &Checkpoint, rows: Option<&[RowSpec]>) -> Result<()> {
    let config = checkpoint.config();
    let refuse = |message: String| Err(Error::Unsupported { path: checkpoint.path().to_path_buf(), message });
    if config.head_dim > 512 {
        return refuse(format!("heads are {} numbers wide; the GPU kernels take up to 512. --device cpu runs it", config.head_dim));
    }
    let Some(specs) = rows else { return Ok(()) };
    RowSet::check(specs, config).map_err(|message| Error::Argument { name: "rows".into(), message })?;
    for layer in 0..config.num_hidden_layers {
        let keys = RowSet::sources(specs, layer, Side::Keys, config.head_dim);
        let turned = keys.iter().filter(|source| specs[source.row].holds == Holds::TurnedKeys).count();
        if turned > 0 && turned < keys.len() {
            return refuse(format!(
                "layer {layer} codes some keys before RoPE and others after it, which the GPU kernels do not take. --device cpu runs it"
            ));
        }
    }
    Ok(())
}
