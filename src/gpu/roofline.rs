//! The device's ceiling, measured: what `bench` holds every speed against.

use super::{Access, Device, Spec};
use crate::Result;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// What the device reached with plain kernels, in this process.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Roofline {
    /// Bytes read and written by a copy, 10⁹ a second.
    pub copy_gbps: f64,
    /// Multiply-adds in f32, 10⁹ operations a second (two per multiply-add).
    pub f32_gflops: f64,
    /// The same in f16; `None` in the baseline tier.
    pub f16_gflops: Option<f64>,
}

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Step {
    rounds: u32,
    count: u32,
}

const WORKGROUP: u32 = 256;
const LANES: u64 = 1024 * WORKGROUP as u64;

fn spec(flags: &[&'static str]) -> Spec {
    let constants = BTreeMap::from([("WORKGROUP", WORKGROUP)]);
    Spec { shader: "roofline.wgsl", flags: flags.to_vec(), constants, bindings: vec![(0, Access::Read), (1, Access::Write)] }
}

/// Every variant, for the offline translation test.
pub(crate) fn variants() -> Vec<Spec> {
    vec![spec(&["COPY"]), spec(&[]), spec(&["HALVES"])]
}

/// Measures the device: about half a second.
///
/// # Errors
/// [`crate::Error::OutOfMemory`], or the driver's.
pub fn roofline(device: &Device) -> Result<Roofline> {
    let bytes = (64u64 << 20).min(device.max_binding());
    let source = device.buffer("roofline/source", bytes)?;
    let sink = device.buffer("roofline/sink", bytes)?;
    let make = |flags: &[&'static str]| device.kernel(spec(flags), &[&source, &sink]);
    // The best of several: a ceiling is not an average.
    let best = |kernel: &super::Kernel, step: Step, groups: u32| -> Result<f64> {
        let (mut best, started, mut runs) = (f64::INFINITY, Instant::now(), 0);
        while runs < 3 || started.elapsed() < Duration::from_millis(120) {
            let (commands, _) = device.encode("roofline", |pass| kernel.record(pass, &step, [groups, 1, 1]), |_| ());
            let start = Instant::now();
            let index = device.queue.submit([commands]);
            device.wait(Some(index))?;
            best = best.min(start.elapsed().as_secs_f64());
            runs += 1;
        }
        Ok(best)
    };
    let copy = make(&["COPY"])?;
    let seconds = best(&copy, Step { rounds: 0, count: (bytes / 16) as u32 }, 4096)?;
    let copy_gbps = 2.0 * bytes as f64 / seconds / 1e9;
    let arithmetic = |flags: &[&'static str]| -> Result<f64> {
        let kernel = make(flags)?;
        // Grown until one run is long against the cost of a submit.
        let mut rounds = 16;
        loop {
            let seconds = best(&kernel, Step { rounds, count: 0 }, (LANES / WORKGROUP as u64) as u32)?;
            if seconds > 0.01 || rounds >= 1 << 16 {
                return Ok((LANES * rounds as u64 * 8 * 4 * 2) as f64 / seconds / 1e9);
            }
            rounds *= 4;
        }
    };
    let f32_gflops = arithmetic(&[])?;
    let f16_gflops = if device.tier().flags().contains(&"F16") { Some(arithmetic(&["HALVES"])?) } else { None };
    Ok(Roofline { copy_gbps, f32_gflops, f16_gflops })
}
