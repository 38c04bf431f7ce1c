//! What the pictures of reports have in common: SVG, colours, round numbers on axes, and names that
//! fit.

use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

/// Okabe and Ito's colours, which people who see colours differently can tell apart too; the pale
/// ones last, and then black.
pub(crate) const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(110, 110, 110),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];
pub(crate) const FONT: &str = "sans-serif";

pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What is drawn goes to memory: what fails is what cannot be drawn.
pub(crate) fn failed(error: impl std::fmt::Display) -> Error {
    Error::Numeric { what: "a chart".into(), message: error.to_string() }
}

pub(crate) fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    Ok(text)
}

/// Writes `text` in one line, its middle at the height of `at`.
pub(crate) fn write(area: &Area, text: String, size: i32, colour: &RGBAColor, at: (i32, i32), side: HPos) -> Result<()> {
    let style = TextStyle::from((FONT, size).into_font()).color(colour).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text, at, style)).map_err(failed)
}

/// A model's name without its directories, and no longer than a chart has room for.
pub(crate) fn short(name: &str) -> String {
    const LONGEST: usize = 26;
    let last = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or(name);
    let plain = plain(last);
    if plain.chars().count() <= LONGEST { plain } else { plain.chars().take(LONGEST - 1).chain(['…']).collect() }
}

/// Round numbers in `range`: over more than four decades the powers of ten, over less than one some
/// in between, else one, two and five times these.
pub(crate) fn ticks(range: &Range<f64>) -> Vec<f64> {
    let decades = range.start.log10().floor() as i32..=range.end.log10().floor() as i32;
    let digits: &[f64] = match range.end / range.start {
        ..10.0 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0],
        ..=1e4 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    // Through text, so that a tick is the number that it reads as.
    let tick = |decade: i32, digit: f64| format!("{digit}e{decade}").parse::<f64>();
    decades.flat_map(|decade| digits.iter().filter_map(move |&digit| tick(decade, digit).ok())).filter(|tick| range.contains(tick)).collect()
}

/// A name as it may stand in a page or a picture, neither of which has control characters.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Each value once, in the order of first occurrence.
pub(crate) fn distinct<T: PartialEq>(values: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = Vec::new();
    values.for_each(|value| {
        if !found.contains(&value) {
            found.push(value);
        }
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short() {
        assert_eq!(["models/a/", "a", "C:\\models\\b", "/", ""].map(short), ["a", "a", "b", "", ""]);
        assert_eq!(short(&"ö".repeat(40)), "ö".repeat(25) + "…");
        assert_eq!(short("a\nb"), "a\u{fffd}b");
    }

    #[test]
    fn ticks_are_round_and_in_range() {
        assert_eq!(ticks(&(1500.0..9000.0)), [1500.0, 2000.0, 3000.0, 4000.0, 5000.0, 7000.0]);
        assert_eq!(ticks(&(0.0015..0.3)), [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]);
        assert_eq!(ticks(&(3e-6..0.2)), [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]);
    }
}
