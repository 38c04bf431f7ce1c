//! How a checkpoint's matrices are brought to the device: in the blocks that they are stored in,
//! row by row, or in another type that is asked for.
//!
//! Rows are whole blocks, so they can be put into another order and beside each other as they are.
//! Columns cannot, and rows that a kernel wants in turns have one type.

use crate::Result;
use crate::checkpoint::{Blocks, Checkpoint, Form, Has, WeightStorage};
use crate::gpu::{GROUP, Packed, Quantised, Rows, WeightType, pad};
use half::f16;

/// Where matrices come from, and what they are to be.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    pub checkpoint: &'a Checkpoint,
    pub storage: WeightStorage,
}

/// Rows of one matrix.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Stored {
    F16(Vec<f16>),
    Blocks(Blocks),
}

impl Source<'_> {
    /// `[rows][cols]`.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Stored> {
        let blocks = if self.storage == WeightStorage::F16 { None } else { self.checkpoint.blocks(name, shape, self.storage)? };
        Ok(match blocks {
            Some(blocks) => Stored::Blocks(blocks),
            None => Stored::F16(self.checkpoint.f16(name, &shape)?),
        })
    }
}

impl Stored {
    /// Every `height` rows with zero rows up to a multiple of four.
    pub fn pad_rows(self, height: usize, cols: usize) -> Stored {
        if height == pad(height) {
            return self;
        }
        match self {
            Stored::F16(numbers) => Stored::F16(padded(&numbers, height, cols)),
            Stored::Blocks(Blocks { form, codes, groups }) => {
                Stored::Blocks(Blocks { form, codes: padded(&codes, height, cols), groups: padded(&groups, height, cols / GROUP) })
            }
        }
    }

    /// As they are uploaded.
    pub fn rows(self, cols: usize) -> Rows {
        match self {
            Stored::F16(numbers) => Rows::F16(numbers),
            Stored::Blocks(Blocks { form, codes, groups }) => Rows::Quantised(Packed::pack(quantised(form), &codes, &groups, cols)),
        }
    }

    /// The type on the device.
    pub fn weight_type(&self) -> WeightType {
        match self {
            Stored::F16(_) => WeightType::F16,
            Stored::Blocks(blocks) => WeightType::Quantised(quantised(blocks.form)),
        }
    }

    /// How many rows there are.
    pub fn count(&self, cols: usize) -> usize {
        match self {
            Stored::F16(numbers) => numbers.len() / cols,
            Stored::Blocks(blocks) => blocks.codes.len() / cols,
        }
    }

    /// More rows behind these; in f16 where the two differ in type.
    pub fn append(&mut self, more: Stored) {
        match (self, more) {
            (Stored::F16(numbers), more) => numbers.extend(more.f16()),
            (Stored::Blocks(blocks), Stored::Blocks(more)) if blocks.form == more.form => {
                blocks.codes.extend(more.codes);
                blocks.groups.extend(more.groups);
            }
            (this, more) => {
                let mut numbers = this.clone().f16();
                numbers.extend(more.f16());
                *this = Stored::F16(numbers);
            }
        }
    }

    /// `count` rows from `first` on.
    pub fn rows_from(&self, first: usize, count: usize, cols: usize) -> Stored {
        match self {
            Stored::F16(numbers) => Stored::F16(numbers[first * cols..][..count * cols].to_vec()),
            Stored::Blocks(Blocks { form, codes, groups }) => Stored::Blocks(Blocks {
                form: *form,
                codes: codes[first * cols..][..count * cols].to_vec(),
                groups: groups[first * cols / GROUP..][..count * cols / GROUP].to_vec(),
            }),
        }
    }

    /// `count` columns from `first` on of `cols`: in f16 where that takes groups apart.
    pub fn columns(&self, first: usize, count: usize, cols: usize) -> Stored {
        fn of<T: Copy>(rows: &[T], [first, count, cols]: [usize; 3]) -> Vec<T> {
            rows.chunks_exact(cols).flat_map(|row| &row[first..first + count]).copied().collect()
        }
        match self {
            Stored::Blocks(Blocks { form, codes, groups }) if first.is_multiple_of(GROUP) && count.is_multiple_of(GROUP) => {
                let groups = of(groups, [first / GROUP, count / GROUP, cols / GROUP]);
                Stored::Blocks(Blocks { form: *form, codes: of(codes, [first, count, cols]), groups })
            }
            all => Stored::F16(of(&all.clone().f16(), [first, count, cols])),
        }
    }

