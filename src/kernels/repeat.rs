//! `repeat.wgsl`: fills buffers with a pattern, so that models and caches of any size can be made
//! up on the device.

use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, Kernel, Pass, Spec, Work};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    count: u32,
    period: u32,
}

const WORKGROUP: u32 = 256;

/// Fills one buffer.
pub struct Repeat {
    kernel: Kernel,
    params: Params,
}

fn variant() -> Spec {
    spec("repeat.wgsl", &[], &[("WORKGROUP", WORKGROUP)], &[(0, Access::Read), (1, Access::Write)])
}

impl Repeat {
    /// Fills all of `to` from all of `pattern`, whatever they hold.
    ///
    /// Both are whole vectors of 16 bytes, as every buffer is.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, pattern: &wgpu::Buffer, to: &wgpu::Buffer) -> Result<Repeat> {
        let [period, count] = [pattern, to].map(|buffer| (device.bytes_of(buffer) / 16) as u32);
        Ok(Repeat { kernel: device.kernel(variant(), &[pattern, to])?, params: Params { count, period } })
    }

    /// Some hundred thousand lanes at the most.
    pub fn record(&self, pass: &mut Pass) {
        let work = Work { bytes: 16 * u64::from(self.params.count), flops: 0 };
        self.kernel.record(pass, &self.params, [self.params.count.div_ceil(WORKGROUP).min(4096), 1, 1], work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::oracle::{devices, run};

    #[test]
    fn a_pattern_is_repeated_to_the_last_vector() {
        // More vectors than lanes, and a last repetition that is cut off.
        let (pattern, count) = ((0..4 * 1021).collect::<Vec<u32>>(), 4 * (4096 * 256 + 77));
        let expected: Vec<u32> = pattern.iter().copied().cycle().take(count).collect();
        for device in devices(None) {
            let (from, to) = (device.upload("pattern", &pattern).unwrap(), device.buffer("to", 4 * count as u64).unwrap());
            let repeat = Repeat::plan(&device, &from, &to).unwrap();
            assert!(run::<u32>(&device, &to, count, |pass| repeat.record(pass)) == expected, "{:?}", device.tier());
        }
    }
}
