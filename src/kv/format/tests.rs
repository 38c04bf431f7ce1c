//! Packing and unpacking of every kind of format.

use super::*;

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + 13) as f32 * 0.37).sin() * 2.0).collect()
}

fn formats() -> Vec<Format> {
    let band = |bits, runs| Band { bits, runs };
    let all = [band(16, 1), band(8, 2), band(4, 3), band(3, 3), band(2, 5)];
    let mut formats = vec![Format { bands: all.to_vec(), scale: Scale::Fixed }, Format { bands: all.to_vec(), scale: Scale::Band }];
    formats.extend(all.map(|band| Format { bands: vec![band], scale: Scale::Band }));
    formats.extend([band(4, 4), band(8, 1)].map(|band| Format { bands: vec![band], scale: Scale::Affine }));
    formats.extend(
        [(2, 8, 3), (4, 2, 1), (8, 5, 5)]
            .map(|(bits, runs, group)| Format { bands: vec![band(bits, runs)], scale: Scale::Groups { runs: group, clip: 100 } }),
    );
    formats
}

/// Every run is where `runs` says, none overlap, and together with the header they fill the row.
#[test]
fn runs_tile_the_row() {
    for format in formats() {
        format.check().unwrap();
        let mut used = vec![0u32; format.words()];
        for run in format.runs() {
            for i in 0..RUN {
                let mut alone = vec![0u32; format.words()];
                run.put(&mut alone, i, if run.bits == 16 { 0xffff } else { (1 << run.bits) - 1 });
                used.iter_mut().zip(&alone).for_each(|(used, alone)| {
                    assert_eq!(*used & alone, 0, "{format:?}");
                    *used |= alone;
                });
            }
        }
        let whole = used.iter().skip(format.header()).filter(|&&word| word == u32::MAX).count();
        // A band of three bits with an odd number of runs leaves half a word.
        assert!(whole + 1 >= format.words() - format.header(), "{format:?}: {used:x?}");
        assert!(used.iter().take(format.header()).all(|word| *word == 0));
    }
}

/// What comes out is the nearest level of what went in, times the scale: within half the widest
/// step.
#[test]
fn codes_come_back_as_their_nearest_level() {
    for format in formats() {
        let z = numbers(format.rank());
        let (mut words, mut back) = (vec![0; format.words()], vec![0.0; format.rank()]);
        format.encode(&z, &mut words);
        format.decode(&words, &mut back);
        for (run, (z, back)) in format.runs().iter().zip(z.chunks(RUN).zip(back.chunks(RUN))) {
            let most = match (run.bits, format.scale) {
                (16, _) => 2e-3,
                (bits, Scale::Affine | Scale::Groups { .. }) => 2.1 / ((1 << bits) - 1) as f32,
                (8, _) => 0.05,
                // Chosen together, not each the nearest.
                (4, _) => 0.6,
                (3, _) => 1.0,
                _ => 1.4,
            };
            for (z, back) in z.iter().zip(back) {
                assert!((z - back).abs() < most, "{format:?}: {z} came back as {back}");
            }
        }
        // To code what came back changes nothing but, at times, the scale.
        if format.scale == Scale::Fixed {
            let (mut again, first) = (vec![0; format.words()], words.clone());
            format.encode(&back, &mut again);
            assert_eq!(again, first, "{format:?}");
        }
    }
}

#[test]
fn the_size_of_a_row_is_the_sum_of_its_bits() {
    let format = Format { bands: vec![Band { bits: 8, runs: 2 }, Band { bits: 4, runs: 3 }, Band { bits: 3, runs: 2 }], scale: Scale::Band };
    assert_eq!((format.rank(), format.words()), (112, 1 + (2 * 16 * 8 + 3 * 16 * 4 + 2 * 16 * 3) / 32));
    assert_eq!(Format::half(6).words(), 48);
}

#[test]
fn what_cannot_be_packed_is_said() {
    let band = |bits, runs| Band { bits, runs };
    let blocks = |tokens, heads| Scale::Blocks(Blocks { tokens, heads, steps: crate::kv::Steps::Channels });
    for (bands, scale, word) in [
        (vec![], Scale::Fixed, "no bands"),
        (vec![band(5, 1)], Scale::Fixed, "5 bits"),
        (vec![band(2, 1), band(4, 1)], Scale::Band, "sorted"),
        (vec![band(4, 1), band(4, 1)], Scale::Band, "sorted"),
        (vec![band(3, 1)], Scale::Affine, "affine"),
        (vec![band(3, 1)], Scale::Groups { runs: 1, clip: 100 }, "by group"),
        (vec![band(2, 17)], Scale::Groups { runs: 1, clip: 100 }, "at most 16"),
        (vec![band(2, 17)], Scale::Groups { runs: 0, clip: 100 }, "0 runs"),
        (vec![band(2, 17)], Scale::Groups { runs: 8, clip: 101 }, "101 percent"),
        (vec![band(16, 2)], blocks(32, 1), "by block"),
        (vec![band(2, 2)], blocks(48, 1), "blocks of 48"),
        (vec![band(2, 2)], blocks(256, 1), "blocks of 256"),
        (vec![band(2, 2)], blocks(32, 0), "0 heads"),
        (vec![band(2, 3)], blocks(32, 2), "3 runs for 2"),
        (vec![band(4, 0)], Scale::Fixed, "empty"),
    ] {
        assert!(Format { bands, scale }.check().unwrap_err().contains(word));
    }
}

#[test]
fn extreme_rows_stay_finite() {
    for format in formats() {
        for z in [0.0, 1e-30, 1e30, -6e4] {
            let (mut words, mut back) = (vec![0; format.words()], vec![0.0; format.rank()]);
            format.encode(
                &vec![
                    if format.bands[0].bits == 16 || format.runs()[0].scale == ScaleSource::Affine(0) { f32::clamp(z, -6e4, 6e4) } else { z };
                    format.rank()
                ],
                &mut words,
            );
            format.decode(&words, &mut back);
            assert!(back.iter().all(|x| x.is_finite()), "{format:?} {z}");
        }
    }
}

/// A group that is cut is coded as if its largest magnitudes were those of the coordinate that 90
/// percent are below; what is beyond comes back as the ends.
#[test]
fn groups_are_cut_at_a_share_of_their_magnitudes() {
    let mut z: Vec<f32> = (0..32).map(|i| if i % 2 == 0 { i as f32 } else { -(i as f32) }).collect();
    z.rotate_left(5);
    let format = Format { bands: vec![Band { bits: 4, runs: 2 }], scale: Scale::Groups { runs: 2, clip: 90 } };
    let (mut words, mut back) = (vec![0; format.words()], vec![0.0; 32]);
    format.encode(&z, &mut words);
    format.decode(&words, &mut back);
    // Of 32 magnitudes from 0 to 31, number 28 is 28, whose sign is plus: from −28, as the cut has
    // it, to 28.
    let (least, step) = (-28.0, f16::from_f32(56.0 / 15.0).to_f32());
    for (z, back) in z.iter().zip(back) {
        let expected = least + step * ((z - least) / step).round().clamp(0.0, 15.0);
        assert_eq!(back, expected, "{z}");
    }
}
