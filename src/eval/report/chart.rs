//! What the report's pictures have in common: SVG, colours, and names that fit.

use super::plain;
use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Okabe and Ito's colours, which people who see colours differently can tell apart too; the pale
/// ones last, and then black.
pub(super) const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(110, 110, 110),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
];
pub(super) const FONT: &str = "sans-serif";

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What is drawn goes to memory: what fails is what cannot be drawn.
pub(super) fn failed(error: impl std::fmt::Display) -> Error {
    Error::Numeric { what: "a chart".into(), message: error.to_string() }
}

pub(super) fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
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
pub(super) fn write(area: &Area, text: String, size: i32, colour: &RGBAColor, at: (i32, i32), side: HPos) -> Result<()> {
    let style = TextStyle::from((FONT, size).into_font()).color(colour).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text, at, style)).map_err(failed)
}

/// A model's name without its directories, and no longer than a chart has room for.
pub(super) fn short(name: &str) -> String {
    const LONGEST: usize = 26;
    let last = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or(name);
    let plain = plain(last);
    if plain.chars().count() <= LONGEST { plain } else { plain.chars().take(LONGEST - 1).chain(['…']).collect() }
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
}
