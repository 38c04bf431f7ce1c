//! Sizes on the command line: `6G`, `512M`, `1.5GiB`, a number of bytes.

use std::str::FromStr;

/// So many bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let text = text.trim();
        let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
        let unit = match text[end..].trim().to_ascii_lowercase().trim_end_matches('b').trim_end_matches('i') {
            "" => 0,
            "k" => 1,
            "m" => 2,
            "g" => 3,
            "t" => 4,
            _ => return Err(format!("{text:?} is no size; write 6G, 512M or a number of bytes")),
        };
        let bytes = text[..end].parse::<f64>().map_err(|_| format!("{text:?} is no size; write 6G, 512M or a number of bytes"))? * 1024f64.powi(unit);
        Ok(Size(bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::Size;

    #[test]
    fn units_are_binary() {
        let bytes = |text: &str| text.parse().map(|Size(bytes)| bytes).ok();
        assert_eq!((bytes("6G"), bytes("1.5 KiB"), bytes("17"), bytes("2mb")), (Some(6 << 30), Some(1536), Some(17), Some(2 << 20)));
        assert_eq!([bytes("G"), bytes("6X"), bytes("-1"), bytes(""), bytes("1.2.3M")], [None; 5]);
    }
}