    fn f16(self) -> Vec<f16> {
        match self {
            Stored::F16(numbers) => numbers,
            Stored::Blocks(blocks) => blocks.f16(),
        }
    }
}

/// Bytes of a checkpoint's tensors on a GPU, whose weights are to be as `storage` says; and of the
/// largest of them.
///
/// Reads no numbers; norms and biases are counted as if they were f16, and bases are left out.
pub(super) fn weight_bytes(checkpoint: &Checkpoint, storage: WeightStorage) -> (u64, u64) {
    let heads_are_padded = !checkpoint.config().head_dim.is_multiple_of(4);
    let form = |name: &str| checkpoint.form(name, storage);
    // Gates and ups of all experts are brought there together.
    let stacked = checkpoint.config().design.experts.map_or(1, |experts| 2 * experts.count as u64);
    let bytes = |name: &str| {
        let Some(shape) = checkpoint.shape(name) else { return 0 };
        let partner = if name.contains("gate_proj") { name.replace("gate_proj", "up_proj") } else { name.replace("up_proj", "gate_proj") };
        let widened = checkpoint.has(&partner) && form(name) != form(&partner) || name.contains("o_proj") && heads_are_padded;
        // A router stays in f32.
        if name.contains("mlp.router") || name.contains("shared_expert_gate") {
            return 4 * shape.iter().map(|n| *n as u64).product::<u64>();
        }
        match (shape, form(name)) {
            ([rows, cols], Some(form)) if !widened => (rows * WeightType::Quantised(quantised(form)).row_bytes(*cols)) as u64,
            _ => 2 * shape.iter().map(|n| *n as u64).product::<u64>(),
        }
    };
    checkpoint.tensor_names().filter(|name| !name.starts_with("rows.")).fold((0, 0), |(all, most), name| {
        let one = bytes(name);
        (all + one, most.max(one * if name.contains("mlp.experts.") { stacked } else { 1 }))
    })
}

/// The form on the device.
fn quantised(form: Form) -> Quantised {
    match (form.bits, form.has) {
        (4, Has::Scale) => Quantised::Q4,
        (4, _) => Quantised::Q4Minimum,
        (5, Has::Scale) => Quantised::Q5,
        (5, _) => Quantised::Q5Minimum,
        (6, _) => Quantised::Q6,
        _ => Quantised::Q8,
    }
}

/// Runs of `height` rows of `cols` each, with zeros up to a multiple of four rows.
fn padded<T: Copy + Default>(rows: &[T], height: usize, cols: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(rows.len() / height * pad(height));
    for run in rows.chunks_exact(height * cols) {
        out.extend_from_slice(run);
        out.resize(out.len() + (pad(height) - height) * cols, T::default());
    }
    out
}

/// Rows one behind the other; neighbours of one type are one piece.
pub(super) fn stack(all: [Stored; 3], cols: usize) -> Vec<Rows> {
    let mut pieces: Vec<Stored> = Vec::new();
    for next in all {
        match pieces.last_mut().filter(|last| last.weight_type() == next.weight_type()) {
            Some(last) => last.append(next),
            None => pieces.push(next),
        }
    }
    pieces.into_iter().map(|piece| piece.rows(cols)).collect()
}

/// Rows in turns; in f16 where the two differ in type.
pub(super) fn interleave(even: Stored, odd: Stored, cols: usize) -> Stored {
    match (even, odd) {
        (Stored::Blocks(even), Stored::Blocks(odd)) if even.form == odd.form => Stored::Blocks(Blocks {
            form: even.form,
            codes: in_turns(&even.codes, &odd.codes, cols),
            groups: in_turns(&even.groups, &odd.groups, cols / GROUP),
        }),
        (even, odd) => Stored::F16(in_turns(&even.f16(), &odd.f16(), cols)),
    }
}

fn in_turns<T: Copy>(even: &[T], odd: &[T], cols: usize) -> Vec<T> {
    even.chunks_exact(cols).zip(odd.chunks_exact(cols)).flat_map(|(even, odd)| even.iter().chain(odd).copied()).collect()
}
