//! `sketch.wgsl`: what is left of evicted tokens in a sketch, as rows that attention reads.

use super::attention::AttentionBuffers;
use super::exact::ExactRows;
use super::{AttentionShape, WORKGROUP, spec};
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};
use crate::kv::Evicted;

/// Makes rows of one layer's sketch.
pub struct Sketch {
    kernel: Kernel,
    vectors: u32,
    columns: u32,
}

fn variant(attention: &AttentionShape, evicted_as: Evicted) -> Spec {
    let parts = [("SKETCH", evicted_as.is_sketched(), 4), ("MEAN", evicted_as.has_mean(), 5)].into_iter().filter(|(_, is, _)| *is);
    let (flags, mut bindings) =
        (Vec::from_iter(parts.clone().map(|(flag, ..)| flag)), vec![(0, Access::Write), (1, Access::Write), (2, Access::Write)]);
    bindings.push((3, Access::Read));
    bindings.extend(parts.map(|(.., binding)| (binding, Access::Read)));
    spec("sketch.wgsl", &flags, &[("WORKGROUP", WORKGROUP), ("EXACT_ROW", attention.kv_row() as u32)], &bindings)
}

impl Sketch {
    /// Writes `counted` and `counts` of `b`; of a layer that has a sketch or a mean, `None` for
    /// others.
    pub(crate) fn plan(device: &Device, attention: &AttentionShape, b: &AttentionBuffers, cache: &ExactRows) -> Result<Option<Sketch>> {
        let Some(eviction) = cache.eviction.as_ref().filter(|eviction| eviction.stores.evicted_columns() > 0) else { return Ok(None) };
        let mut buffers = vec![&b.counted[0], &b.counted[1], &b.counts, &eviction.marks];
        buffers.extend(eviction.sums.iter().chain(&eviction.totals));
        Ok(Some(Sketch {
            kernel: device.kernel(variant(attention, eviction.stores.evicted_as), &buffers)?,
            vectors: attention.kv_row() as u32 / 2,
            columns: eviction.stores.evicted_columns() as u32,
        }))
    }

    /// All columns.
    pub fn record(&self, pass: &mut Pass) {
        // A sum of 32 bits to 16, for each number of a key and a value.
        let numbers = 4 * u64::from(self.vectors) * u64::from(self.columns);
        self.kernel.record(pass, &(), [self.vectors.div_ceil(WORKGROUP), self.columns, 1], Work { bytes: 6 * numbers, flops: 0 });
    }
}
