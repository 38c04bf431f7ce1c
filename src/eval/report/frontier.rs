//! The picture of how far models are from the reference, at how many bytes.

use crate::Result;
use crate::chart::{Area, COLOURS, FONT, distinct, failed, short, svg, ticks, write};
use crate::eval::Row;
use crate::kv::Exact;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use std::ops::Range;

/// What a line's colour stands for: method and layout.
type Kind<'a> = (&'a str, &'a str);

/// A row with a place in the chart.
struct Point<'a> {
    row: &'a Row,
    /// Bytes per token.
    x: f64,
    /// Divergence.
    y: f64,
}

impl<'a> Point<'a> {
    fn of(row: &'a Row) -> Option<Point<'a>> {
        let point = Point { row, x: row.kv_bytes_per_token as f64, y: row.kl_mean? };
        (point.x > 0.0 && point.y > 0.0).then_some(point)
    }

    /// What its line's colour stands for.
    fn kind(&self) -> Kind<'a> {
        (&self.row.label.method, &self.row.label.layout)
    }

    /// The model it is compared with, and how long windows are: each has a panel of its own.
    fn panel(&self) -> (Option<&'a str>, usize) {
        (self.row.reference.as_deref(), self.row.window)
    }

    /// From its value to what it could be.
    fn reach(&self) -> [f64; 2] {
        [self.y, self.y + self.row.kl_stderr.unwrap_or(0.0)]
    }
}

/// Room for the legend, at the right.
const LEGEND: i32 = 200;
/// Room for a panel's axes and title: left, top, right, bottom.
const AXES: [i32; 4] = [100, 16, 16, 62];

/// KL divergence against cache bytes per token, both logarithmic, a line for each method and
/// layout, dashed where other tokens stay exact beside latents than in the first; bars show the
/// standard error. Each depth has a panel, beside the others, and each reference a row of these;
/// the divergence has the same scale in all. Rows at no distance from the reference, and those
/// without one, have no place in it: `None` where no other is left.
///
/// # Errors
/// [`crate::Error::Numeric`] for numbers that cannot be drawn.
pub fn frontier(rows: &[Row]) -> Result<Option<String>> {
    let mut points: Vec<Point> = rows.iter().filter_map(Point::of).collect();
    if points.is_empty() {
        return Ok(None);
    }
    let legend =
        Legend { kinds: distinct(points.iter().map(Point::kind)), exact: distinct(points.iter().filter_map(|point| point.row.label.exact())) };
    let references = distinct(points.iter().map(|point| point.panel().0));
    let mut depths = distinct(points.iter().map(|point| point.panel().1));
    depths.sort_unstable();
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    let up = span(points.iter().flat_map(Point::reach));

    let (columns, lines) = (depths.len() as i32, references.len() as i32);
    let panel = if columns * lines == 1 { (780, 560) } else { ((900 / columns).max(380), 420) };
    let size = (panel.0 * columns + LEGEND, panel.1 * lines);
    svg((size.0 as u32, size.1 as u32), |area| {
        legend.draw(area, size.0 - LEGEND + 16)?;
        for (line, reference) in (0..).zip(&references) {
            let across = span(points.iter().filter(|point| point.panel().0 == *reference).map(|point| point.x));
            for (column, depth) in (0..).zip(&depths) {
                let inside: Vec<&Point> = points.iter().filter(|point| point.panel() == (*reference, *depth)).collect();
                let name = reference.filter(|_| lines > 1).map(short);
                let depth = (columns > 1).then(|| format!("depth {depth}"));
                let panel = Panel {
                    corner: (column * panel.0, line * panel.1),
                    size: panel,
                    title: name.into_iter().chain(depth).collect::<Vec<_>>().join(", "),
                    names: [line + 1 == lines, column == 0],
                    // Names may reach below the legend, which is beside the last panel.
                    beyond: if column + 1 == columns { LEGEND / 2 } else { 0 },
                    across: across.clone(),
                    up: up.clone(),
                };
                panel.draw(area, &inside, &legend)?;
            }
        }
        Ok(())
    })
    .map(Some)
}

/// What colours and dashes stand for, in their order.
struct Legend<'a> {
    kinds: Vec<Kind<'a>>,
    exact: Vec<Exact>,
}

impl Legend<'_> {
    fn colour(&self, kind: Kind) -> RGBColor {
        COLOURS[self.kinds.iter().position(|&other| other == kind).unwrap_or(0) % COLOURS.len()]
    }

    /// Pixels of a dash and of the gap after it; `None` where the line is drawn through.
    fn dash(&self, exact: Option<Exact>) -> Option<(i32, i32)> {
        match self.exact.iter().position(|&other| Some(other) == exact) {
            None | Some(0) => None,
            Some(1) => Some((5, 4)),
            Some(_) => Some((2, 4)),
        }
    }

    /// From `left` on: a name for every colour, and for every kind of dashes where there are
    /// several.
    fn draw(&self, area: &Area, left: i32) -> Result<()> {
        let at = |index: i32| 28 + 22 * index;
        for (index, kind) in (0..).zip(&self.kinds) {
            let line = [(left, at(index)), (left + 20, at(index))];
            area.draw(&PathElement::new(line, self.colour(*kind).stroke_width(3))).map_err(failed)?;
            write(area, short(&format!("{} {}", kind.0, kind.1)), 15, &BLACK.to_rgba(), (left + 28, at(index)), HPos::Left)?;
        }
        if self.exact.len() < 2 {
            return Ok(());
        }
        for (index, exact) in (self.kinds.len() as i32 + 1..).zip(&self.exact) {
            let (dash, gap) = self.dash(Some(*exact)).unwrap_or((20, 1));
            for from in (left..left + 20).step_by((dash + gap) as usize) {
                let line = [(from, at(index)), ((from + dash).min(left + 20), at(index))];
                area.draw(&PathElement::new(line, BLACK.stroke_width(2))).map_err(failed)?;
            }
            let name = if (exact.sinks, exact.recent) == (0, 0) { "no token exact".into() } else { format!("{exact} tokens exact") };
            write(area, name, 15, &BLACK.to_rgba(), (left + 28, at(index)), HPos::Left)?;
        }
        Ok(())
    }
}

