//! The report's pictures, as SVG.

use super::{distinct, plain};
use crate::eval::{Row, needle};
use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

/// Okabe and Ito's colours, which people who see colours differently can tell apart too; the pale ones last.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(110, 110, 110),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];
const FONT: &str = "sans-serif";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What is drawn goes to memory: what fails is what cannot be drawn.
fn failed(error: impl std::fmt::Display) -> Error {
    Error::Numeric { what: "a chart".into(), message: error.to_string() }
}

fn svg(size: (u32, u32), draw: impl FnOnce(&Area) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    Ok(text)
}

/// A row with a place in the chart.
struct Point<'a> {
    row: &'a Row,
    /// Bytes per token.
    x: f64,
    /// Divergence.
    y: f64,
}

impl Point<'_> {
    /// The method and layout that it belongs to.
    fn series(&self) -> (&str, &str) {
        (&self.row.method, &self.row.layout)
    }
}

/// KL divergence against cache bytes per token, both logarithmic, a line for each method and layout; bars show the standard error. Rows at no distance from the
/// reference, and those without one, have no place in it: `None` where no other is left.
///
/// # Errors
/// [`Error::Numeric`] for numbers that cannot be drawn.
pub fn frontier(rows: &[Row]) -> Result<Option<String>> {
    let place = |row| Some(Point { row, x: row.kv_bytes_per_token as f64, y: row.kl_mean? });
    let mut points: Vec<Point> = rows.iter().filter_map(place).filter(|point| point.x > 0.0 && point.y > 0.0).collect();
    if points.is_empty() {
        return Ok(None);
    }
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    let drawn = |row: &&Row| points.iter().any(|point| point.series() == (&row.method, &row.layout));
    let series = distinct(rows.iter().filter(drawn).map(|row| (&*row.method, &*row.layout)));
    let bars = points.iter().flat_map(|point| [point.y, point.y + point.row.kl_stderr.unwrap_or(0.0)]);
    let (across, up) = (span(points.iter().map(|point| point.x)), span(bars));

    const SIZE: (i32, i32) = (980, 560);
    const LEGEND: i32 = 200;
    svg((SIZE.0 as u32, SIZE.1 as u32), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(16)
            .margin_right(LEGEND)
            .x_label_area_size(46)
            .y_label_area_size(84)
            .build_cartesian_2d(across.clone().log_scale().with_key_points(ticks(&across)), up.clone().log_scale().with_key_points(ticks(&up)))
            .map_err(failed)?;
        chart
            .configure_mesh()
            .bold_line_style(BLACK.mix(0.12))
            .x_max_light_lines(0)
            .y_max_light_lines(0)
            .label_style((FONT, 15))
            .axis_desc_style((FONT, 16))
            .x_desc("cache bytes per token")
            .y_desc("KL divergence from the dense model, nats per token")
            .x_label_formatter(&|x| tick_label(*x))
            .y_label_formatter(&|y| tick_label(*y))
            .draw()
            .map_err(failed)?;
        let mut lines = Vec::new();
        for ((index, series), colour) in (0..).zip(series).zip(COLOURS.iter().cycle()) {
            let (left, middle) = (SIZE.0 - LEGEND + 16, 28 + 22 * index);
            area.draw(&PathElement::new([(left, middle), (left + 20, middle)], colour.stroke_width(3))).map_err(failed)?;
            write(area, short(&format!("{} {}", series.0, series.1)), 15, &BLACK.to_rgba(), (left + 28, middle), HPos::Left)?;
            let points: Vec<&Point> = points.iter().filter(|point| point.series() == series).collect();
            chart.draw_series(LineSeries::new(points.iter().map(|p| (p.x, p.y)), colour.stroke_width(2))).map_err(failed)?;
            let bars = points.iter().filter_map(|p| Some((p.x, p.y, p.row.kl_stderr?)));
            let bars = bars.map(|(x, y, error)| PathElement::new([(x, (y - error).max(up.start)), (x, y + error)], colour.mix(0.6).stroke_width(1)));
            chart.draw_series(bars).map_err(failed)?;
            chart.draw_series(points.iter().map(|p| Circle::new((p.x, p.y), 4, colour.filled()))).map_err(failed)?;
            lines.push(points.iter().map(|p| chart.backend_coord(&(p.x, p.y))).collect());
        }
        let placed = points.iter().map(|p| (chart.backend_coord(&(p.x, p.y)), short(&p.row.model)));
        label(area, &placed.collect::<Vec<_>>(), &lines, SIZE.0 - LEGEND / 2)
    })
    .map(Some)
}

fn write(area: &Area, text: String, size: i32, colour: &RGBAColor, at: (i32, i32), side: HPos) -> Result<()> {
    let style = TextStyle::from((FONT, size).into_font()).color(colour).pos(Pos::new(side, VPos::Center));
    area.draw(&Text::new(text, at, style)).map_err(failed)
}

