//! The device's ceiling, measured: what `bench` holds every speed against.

use super::{Access, Device, Spec, Work};
use crate::{Error, Result};
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
struct Params {
    rounds: u32,
    count: u32,
}

const WORKGROUP: u32 = 256;
const LANES: u64 = 1024 * WORKGROUP as u64;

pub(super) fn spec(flags: &[&'static str]) -> Spec {
    let constants = BTreeMap::from([("WORKGROUP", WORKGROUP)]);
    Spec { shader: "roofline.wgsl", flags: flags.to_vec(), constants, bindings: vec![(0, Access::Read), (1, Access::Write)] }
}

/// So many dispatches that do nothing, one after another.
///
/// # Errors
/// The driver's.
pub(crate) fn empty_dispatches(device: &Device, count: usize) -> Result<()> {
    let [source, sink] = [device.buffer("empty/source", 16)?, device.buffer("empty/sink", 16)?];
    let kernel = device.kernel(spec(&["COPY"]), &[&source, &sink])?;
    let record = |pass: &mut super::Pass| (0..count).for_each(|_| kernel.record(pass, &Params { rounds: 0, count: 0 }, [1, 1, 1], Work::default()));
    device.submit(device.encode("empty", record, |_| ())?.0)?;
    device.wait()
}

/// Bytes of either buffer of the copy: more than any cache holds.
const COPIED: u64 = 512 << 20;
/// Seconds that a run takes at the least.
const LONG: f64 = 0.02;

/// The copy's two buffers: [`COPIED`] bytes, or as many as there is room for.
fn buffers(device: &Device) -> Result<[wgpu::Buffer; 2]> {
    let mut bytes = COPIED.min(device.max_binding());
    loop {
        let both = device.buffer("roofline/source", bytes).and_then(|source| Ok([source, device.buffer("roofline/sink", bytes)?]));
        match both {
            Err(Error::OutOfMemory { .. }) if bytes > 16 << 20 => bytes /= 2,
            both => return both,
        }
    }
}

/// Measures the device: about half a second.
///
/// # Errors
/// [`Error::OutOfMemory`], or the driver's.
pub fn roofline(device: &Device) -> Result<Roofline> {
    let [source, sink] = buffers(device)?;
    let make = |flags: &[&'static str]| device.kernel(spec(flags), &[&source, &sink]);
    // The best of several runs: a ceiling is not an average.
    let best = |kernel: &super::Kernel, params: Params, groups: u32, times: u32| -> Result<f64> {
        let (mut best, started, mut runs) = (f64::INFINITY, Instant::now(), 0);
        while runs < 3 || started.elapsed() < Duration::from_millis(60) {
            let record = |pass: &mut super::Pass| (0..times).for_each(|_| kernel.record(pass, &params, [groups, 1, 1], Work::default()));
            let (commands, _) = device.encode("roofline", record, |_| ())?;
            let start = Instant::now();
            device.submit(commands)?;
            device.wait()?;
            best = best.min(start.elapsed().as_secs_f64());
            runs += 1;
        }
        Ok(best)
    };
    // How much work `run` does a second, where it is long enough that submitting it does not count:
    // it is given 1, 4, 16, … and returns seconds.
    let rate = |run: &dyn Fn(u32) -> Result<f64>| -> Result<f64> {
        let mut amount = 1;
        loop {
            let seconds = run(amount)?;
            if seconds > LONG || amount >= 1 << 14 {
                return Ok(f64::from(amount) / seconds);
            }
            amount *= 4;
        }
    };
    let (copy, vectors) = (make(&["COPY"])?, source.size() / 16);
    let copy_gbps = 32e-9 * vectors as f64 * rate(&|times| best(&copy, Params { rounds: 0, count: vectors as u32 }, 4096, times))?;
    let arithmetic = |flags: &[&'static str]| -> Result<f64> {
        let kernel = make(flags)?;
        let rounds = rate(&|rounds| best(&kernel, Params { rounds, count: 0 }, (LANES / WORKGROUP as u64) as u32, 1))?;
        Ok((LANES * 8 * 4 * 2) as f64 * rounds * 1e-9)
    };
    let f32_gflops = arithmetic(&[])?;
    let f16_gflops = if device.tier().flags().contains(&"F16") { Some(arithmetic(&["HALVES"])?) } else { None };
    Ok(Roofline { copy_gbps, f32_gflops, f16_gflops })
}
