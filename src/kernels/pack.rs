//! `pack.wgsl`: coordinates into packed rows.

use super::coded::{BOOKS, Codes, bands, books, runs};
use super::spec;
use crate::Result;
use crate::gpu::{Access, Device, ElementType, Kernel, Pass, Spec, Tensor, Tuning, Work};
use crate::kv::{Format, RUN, Scale};

#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
struct Params {
    first: u32,
    at: u32,
    words: u32,
    bands: u32,
    runs: u32,
    header: u32,
    lot: u32,
    clip: u32,
}

/// Runs of a lot, where their codes are searched for: as many as so many lanes of a workgroup look
/// after at a time, and an even number, since neighbours may share a word.
fn searched(lanes: u32) -> usize {
    (lanes as usize / RUN).next_multiple_of(2)
}

/// Packs one row's coordinates.
pub struct Pack {
    kernel: Kernel,
    /// Bytes of a token's coordinates and of its row.
    bytes: u64,
    /// Lots of a token.
    lots: u32,
    params: Params,
}

pub(super) fn variant(format: &Format, tuning: &Tuning) -> Spec {
    let bindings = [(0, Access::Read), (1, Access::Read), (2, Access::Write)];
    let constants = [vec![("WORKGROUP", tuning.pack_lanes), ("BOOKS", BOOKS)], Codes::of(std::iter::once(format)).constants].concat();
    spec("pack.wgsl", &[], &constants, &bindings)
}

/// Where a row's words stand in a store of latents.
#[derive(Clone, Copy)]
pub(crate) struct PackedRow<'a> {
    /// `[capacity][words]` u32.
    pub store: &'a Tensor,
    /// Words into a token's at which the row's begin.
    pub at: usize,
}

impl PackedRow<'_> {
    /// Holds it against what `kernel` writes: a row in this format.
    pub(super) fn check(&self, kernel: &str, format: &Format) {
        self.store.expect(kernel, ElementType::U32, self.store.shape.cols);
        let end = self.at + format.words();
        assert!(end <= self.store.shape.cols, "{kernel}: a row that ends with word {end} of {}", self.store);
    }
}

impl Pack {
    /// The table of a format.
    pub(crate) fn table(format: &Format) -> Vec<[u32; 4]> {
        [books(), bands(format), runs(format)].concat()
    }

    /// `coordinates`: `[n][rank]` f32; `table`: `[n][4]` u32, [`table`](Self::table)'s.
    ///
    /// # Errors
    /// As [`Device::kernel`].
    pub(crate) fn plan(device: &Device, format: &Format, coordinates: &Tensor, table: &Tensor, to: PackedRow) -> Result<Pack> {
        coordinates.expect("pack", ElementType::F32, format.rank());
        table.expect("pack", ElementType::U32, 4);
        to.check("pack", format);
        let tuning = device.tuning();
        let clip = if let Scale::Groups { clip, .. } = format.scale { u32::from(clip) } else { 100 };
        let (bands, runs) = (bands(format), format.runs().len());
        // Where nothing is searched for a band, or a group, is quickly done.
        let lot = if matches!(format.scale, Scale::Fixed | Scale::Band) { searched(tuning.pack_lanes) } else { runs };
        let lots = bands.iter().map(|band| band[1].div_ceil(lot as u32)).sum();
        let [at, words, bands, runs, header, lot] = [to.at, to.store.shape.cols, bands.len(), runs, format.header(), lot].map(|n| n as u32);
        let bytes = 4 * (format.rank() + format.words()) as u64;
        Ok(Pack {
            kernel: device.kernel(variant(format, &tuning), &[coordinates, table, to.store])?,
            bytes,
            lots,
            params: Params { first: 0, at, words, bands, runs, header, lot, clip },
        })
    }

