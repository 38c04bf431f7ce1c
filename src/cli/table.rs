//! Plain text tables, and numbers as people read them.

/// Columns as wide as their widest cell. The first is aligned to the left, the others, which are
/// numbers mostly, to the right.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (column, (cell, &width)) in cells.zip(&widths).enumerate() {
            let padding = " ".repeat(width - cell.chars().count());
            line += &if column == 0 { format!("{cell}{padding}") } else { format!("  {padding}{cell}") };
        }
        line.trim_end().to_string() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    text += &line(&mut widths.iter().map(|&width| "-".repeat(width)).collect::<Vec<_>>().iter().map(String::as_str));
    rows.iter().for_each(|row| text += &line(&mut row.iter().map(String::as_str)));
    text
}

/// The same as a table of Markdown.
pub fn markdown(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &mut dyn Iterator<Item = &str>| cells.fold("|".to_string(), |line, cell| line + " " + &cell.replace('|', "\\|") + " |") + "\n";
    let mut text = line(&mut head.iter().copied());
    text += &line(&mut head.iter().enumerate().map(|(column, _)| if column == 0 { "---" } else { "--:" }));
    rows.iter().for_each(|row| text += &line(&mut row.iter().map(String::as_str)));
    text
}

/// What reading a cached token costs, from operations over all of so many layers, and the same of
/// exact rows; one multiply-add is two operations.
pub fn multiply_adds(layers: usize, flops: u64, dense: u64) -> String {
    let of_layer = |flops: u64| flops as f64 / 2.0 / layers.max(1) as f64;
    let (one, one_dense) = (of_layer(flops), of_layer(dense));
    format!("{one:.0} multiply-adds per cached token in a layer (dense {one_dense:.0}), {} in all {layers} (dense {})", flops / 2, dense / 2)
}

/// Bytes in binary units: `22.5 KiB`.
pub fn bytes(count: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", units[unit]) }
}

/// How long ago so many seconds are, in the largest unit: `3 days ago`.
pub fn ago(seconds: u64) -> String {
    let units = [(365 * 86400, "year"), (30 * 86400, "month"), (86400, "day"), (3600, "hour"), (60, "minute")];
    match units.into_iter().find(|(unit, _)| seconds >= *unit) {
        Some((unit, name)) => format!("{} {name}{} ago", seconds / unit, if seconds / unit == 1 { "" } else { "s" }),
        None => "just now".into(),
    }
}

/// A number with about four digits that count, or a dash where there is none.
pub fn number(value: Option<f64>) -> String {
    match value {
        None => "–".into(),
        Some(0.0) => "0".into(),
        Some(x) if x.abs() < 1e-3 => format!("{x:.2e}"),
        Some(x) => format!("{x:.*}", (3 - x.abs().log10().floor() as i32).clamp(0, 5) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_whatever_their_letters() {
        let rows = [vec!["größe".to_string(), "1".into()], vec!["n".into(), "12345".into()]];
        assert_eq!(table(&["name", "kv"], &rows), "name      kv\n-----  -----\ngröße      1\nn      12345\n");
    }

    #[test]
    fn markdown_has_as_many_columns_as_names() {
        assert_eq!(markdown(&["name", "kv"], &[vec!["a|b".into(), "1".into()]]), "| name | kv |\n| --- | --: |\n| a\\|b | 1 |\n");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([0.0, 0.5, 12.3456, 30.2, 98765.4, 0.00012345].map(|x| number(Some(x))), ["0", "0.5000", "12.35", "30.20", "98765", "1.23e-4"]);
        assert_eq!(number(None), "–");
        assert_eq!([59, 60, 7300, 86400 * 29, 86400 * 400].map(ago), ["just now", "1 minute ago", "2 hours ago", "29 days ago", "1 year ago"]);
        assert_eq!([0, 1023, 23040, 3 << 30].map(bytes), ["0 B", "1023 B", "22.5 KiB", "3.0 GiB"]);
    }
}
