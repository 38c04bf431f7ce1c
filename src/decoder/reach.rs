//! Keys and values that 16 bits do not hold: every call asks whether it met any, and says whose
//! they were.

use super::Model;
use super::scratch::Buffers;
use crate::gpu::Device;
use crate::kernels::prepare::record_len;
use crate::{Error, Result};

impl Buffers {
    /// Where in `queries` the record of what was too large begins, in bytes.
    fn record(&self) -> u64 {
        4 * u64::from(self.attention.record)
    }

    /// Has four bytes that are zero where everything fitted copied to `to`, `at` bytes into it.
    pub fn copy_reach(&self, encoder: &mut wgpu::CommandEncoder, to: &wgpu::Buffer, at: u64) {
        encoder.copy_buffer_to_buffer(&self.attention.queries, self.record(), to, at, 4);
    }

    /// The error of a call that met a number beyond 16 bits ([`copy_reach`](Self::copy_reach)).
    ///
    /// What the next call meets is its own again.
    ///
    /// # Errors
    /// The device's, where it cannot say which layer it was.
    pub fn too_large(&self, model: &Model) -> Result<Error> {
        let (device, len) = (&*model.device, record_len(model.config.num_hidden_layers));
        let record = self.read_record(device, len)?;
        self.clear_record(model)?;
        // Layers behind it may have got what is no number from it.
        let found = record[1..].iter().enumerate().find(|(_, reach)| **reach > 0.0);
        let (index, reach) = found.map_or((0, record[0]), |(index, reach)| (index, *reach));
        let side = ["keys", "values"][index % 2];
        Ok(Error::Numeric {
            what: format!("layer {}'s {side}", index / 2),
            message: format!(
                "they reach {reach}, beyond the 65504 that 16 bits hold; a cache in 16 bits cannot keep what this model makes of this text"
            ),
        })
    }

    /// Forgets what was too large.
    ///
    /// # Errors
    /// The device's.
    pub fn clear_record(&self, model: &Model) -> Result<()> {
        model.device.write(&self.attention.queries, self.record(), &vec![0f32; record_len(model.config.num_hidden_layers)])
    }

    /// That error, where something has not fitted since it was last asked.
    ///
    /// # Errors
    /// That one, and the device's.
    pub fn check_reach(&self, model: &Model) -> Result<()> {
        if self.read_record(&model.device, 1)?[0] > 0.0 { Err(self.too_large(model)?) } else { Ok(()) }
    }

    fn read_record(&self, device: &Device, len: usize) -> Result<Vec<f32>> {
        let (mut record, bytes) = (vec![0f32; len], 4 * len as u64);
        let back = device.readback("record of what is too large", bytes)?;
        let copy = |encoder: &mut wgpu::CommandEncoder| encoder.copy_buffer_to_buffer(&self.attention.queries, self.record(), &back, 0, bytes);
        device.submit_and_read(device.encode("record", |_| (), copy)?.0, &back, &mut record)?;
        Ok(record)
    }
}