/// Writes names beside their points, where no other name, no point and no line is.
fn label(area: &Area, names: &[((i32, i32), String)], lines: &[Vec<(i32, i32)>], right: i32) -> Result<()> {
    const SIZE: i32 = 13;
    let bottom = area.dim_in_pixel().1 as i32 - 62;
    // Left, top, right, bottom.
    let mut taken: Vec<[i32; 4]> = names.iter().map(|((x, y), _)| [x - 4, y - 4, x + 4, y + 4]).collect();
    // A line is a row of dots that no name fits between.
    for (a, b) in lines.iter().flat_map(|line| line.iter().zip(&line[1..])) {
        let steps = ((b.0 - a.0).abs().max((b.1 - a.1).abs()) / (SIZE / 2)).max(1);
        taken.extend((1..steps).map(|i| (a.0 + (b.0 - a.0) * i / steps, a.1 + (b.1 - a.1) * i / steps)).map(|(x, y)| [x - 1, y - 1, x + 1, y + 1]));
    }
    for ((x, y), name) in names {
        let wide = name.chars().count() as i32 * SIZE * 11 / 20;
        let room = |(dx, dy): (i32, i32)| [x + dx, y + dy - SIZE / 2, x + dx + wide, y + dy + SIZE / 2];
        let free = |place: &(i32, i32)| {
            let b = room(*place);
            let inside = b[0] >= 100 && b[1] >= 16 && b[2] <= right && b[3] <= bottom;
            inside && taken.iter().all(|t| b[0] >= t[2] || b[2] <= t[0] || b[1] >= t[3] || b[3] <= t[1])
        };
        let beside = [(8, -9), (8, 9), (-wide - 8, 9), (-wide - 8, -9), (-wide / 2, -18), (-wide / 2, 18), (8, -24), (-wide - 8, 24)];
        // A name that has no room anywhere is left to the table.
        let Some(place) = beside.into_iter().find(free) else { continue };
        taken.push(room(place));
        write(area, name.clone(), SIZE, &BLACK.mix(0.75), (x + place.0, y + place.1), HPos::Left)?;
    }
    Ok(())
}

/// One model's answers to one kind of question: a column per length, a row per depth, darker where more answers were right. Below each share the mean log-probability of the right answer.
///
/// # Errors
/// [`Error::Numeric`] for numbers that cannot be drawn.
pub fn needle_map(rows: &[needle::Row]) -> Result<String> {
    let mut lengths: Vec<usize> = rows.iter().map(|row| row.length).collect();
    let mut depths: Vec<u32> = rows.iter().map(|row| row.depth_percent).collect();
    lengths.sort_unstable();
    lengths.dedup();
    depths.sort_unstable();
    depths.dedup();
    const CELL: (i32, i32) = (96, 44);
    const ORIGIN: (i32, i32) = (118, 34);
    let size = (ORIGIN.0 + CELL.0 * lengths.len() as i32 + 10, ORIGIN.1 + CELL.1 * depths.len() as i32 + 10);
    svg((size.0 as u32, size.1 as u32), |area| {
        for (column, length) in lengths.iter().enumerate() {
            let middle = ORIGIN.0 + CELL.0 * column as i32 + CELL.0 / 2;
            write(area, format!("{length} tokens"), 14, &BLACK.to_rgba(), (middle, ORIGIN.1 / 2), HPos::Center)?;
        }
        for (line, depth) in depths.iter().enumerate() {
            let middle = ORIGIN.1 + CELL.1 * line as i32 + CELL.1 / 2;
            write(area, format!("{depth} % deep"), 14, &BLACK.to_rgba(), (ORIGIN.0 - 10, middle), HPos::Right)?;
        }
        for row in rows {
            let find = |at: Option<usize>| at.unwrap_or(0) as i32;
            let column = find(lengths.iter().position(|&length| length == row.length));
            let line = find(depths.iter().position(|&depth| depth == row.depth_percent));
            let (left, top) = (ORIGIN.0 + CELL.0 * column, ORIGIN.1 + CELL.1 * line);
            let share = row.accuracy.clamp(0.0, 1.0);
            let shade = COLOURS[0].mix(0.06 + 0.94 * share);
            area.draw(&Rectangle::new([(left, top), (left + CELL.0 - 2, top + CELL.1 - 2)], shade.filled())).map_err(failed)?;
            let ink = if share > 0.6 { WHITE } else { BLACK };
            let middle = left + CELL.0 / 2 - 1;
            write(area, format!("{:.0} %", 100.0 * share), 17, &ink.to_rgba(), (middle, top + 14), HPos::Center)?;
            write(area, format!("ln p {:.2}", row.log_probability), 12, &ink.to_rgba(), (middle, top + 31), HPos::Center)?;
        }
        Ok(())
    })
}

/// From a little below the least to a little above the largest.
fn span(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, most) = values.fold((f64::INFINITY, 0f64), |(least, most), x| (least.min(x), most.max(x)));
    least / 1.3..most * 1.3
}

/// Round numbers in `range`: over more than four decades the powers of ten, over less than one some in between, else one, two and five times these.
fn ticks(range: &Range<f64>) -> Vec<f64> {
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

fn tick_label(x: f64) -> String {
    if x < 1e-5 { format!("{x:e}") } else { x.to_string() }
}

/// A model's name without its directories, and no longer than a chart has room for.
fn short(name: &str) -> String {
    const LONGEST: usize = 26;
    let last = name.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next().unwrap_or(name);
    let plain = plain(last);
    if plain.chars().count() <= LONGEST { plain } else { plain.chars().take(LONGEST - 1).chain(['…']).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_in_range() {
        assert_eq!(ticks(&(1500.0..9000.0)), [1500.0, 2000.0, 3000.0, 4000.0, 5000.0, 7000.0]);
        assert_eq!(ticks(&(0.0015..0.3)), [0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2]);
        assert_eq!(ticks(&(3e-6..0.2)), [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]);
        assert_eq!([1e-6, 2e-5, 0.01, 20000.0].map(tick_label), ["1e-6", "0.00002", "0.01", "20000"]);
    }

    #[test]
    fn names_are_short() {
        assert_eq!(["models/a/", "a", "C:\\models\\b", "/", ""].map(short), ["a", "a", "b", "", ""]);
        assert_eq!(short(&"ö".repeat(40)), "ö".repeat(25) + "…");
        assert_eq!(short("a\nb"), "a\u{fffd}b");
    }
}
