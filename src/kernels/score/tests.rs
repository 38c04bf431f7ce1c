//! `score.wgsl` against its definition in f64, in every tier.

use super::*;
use crate::kernels::coded::{by_coordinates, by_dimensions};
use crate::kernels::oracle::{
    assert_close, beside, buffers, devices, exact, frequencies, halves, latent_side, numbers, rotated, run, tuned_devices, upload,
};
use crate::kernels::rebuild::Rebuild;
use crate::kernels::rope_table;
use crate::kernels::sketch::Sketch;
use crate::kv::{Evicted, Exact, Format, Slots};

/// Blocks of one token and of several, from the beginning and from within, of keys that are all
/// exact.
#[test]
fn every_key_answers_every_query() {
    let c = AttentionShape::of(false, Some(40), 10, 5, 14);
    let (head, query, heads, capacity) = (c.head_dim, pad(c.head_dim), c.heads, 110);
    let queries: Vec<f32> = numbers(1, 40 * heads * query).into_iter().enumerate().map(|(i, x)| if i % query < head { x } else { 0.0 }).collect();
    let rows = halves(2, capacity * 5 * query);
    for device in devices(None) {
        let cache = exact(&device, Slots::ALL, [&rows, &[]]);
        let from = device.upload("queries", &queries).unwrap();
        for b in [Block::new(101, 1, 0, Some(40), None), Block::new(90, 5, 2, Some(40), None), Block::new(0, 37, 0, Some(40), None)] {
            let (tokens, count) = (b.tokens as usize, b.exact() as usize);
            let out = device.buffer("scores", (tokens * heads * capacity * 4) as u64).unwrap();
            let through = AttentionBuffers { queries: from.clone(), scores: out.clone(), ..buffers(&device, capacity) };
            let score = Score::plan(&device, &c, &through, &cache, None, tokens > 1).unwrap();
            let got = run::<f32>(&device, &out, tokens * heads * capacity, |pass| score.record(pass, &b, 0));
            let (mut seen, mut expected) = (Vec::new(), Vec::new());
            for (line, got) in got.chunks_exact(capacity).enumerate() {
                let (t, h) = (line / heads, line % heads);
                let position = b.first as usize + t;
                let q = &queries[((b.at as usize + t) * heads + h) * query..][..head];
                for (column, got) in got.iter().enumerate() {
                    let key = b.exact_key(column as u32) as usize;
                    if column >= count {
                        assert_eq!(*got, 0.0, "{b:?}: nothing is written past the keys");
                    } else if key > position || key + 40 <= position {
                        assert!(*got < -3e38, "{b:?}: token {t} may not see key {key}: {got}");
                    } else {
                        seen.push(*got as f64);
                        let k = &rows[(key * 5 + h / c.group_size()) * query..];
                        expected.push(q.iter().zip(k).map(|(q, k)| *q as f64 * k.to_f64()).sum::<f64>() / (head as f64).sqrt());
                    }
                }
            }
            assert_close(seen, &expected, 1e-10, &format!("{b:?}, {:?}", device.tier()));
        }
    }
}

/// After exact keys come candidates and what is left of evicted tokens, as many times as they are
/// tokens; no query looks past a token's window for its exact key.
#[test]
fn what_stands_beside_answers_as_often_as_it_is_tokens() {
    let c = AttentionShape::of(false, None, 6, 2, 14);
    let (heads, padded, columns) = (6, pad(14), 150);
    let (exact, slots) = (Exact { sinks: 3, recent: 5 }, Slots { sinks: 3, ring: 90 });
    let queries: Vec<f32> = numbers(1, 40 * heads * padded).into_iter().enumerate().map(|(i, x)| if i % padded < 14 { x } else { 0.0 }).collect();
    for (evicted_as, device) in
        [Evicted::None, Evicted::Mean, Evicted::Sketch, Evicted::Shrunk].into_iter().flat_map(|evicted_as| devices(None).map(|d| (evicted_as, d)))
    {
        let beside = beside(&device, &c, slots, evicted_as);
        let from = device.upload("queries", &queries).unwrap();
        for (first, tokens) in [(101, 1), (70, 37)] {
            let reach = exact.reach(first, tokens, false, 0);
            let b = Block::new(first as u32, tokens as u32, 0, None, Some(reach)).beside(beside.columns.len() as u32).listed(0);
            let out = device.buffer("scores", (tokens * heads * columns * 4) as u64).unwrap();
            let through = AttentionBuffers { queries: from.clone(), scores: out.clone(), ..beside.buffers(&device, &c, columns) };
            let score = Score::plan(&device, &c, &through, &beside.cache, None, tokens > 1).unwrap();
            let sketch = Sketch::plan(&device, &c, &through, &beside.cache).unwrap();
            let got = run::<f32>(&device, &out, tokens * heads * columns, |pass| {
                sketch.iter().for_each(|sketch| sketch.record(pass));
                score.record(pass, &b, 0);
            });
            let (mut seen, mut expected) = (Vec::new(), Vec::new());
            for (line, got) in got.chunks_exact(columns).enumerate() {
                let (t, h) = (line / heads, line % heads);
                let dot =
                    |key: &[f64]| queries[line * padded..][..padded].iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum::<f64>() / 14f64.sqrt();
                for (column, got) in got.iter().enumerate() {
                    let (count, key) = if column < b.exact() as usize {
                        let key = b.exact_key(column as u32) as usize;
                        let there = key <= first + t && !reach.coded(first + t, key);
                        let row = &beside.rows[0][slots.of(key) * 2 * padded..][..2 * padded];
                        (u32::from(there), row.iter().map(|x| x.to_f64()).collect())
                    } else if let Some((count, [key, _])) = beside.columns.get(column - b.exact() as usize) {
                        (*count, key.clone())
                    } else {
                        assert_eq!(*got, 0.0, "nothing is written past them");
                        continue;
                    };
                    if count == 0 {
                        assert!(*got < -3e38, "{evicted_as:?}, {first}, {column}: {got}");
                    } else {
                        seen.push(f64::from(*got));
                        expected.push(dot(&key[h / 3 * padded..][..padded]) + f64::from(count).ln());
                    }
                }
            }
            // What is made of a sketch is rounded to 16 bits.
            let most = if evicted_as == Evicted::None { 1e-10 } else { 1e-6 };
            assert_close(seen, &expected, most, &format!("{evicted_as:?}, {first}, {:?}", device.tier()));
        }
    }
}