/// One of the charts.
struct Panel {
    corner: (i32, i32),
    size: (i32, i32),
    title: String,
    /// Whether the axes, across and up, say what they are of.
    names: [bool; 2],
    /// How far names may reach over its right edge.
    beyond: i32,
    across: Range<f64>,
    up: Range<f64>,
}

impl Panel {
    fn draw(&self, area: &Area, points: &[&Point], legend: &Legend) -> Result<()> {
        let Panel { corner: (x, y), size, across, up, .. } = self;
        let titled = if self.title.is_empty() { 0 } else { 20 };
        if titled > 0 {
            let middle = x + (size.0 + AXES[0] - AXES[2]) / 2;
            write(area, self.title.clone(), 16, &BLACK.to_rgba(), (middle, y + AXES[1]), HPos::Center)?;
        }
        let inner = area.clone().shrink((*x, *y), *size);
        let mut chart = ChartBuilder::on(&inner)
            .margin(16)
            .margin_top(AXES[1] + titled)
            .x_label_area_size(46)
            .y_label_area_size(84)
            .build_cartesian_2d(across.clone().log_scale().with_key_points(ticks(across)), up.clone().log_scale().with_key_points(ticks(up)))
            .map_err(failed)?;
        chart
            .configure_mesh()
            .bold_line_style(BLACK.mix(0.12))
            .x_max_light_lines(0)
            .y_max_light_lines(0)
            .label_style((FONT, 15))
            .axis_desc_style((FONT, 16))
            .x_desc(if self.names[0] { "cache bytes per token" } else { "" })
            .y_desc(if self.names[1] { "KL divergence from the dense model, nats per token" } else { "" })
            .x_label_formatter(&|x| tick_label(*x))
            .y_label_formatter(&|y| tick_label(*y))
            .draw()
            .map_err(failed)?;
        let mut lines = Vec::new();
        for (kind, exact) in distinct(points.iter().map(|point| (point.kind(), point.row.label.exact()))) {
            let (colour, dash) = (legend.colour(kind), legend.dash(exact));
            let points: Vec<&&Point> = points.iter().filter(|point| (point.kind(), point.row.label.exact()) == (kind, exact)).collect();
            let places: Vec<(f64, f64)> = points.iter().map(|p| (p.x, p.y)).collect();
            let line = colour.stroke_width(2);
            match dash {
                None => drop(chart.draw_series(LineSeries::new(places.iter().copied(), line)).map_err(failed)?),
                Some((dash, gap)) => drop(chart.draw_series(DashedLineSeries::new(places.iter().copied(), dash, gap, line)).map_err(failed)?),
            }
            let bars = points.iter().filter_map(|p| Some((p.x, p.y, p.row.kl_stderr?)));
            let bars = bars.map(|(x, y, error)| PathElement::new([(x, (y - error).max(up.start)), (x, y + error)], colour.mix(0.6).stroke_width(1)));
            chart.draw_series(bars).map_err(failed)?;
            let inside = if dash.is_some() { WHITE.filled() } else { colour.filled() };
            chart.draw_series(places.iter().map(|&place| Circle::new(place, 4, inside))).map_err(failed)?;
            if dash.is_some() {
                chart.draw_series(places.iter().map(|&place| Circle::new(place, 4, line))).map_err(failed)?;
            }
            lines.push(places.iter().map(|place| chart.backend_coord(place)).collect());
        }
        // The same model with other tokens exact stands above or below itself, and needs no name of
        // its own.
        let solid = |point: &Point| legend.dash(point.row.label.exact()).is_none();
        let named = |point: &&&Point| solid(point) || !points.iter().any(|other| solid(other) && (other.kind(), other.x) == (point.kind(), point.x));
        let placed = points.iter().filter(named).map(|p| (chart.backend_coord(&(p.x, p.y)), short(&p.row.label.model)));
        let frame = [x + AXES[0], y + AXES[1] + titled, x + size.0 + self.beyond, y + size.1 - AXES[3]];
        label(area, &placed.collect::<Vec<_>>(), &lines, frame)
    }
}

/// Writes names beside their points, inside of `frame` (left, top, right, bottom), where no other
/// name, no point and no line is.
fn label(area: &Area, names: &[((i32, i32), String)], lines: &[Vec<(i32, i32)>], frame: [i32; 4]) -> Result<()> {
    const SIZE: i32 = 13;
    // As the frame.
    let mut taken: Vec<[i32; 4]> = lines.iter().flatten().map(|(x, y)| [x - 4, y - 4, x + 4, y + 4]).collect();
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
            let inside = b[0] >= frame[0] && b[1] >= frame[1] && b[2] <= frame[2] && b[3] <= frame[3];
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

/// From a little below the least to a little above the largest.
fn span(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, most) = values.fold((f64::INFINITY, 0f64), |(least, most), x| (least.min(x), most.max(x)));
    least / 1.3..most * 1.3
}

fn tick_label(x: f64) -> String {
    if x < 1e-5 { format!("{x:e}") } else { x.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ticks_have_exponents() {
        assert_eq!([1e-6, 2e-5, 0.01, 20000.0].map(tick_label), ["1e-6", "0.00002", "0.01", "20000"]);
    }
}
