//! What an evaluation found, as text.

use crate::cli::table::{number, table};
use lowkey::eval::{ENOUGH, Label, Row, continuation, needle};

/// Which columns are of use: those that tell lines apart.
#[derive(Debug, Clone, Copy)]
pub struct Columns {
    /// How long windows are.
    pub depth: bool,
    /// Which tokens stay exact.
    pub exact: bool,
}

impl Columns {
    /// The table of these columns: `text`, `depth` and `exact` where they are of use, others
    /// always.
    fn table(self, head: &[&str], lines: &[Vec<String>]) -> String {
        let text = head.iter().position(|&name| name == "text");
        let texts = text.is_some_and(|column| lines.iter().any(|line| line[column] != lines[0][column]));
        let shown = |column: &usize| match head[*column] {
            "text" => texts,
            "depth" => self.depth,
            "exact" => self.exact,
            _ => true,
        };
        let columns: Vec<usize> = (0..head.len()).filter(shown).collect();
        let lines: Vec<Vec<String>> = lines.iter().map(|line| columns.iter().map(|&column| line[column].clone()).collect()).collect();
        table(&columns.iter().map(|&column| head[column]).collect::<Vec<_>>(), &lines)
    }
}

/// A line per depth, text and model; below them, which predictions were scored at each depth, and
/// what is left out.
pub fn rows(rows: &[Row], columns: Columns) -> String {
    let head =
        ["model", "method", "exact", "text", "depth", "kv B/token", "fixed B", "tokens", "perplexity", "KL mean", "±", "KL p99", "KL p99.9", "top-1"];
    let line = |row: &Row| {
        vec![
            row.label.model.clone(),
            row.label.method.clone(),
            exact(&row.label),
            row.text.clone(),
            row.window.to_string(),
            row.kv_bytes_per_token.to_string(),
            row.kv_fixed_bytes.to_string(),
            row.tokens.to_string(),
            number(Some(row.perplexity)),
            number(row.kl_mean),
            number(row.kl_stderr),
            number(row.kl_p99),
            number(row.kl_p999),
            share(row.top1_agreement),
        ]
    };
    let mut text = columns.table(&head, &rows.iter().map(line).collect::<Vec<_>>());
    if columns.depth {
        let mut notes: Vec<String> = rows.iter().map(scored).collect();
        notes.dedup();
        text += &notes.concat();
    }
    if rows.iter().any(|row| row.kl_max.is_some() && row.kl_p999.is_none()) {
        text += &format!("KL p99.9 is left out below {ENOUGH} predictions, of which it would be the largest\n");
    }
    text
}

/// Which predictions are behind a row.
fn scored(row: &Row) -> String {
    let Row { window, windows, first_position, last_position, tokens, .. } = row;
    let s = if *windows == 1 { "" } else { "s" };
    format!("depth {window}: {tokens} predictions, at positions {first_position} to {last_position} of {windows} window{s}\n")
}

/// A line per text and model.
pub fn continuations(rows: &[continuation::Row], columns: Columns) -> String {
    let Some(first) = rows.first() else { return String::new() };
    let head = ["continuation", "method", "exact", "text", "kv B/token", "tokens", "perplexity", "same for", "distinct 4-grams"];
    let line = |row: &continuation::Row| {
        vec![
            row.label.model.clone(),
            row.label.method.clone(),
            exact(&row.label),
            row.text.clone(),
            row.kv_bytes_per_token.to_string(),
            row.tokens.to_string(),
            number(Some(row.perplexity)),
            if row.agreed_tokens == row.tokens { "all".into() } else { row.agreed_tokens.to_string() },
            share(row.distinct_4grams),
        ]
    };
    let table = columns.table(&head, &rows.iter().map(line).collect::<Vec<_>>());
    let note = format!(
        "written greedily after {} tokens of the text; perplexity is that of {}, who reads it exactly\n",
        first.prompt_tokens, first.reference
    );
    format!("\n{table}{note}")
}

/// A line per model, kind and length, a column per depth: the share of right answers, and the mean
/// log-probability of the right answer.
pub fn needle(rows: &[needle::Row], columns: Columns) -> String {
    let Some(first) = rows.first() else { return String::new() };
    // Up to where they begin again: the next line may be the same model's, with another cache.
    let depths = 1 + rows[1..].iter().take_while(|row| row.depth_percent != first.depth_percent).count();
    let names: Vec<String> = rows[..depths].iter().map(|row| format!("at {} %", row.depth_percent)).collect();
    let head: Vec<&str> = ["needle", "method", "exact", "kind", "length"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let lines = rows.chunks(depths).map(|line| {
        let told = line.iter().map(|row| format!("{:.0} % {}", 100.0 * row.accuracy, number(Some(row.log_probability))));
        let needle::Row { label, kind, length, .. } = &line[0];
        [label.model.clone(), label.method.clone(), exact(label), kind.name().into(), length.to_string()].into_iter().chain(told).collect()
    });
    format!("\n{}", columns.table(&head, &lines.collect::<Vec<_>>()))
}

/// Sinks and recent tokens.
fn exact(label: &Label) -> String {
    label.exact().map_or("all".into(), |exact| exact.to_string())
}

fn share(share: Option<f64>) -> String {
    share.map_or(number(None), |share| format!("{:.1} %", 100.0 * share))
}
