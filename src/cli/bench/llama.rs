//! Speeds as llama-bench prints them, so that lines of both can stand in one table; what lowkey
//! alone knows is in columns of its own behind.

use super::super::table::{bytes, markdown, number};
use lowkey::bench::Row;

/// A Markdown table of two lines for each of `rows`, `pp` and `tg`, in the order of llama-bench:
/// model, size, params, backend, `ngl` or `threads`, test, t/s (mean ± standard deviation).
pub(super) fn table(backend: &str, rows: &[Row]) -> String {
    // Every layer is on the GPU, which llama-bench writes as 99.
    let (how, count) = if backend == "CPU" { ("threads", rayon::current_num_threads()) } else { ("ngl", 99) };
    let names =
        ["model", "size", "params", "backend", how, "test", "t/s", "method", "layout", "kv B/token", "rounds", "ms p50", "moved/step", "of roofline"];
    let line = |row: &Row, test: &str, tokens: usize, [mean, deviation]: [f64; 2], own: [String; 3]| {
        let depth = if row.depth > 0 { format!(" @ d{}", row.depth) } else { String::new() };
        let common = [
            format!("{} {}", row.model, row.weights.to_uppercase()),
            size(row.weight_bytes),
            parameters(row.parameters),
            backend.into(),
            count.to_string(),
            format!("{test}{tokens}{depth}"),
            format!("{mean:.2} ± {deviation:.2}"),
            row.method.clone(),
            row.layout.clone(),
            row.kv_bytes_per_token.to_string(),
            row.rounds.to_string(),
        ];
        common.into_iter().chain(own).collect::<Vec<_>>()
    };
    let both = |row: &Row| {
        let step = [number(Some(row.decode_ms_p50)), bytes(row.bytes_per_step), format!("{:.0} %", 100.0 * row.share_of_roofline)];
        [
            line(row, "pp", row.prefill, [row.prefill_tps, row.prefill_tps_deviation], [const { String::new() }; 3]),
            line(row, "tg", row.steps, [row.decode_tps, row.decode_tps_deviation], step),
        ]
    };
    markdown(&names, &rows.iter().flat_map(both).collect::<Vec<_>>())
}

fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.2} MiB") } else { format!("{:.2} GiB", mib / 1024.0) }
}

fn parameters(count: u64) -> String {
    if count < 1_000_000_000 { format!("{:.2} M", count as f64 / 1e6) } else { format!("{:.2} B", count as f64 / 1e9) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_llama_bench_writes_them() {
        assert_eq!([270_000_000, 3 << 30].map(size), ["257.49 MiB", "3.00 GiB"]);
        assert_eq!([134_515_008, 8_030_261_248].map(parameters), ["134.52 M", "8.03 B"]);
    }
}
