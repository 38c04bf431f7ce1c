//! Latents on the device: what they are read with in every layer, and what they are coded with.

use crate::checkpoint::{Checkpoint, Config};
use crate::gpu::{Device, ElementType, Matrix, Shape, Tensor};
use crate::kernels::coded::{Coded, by_coordinates, by_dimensions};
use crate::kernels::energy::LOTS;
use crate::kernels::{merge, pack::Pack, values as sum};
use crate::kv::Layout;
use crate::kv::{Energy, Exact, KvSide, LatentKind, LatentSet, LatentSpec, RUN};
use crate::{Error, Result};
use half::f16;
use nalgebra::DMatrix;

/// The latents of a model, or of one text.
pub(super) struct Latents {
    pub specs: Vec<LatentSpec>,
    pub exact: Exact,
    pub layout: Layout,
    /// By row.
    pub bases: Vec<Basis>,
    pub layers: Vec<LatentLayer>,
    /// What orthonormal bases hold of what was coded with them, f32 `[rows][2 · LOTS]`.
    pub energies: Tensor,
}

impl Latents {
    /// Uploads bases and tables.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], and [`Error::Numeric`] where a basis does not fit 16 bits.
    pub fn load(device: &Device, config: &Config, rows: &LatentSet) -> Result<Latents> {
        let layout = Layout::new(&rows.specs, config.num_hidden_layers, config.head_dim);
        Ok(Latents {
            bases: (0..rows.specs.len()).map(|row| Basis::load(device, rows, row)).collect::<Result<_>>()?,
            layers: (0..config.num_hidden_layers).map(|layer| LatentLayer::load(device, config, rows, &layout, layer)).collect::<Result<_>>()?,
            energies: energies(device, rows.specs.len())?,
            specs: rows.specs.clone(),
            exact: rows.exact,
            layout,
        })
    }

    /// Those of a text that is being read, none so far of `rows`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn none(device: &Device, exact: Exact, rows: usize) -> Result<Latents> {
        let energies = energies(device, rows)?;
        let layout = Layout { stores: Vec::new(), places: Vec::new() };
        Ok(Latents { specs: Vec::new(), exact, layout, bases: Vec::new(), layers: Vec::new(), energies })
    }

    /// What orthonormal bases hold of all that was coded with them so far.
    ///
    /// # Errors
    /// The device's.
    pub fn energy(&self, device: &Device) -> Result<Energy> {
        let count = LOTS * self.specs.len();
        let bytes = 8 * count as u64;
        let (mut sums, back) = (vec![[0f32; 2]; count], device.readback("energies of rows", bytes)?);
        let (commands, _) = device.encode("energies", |_| (), |encoder| encoder.copy_buffer_to_buffer(&self.energies, 0, &back, 0, bytes))?;
        device.submit_and_read(commands, &back, &mut sums)?;
        let mut energy = Energy::default();
        sums.iter().for_each(|[all, held]| energy += Energy { all: f64::from(*all), held: f64::from(*held) });
        Ok(energy)
    }

    /// Appends what `set`, all rows so far, has in addition, and the `layers` that read it.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn append(&mut self, device: &Device, config: &Config, set: &LatentSet, layers: std::ops::Range<usize>) -> Result<()> {
        self.layout = Layout::new(&set.specs, config.num_hidden_layers, config.head_dim);
        for row in self.specs.len()..set.specs.len() {
            self.bases.push(Basis::load(device, set, row)?);
            self.specs.push(set.specs[row].clone());
        }
        for layer in layers {
            self.layers.push(LatentLayer::load(device, config, set, &self.layout, layer)?);
        }
        Ok(())
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        let basis = |basis: &Basis| basis.down.as_ref().map_or(0, Matrix::bytes) + basis.mean.size() + basis.table.size();
        let layer = |l: &LatentLayer| {
            let tables = [&l.key_table, &l.value_table, &l.value_groups, &l.chosen_groups, &l.query_heads, &l.value_means];
            tables.iter().map(|table| table.size()).sum::<u64>() + l.key_up.size() + l.value_up.size()
        };
        self.bases.iter().map(basis).sum::<u64>() + self.layers.iter().map(layer).sum::<u64>()
    }

    /// Whether any row belongs to several layers.
    pub fn spans(&self) -> bool {
        self.specs.iter().any(|row| row.layers > 1)
    }
}

fn energies(device: &Device, rows: usize) -> Result<Tensor> {
    Tensor::zeroed(device, "energies of rows", ElementType::F32, Shape::dense(rows, 2 * LOTS))
}

/// What a layer reads latents with.
pub(super) struct LatentLayer {
    pub keys: Coded,
    pub values: Coded,
    /// Whether keys are coded after RoPE, and queries absorb their basis.
    pub absorbed: bool,
    pub key_table: wgpu::Buffer,
    pub key_up: Tensor,
    pub value_table: wgpu::Buffer,
    /// The table by which values are summed: of all, and as chosen by key/value head.
    pub value_groups: wgpu::Buffer,
    pub chosen_groups: wgpu::Buffer,
    pub query_heads: wgpu::Buffer,
    pub value_up: Tensor,
    pub value_means: wgpu::Buffer,
}

/// What a row is coded with.
pub(super) struct Basis {
    /// `Aᵀ`, `[r][w]` in f32: rounding would move coordinates from one code to the next.
    ///
    /// `None` where the basis is orthonormal, and rows are coded with what they are read with.
    pub down: Option<Matrix>,
    /// `[1][w]`.
    pub mean: Tensor,
    /// [`Pack::table`].
    pub table: Tensor,
}