/// Sinks, a ring and latents of uneven slices: rebuilt and rotated, or with the query absorbed to
/// them; every query reads every key once, exactly or by its code.
#[test]
fn coded_keys_are_scored_as_what_they_decode_to() {
    let exact = Exact { sinks: 3, recent: 5 };
    let capacity = 110;
    let formats = crate::kernels::pack::tests::formats();
    let cases: Vec<(AttentionShape, Vec<(usize, &Format)>)> = vec![
        (
            AttentionShape { cap: Some(2.55), ..AttentionShape::of(true, Some(60), 10, 5, 14) },
            vec![(2, &formats[1]), (1, &formats[0]), (1, &formats[5]), (1, &formats[6])],
        ),
        (AttentionShape::of(false, None, 3, 1, 512), vec![(1, &formats[2])]),
    ];
    for (c, slices) in &cases {
        let (head, query, heads, kv_heads, group) = (c.head_dim, pad(c.head_dim), c.heads, c.kv_heads, c.group_size());
        let slots = Slots::new(&exact.blocks(1), 40, capacity);
        let ring = halves(2, slots.count() * kv_heads * query);
        for absorbed in [false, true] {
            let mut means = numbers(4, kv_heads * head);
            // The first head has a mean in every other pair of RoPE.
            means[..head].iter_mut().enumerate().filter(|(i, _)| i % (head / 2) % 2 == 1).for_each(|(_, mean)| *mean = 0.0);
            let side = latent_side(c, slices, capacity);
            let side = if absorbed { side.about(c, &means) } else { side };
            let stride = side.coded.query_stride(c, absorbed);
            // Queries as `prepare` leaves them.
            let table = side.coded.key_table(c, absorbed, &means);
            let mut queries = numbers(1, 40 * stride);
            let plain = |t: usize, h: usize, i: usize| t * stride + h * query + i;
            for (t, h) in (0..40).flat_map(|t| (0..heads).map(move |h| (t, h))) {
                (head..query).for_each(|i| queries[plain(t, h, i)] = 0.0);
                if absorbed {
                    let (kv, rank) = (h / group, side.coded.rank(h / group));
                    let mean_pairs = &side.coded.mean_pairs[kv];
                    let vectors = rank / 4 + mean_pairs.len().div_ceil(2);
                    let at = t * stride + 4 * (table[(BOOKS as usize) + 2 * kv][3] as usize + h % group * vectors);
                    for i in 0..rank {
                        queries[at + i] = (0..head).map(|d| queries[plain(t, h, d)] * side.up(kv, i, d)).sum();
                    }
                    queries[at + rank..at + 4 * vectors].fill(0.0);
                    for (i, &pair) in mean_pairs.iter().enumerate() {
                        let (a, b) = (pair as usize, pair as usize + head / 2);
                        let ([q, p], [m, n]) = ([a, b].map(|d| queries[plain(t, h, d)]), [a, b].map(|d| means[kv * head + d]));
                        (queries[at + rank + 2 * i], queries[at + rank + 2 * i + 1]) = (q * m + p * n, p * m - q * n);
                    }
                }
            }
            let up: Vec<_> = (0..kv_heads)
                .flat_map(|kv| {
                    let (up, rank) = (|i, d| side.up(kv, i, d), side.coded.rank(kv));
                    if absorbed { by_dimensions(up, rank, head) } else { by_coordinates(up, rank, head) }
                })
                .collect();
            let decoded: Vec<Vec<f64>> = (0..kv_heads * capacity)
                .map(|i| {
                    let (kv, position) = (i / capacity, i % capacity);
                    let z = &side.coordinates[side.coded.of_head(kv).0][position];
                    let mean: Vec<f64> = means[kv * head..][..head].iter().map(|x| f64::from(*x)).collect();
                    let from = |about: &[f64]| {
                        let at = |d: usize| about[d] + z.iter().enumerate().map(|(i, z)| z * f64::from(side.up(kv, i, d))).sum::<f64>();
                        (0..head).map(at).collect::<Vec<f64>>()
                    };
                    if absorbed { from(&rotated(c, &mean, None, position)) } else { rotated(c, &from(&mean), None, position) }
                })
                .collect();
            let blocks =
                [(0, 2, 0, true, 0), (101, 1, 0, false, 0), (101, 1, 0, true, 0), (70, 40, 0, true, 0), (60, 5, 2, false, 0), (99, 3, 1, false, 97)];
            for (device, tuning) in tuned_devices(None) {
                let cache = crate::kernels::oracle::exact(&device, slots, [&ring, &[]]);
                let [from, rope_table] =
                    [&queries, rope_table(&frequencies(c.head_dim), capacity).as_flattened()].map(|v| upload(&device, v, v.len()));
                let (rows, table, up) =
                    (device.upload("rows", &side.rows).unwrap(), device.upload("table", &table).unwrap(), device.upload("up", &up).unwrap());
                let keys = CodedKeys { coded: &side.coded, rows: &rows, table: &table, up: &up, absorbed, list: None };
                let rebuilt = device.buffer("rebuilt", (2 * capacity * c.kv_row()) as u64).unwrap();
                for (first, tokens, at, strict, exact_from) in blocks {
                    let reach = exact.reach(first, tokens, strict, exact_from);
                    let b = Block::new(first as u32, tokens as u32, at, c.window, Some(reach));
                    let (many, columns) = (tokens > 1, 200);
                    let out = device.buffer("scores", (tokens * heads * columns * 4) as u64).unwrap();
                    let through = AttentionBuffers {
                        queries: wgpu::Buffer::clone(&from),
                        rope: rope_table.clone(),
                        scores: out.clone(),
                        rebuilt: rebuilt.clone(),
                        ..buffers(&device, columns)
                    };
                    let score = Score::plan(&device, c, &through, &cache, Some(keys), many).unwrap();
                    let rebuild = (!absorbed).then(|| Rebuild::plan(&device, c, &through, keys, slots).unwrap());
                    // Some more before the block's own, as where another block of the call reaches
                    // further back.
                    let before = if absorbed { 0 } else { b.start.min(3) };
                    let got = run::<f32>(&device, &out, tokens * heads * columns, |pass| {
                        rebuild.iter().for_each(|rebuild| rebuild.record(pass, b.start - before, b.coded + before));
                        score.record(pass, &b, before);
                    });
                    let what = format!("{first} + {tokens}, strict: {strict}, absorbed: {absorbed}, {:?}, {tuning:?}", device.tier());
                    let (mut seen, mut expected) = (Vec::new(), Vec::new());
                    for (line, got) in got.chunks_exact(columns).enumerate() {
                        let (t, h) = (line / heads, line % heads);
                        let (position, kv) = (first + t, h / group);
                        let mut read = vec![0; position + 1];
                        for (column, got) in got.iter().enumerate() {
                            let column = column as u32;
                            if column >= b.exact() + b.coded {
                                assert_eq!(*got, 0.0, "{what}: nothing is written past the keys");
                                continue;
                            }
                            let coded = column >= b.exact();
                            let key = if coded { b.start + column - b.exact() } else { b.exact_key(column) } as usize;
                            let unseen = key > position || c.window.is_some_and(|w| key + w <= position);
                            if unseen || reach.coded(position, key) != coded {
                                assert!(*got < -3e38, "{what}: token {t} may not see key {key}, coded: {coded}: {got}");
                                continue;
                            }
                            read[key] += 1;
                            let k: Vec<f64> = match coded {
                                true => decoded[kv * capacity + key].clone(),
                                false => ring[(slots.of(key) * kv_heads + kv) * query..][..head].iter().map(|k| k.to_f64()).collect(),
                            };
                            let q = |d: usize| f64::from(queries[plain(at as usize + t, h, d)]);
                            seen.push(f64::from(*got));
                            let score = k.iter().enumerate().map(|(d, k)| q(d) * k).sum::<f64>() / (head as f64).sqrt();
                            expected.push(c.cap.map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh()));
                        }
                        let from = c.window.map_or(0, |w| (position + 1).saturating_sub(w));
                        assert!(read[from..].iter().all(|n| *n == 1), "{what}: token {t} reads {read:?}");
                    }
                    // Rebuilt keys are rounded to 16 bits.
                    assert_close(seen, &expected, if absorbed { 1e-9 } else { 1e-6 }, &what);
                }
            }
        }
    }
}