    /// Tokens at positions `first`, `first + 1`, ….
    pub fn record(&self, pass: &mut Pass, first: u32, tokens: u32) {
        let work = Work { bytes: u64::from(tokens) * self.bytes, flops: 0 };
        self.kernel.record(pass, &Params { first, ..self.params }, [tokens, self.lots, 1], work);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kernels::oracle::{numbers, run, tuned_devices, upload};
    use crate::kv::Band;
    use half::f16;

    /// Every width, alone and together, with every kind of scale.
    pub fn formats() -> Vec<Format> {
        let band = |bits, runs| Band { bits, runs };
        let all = vec![band(16, 1), band(8, 2), band(4, 3), band(3, 3), band(2, 2)];
        let one = |bits, runs, scale| Format { bands: vec![band(bits, runs)], scale };
        vec![
            Format { bands: all.clone(), scale: Scale::Fixed },
            Format { bands: all, scale: Scale::Band },
            one(3, 2, Scale::Band),
            one(2, 70, Scale::Band),
            one(16, 2, Scale::Band),
            one(4, 3, Scale::Affine),
            one(8, 2, Scale::Affine),
            one(2, 12, Scale::Groups { runs: 8, clip: 92 }),
            one(4, 5, Scale::Groups { runs: 2, clip: 100 }),
        ]
    }

    /// The words that [`Format::encode`] makes, but for a coordinate in a thousand that rounding
    /// leaves between two codes.
    #[test]
    fn rows_are_packed_as_their_format_says() {
        let (first, tokens, capacity) = (3, 4, 9);
        for format in formats() {
            let (at, rank, own) = (2, format.rank(), format.words());
            let words = at + own + 1;
            // Tokens of different sizes, the bands of each too.
            let z: Vec<f32> = numbers(1, tokens * rank).iter().enumerate().map(|(i, z)| z * (1.0 + (i / 48) as f32)).collect();
            let mut expected = vec![7u32; capacity * words];
            for (t, z) in z.chunks_exact(rank).enumerate() {
                format.encode(z, &mut expected[(first + t) * words + at..][..own]);
            }
            for (device, _) in tuned_devices(None) {
                let (z, table) = (upload(&device, &z, rank), upload(&device, Pack::table(&format).as_flattened(), 4));
                let rows = upload(&device, &vec![7u32; capacity * words], words);
                let pack = Pack::plan(&device, &format, &z, &table, PackedRow { store: &rows, at }).unwrap();
                let got = run::<u32>(&device, &rows, capacity * words, |pass| pack.record(pass, first as u32, tokens as u32));
                let (mut differ, mut decoded, mut meant) = (0, vec![0.0; rank], vec![0.0; rank]);
                for (token, (got, expected)) in got.chunks_exact(words).zip(expected.chunks_exact(words)).enumerate() {
                    assert!(got[..at] == expected[..at] && got[at + own..] == expected[at + own..], "beside the row");
                    if !(first..first + tokens).contains(&token) {
                        assert_eq!(got, expected, "other tokens");
                        continue;
                    }
                    let header = |words: &[u32]| words[at..][..format.header()].iter().flat_map(|w| [w & 0xffff, w >> 16]).collect::<Vec<_>>();
                    // A device may round a number to either of the f16 beside it.
                    let affine = matches!(format.scale, Scale::Affine | Scale::Groups { .. });
                    let most = if affine { 1 } else { 0 };
                    let same = header(got).iter().zip(header(expected)).all(|(a, b)| a.abs_diff(b) <= most);
                    assert!(same, "{format:?}, {:?}: scales {:x?}, not {:x?}", device.tier(), header(got), header(expected));
                    format.decode(&got[at..][..own], &mut decoded);
                    format.decode(&expected[at..][..own], &mut meant);
                    // Steps that are not quite equal make one code of the next.
                    let step = expected[at..][..format.header()].iter().map(|word| f16::from_bits(*word as u16).to_f32()).fold(0.0, f32::max);
                    let most = if affine { 1.1 * step } else { 0.0 };
                    differ += decoded.iter().zip(&meant).filter(|(a, b)| (*a - *b).abs() > most).count();
                }
                assert!(differ * 1000 <= tokens * rank, "{format:?}, {:?}: {differ} of {}", device.tier(), tokens * rank);
            }
        }
    }
}