/// The numbers, or an error that names them.
fn checked(what: &str, numbers: Vec<f16>) -> Result<Vec<f16>> {
    if numbers.iter().all(|x| x.is_finite()) {
        return Ok(numbers);
    }
    Err(Error::Numeric { what: what.into(), message: "a number is beyond what 16 bits hold; --device cpu runs it".into() })
}

impl Basis {
    pub fn load(device: &Device, rows: &LatentSet, row: usize) -> Result<Basis> {
        let coder = &rows.coders[row];
        let label = |what: &str| format!("row {row}'s {what}");
        let table = Pack::table(&coder.format);
        // Column by column `[w, r]` is row by row `[r, w]`.
        let upload = |down: &DMatrix<f32>| Matrix::upload(device, &label("down-projection"), down.as_slice(), [down.ncols(), down.nrows()]);
        Ok(Basis {
            down: coder.down.as_ref().map(upload).transpose()?,
            mean: Tensor::vector(device, &label("mean"), coder.mean.as_slice())?,
            table: Tensor::upload(device, &label("table"), table.as_flattened(), Shape::dense(table.len(), 4))?,
        })
    }
}

/// A side's means by key/value head, `[H_kv][head_dim]`.
fn means(config: &Config, rows: &LatentSet, coded: &Coded) -> Vec<f32> {
    let slice =
        |slice: &crate::kernels::coded::Slice| rows.coders[slice.row].mean.as_slice()[slice.offset..][..slice.kv_heads * config.head_dim].to_vec();
    coded.slices.iter().flat_map(slice).collect()
}

/// A side's up-projections by key/value head, as `lay` lays them out.
fn ups(config: &Config, rows: &LatentSet, coded: &Coded, lay: impl Fn(&dyn Fn(usize, usize) -> f32, usize, usize) -> Vec<f16>) -> Vec<f16> {
    let head = |kv: usize| {
        let (_, slice) = coded.of_head(kv);
        let first = slice.offset + (kv - slice.first_head) * config.head_dim;
        let (up, from) = (&rows.coders[slice.row].up, RUN * slice.runs.start);
        lay(&|coordinate, dim| up[(from + coordinate, first + dim)], slice.rank(), config.head_dim)
    };
    (0..config.num_key_value_heads).flat_map(head).collect()
}

impl LatentLayer {
    fn load(device: &Device, config: &Config, rows: &LatentSet, layout: &Layout, layer: usize) -> Result<LatentLayer> {
        let attention = &super::attention_shape(config);
        let [keys, values] = [KvSide::Keys, KvSide::Values].map(|side| Coded::new(attention, &rows.specs, layout, layer, side));
        let label = |what: &str| format!("layer {layer}'s {what} of coded rows");
        let absorbed = rows.specs[keys.slices[0].row].kind == LatentKind::PostRopeKeys;
        let key_means = means(config, rows, &keys);
        let keys = if absorbed { keys.about(attention, &key_means) } else { keys };
        let key_up = match absorbed {
            true => ups(config, rows, &keys, |up, rank, dim| by_dimensions(up, rank, dim)),
            false => ups(config, rows, &keys, |up, rank, dim| by_coordinates(up, rank, dim)),
        };
        let value_up = ups(config, rows, &values, |up, rank, dim| by_coordinates(up, rank, dim));
        let upload = |what: &str, up: Vec<f16>| Tensor::vector(device, &label(what), &checked(&label(what), up)?);
        Ok(LatentLayer {
            absorbed,
            key_table: device.upload(&label("key table"), &keys.key_table(attention, absorbed, &key_means))?,
            key_up: upload("key up-projection", key_up)?,
            value_table: device.upload(&label("value table"), &values.value_table())?,
            value_groups: device.upload(&label("value groups"), &sum::groups(attention, Some(&values), false).0)?,
            chosen_groups: device.upload(&label("chosen value groups"), &sum::groups(attention, Some(&values), true).0)?,
            query_heads: device.upload(&label("query heads"), &merge::heads(attention, &values))?,
            value_up: upload("value up-projection", value_up)?,
            value_means: device.upload(&label("value means"), &means(config, rows, &values))?,
            keys,
            values,
        })
    }
}

/// Whether the kernels take rows like these.
///
/// # Errors
/// [`Error::Argument`] where they are another model's, [`Error::Unsupported`] where keys before and
/// after RoPE are mixed.
pub(super) fn check(specs: &[LatentSpec], checkpoint: &Checkpoint) -> Result<()> {
    let config = checkpoint.config();
    LatentSet::check(specs, &config.geometry()).map_err(|message| Error::Argument { name: "rows".into(), message })?;
    for layer in 0..config.num_hidden_layers {
        let keys = LatentSet::sources(specs, layer, KvSide::Keys, config.head_dim);
        let rotated = keys.iter().filter(|source| specs[source.row].kind == LatentKind::PostRopeKeys).count();
        if rotated > 0 && rotated < keys.len() {
            let message =
                format!("layer {layer} codes some keys before RoPE and others after it, which the GPU kernels do not take. --device cpu runs it");
            return Err(Error::Unsupported { path: checkpoint.path().to_path_buf(), message });
        }
    }
    Ok(())
}
