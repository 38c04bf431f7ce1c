//! The picture of how fast tokens are decoded, by depth.

use super::Row;
use crate::Result;
use crate::chart::{Area, COLOURS, FONT, distinct, failed, short, svg, ticks, write};
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;
use std::ops::Range;

const SIZE: (i32, i32) = (860, 480);
/// Room for names, at the right.
const NAMES: i32 = 190;
/// Pixels between two names, from middle to middle.
const APART: i32 = 17;

/// White paper where the reader's is, else dark paper.
///
/// The SVG's own attributes are for white; a style sheet stands above them.
const DARK: &str = "<style>@media (prefers-color-scheme: dark) { [fill=\"#FFFFFF\"] { fill: #16181c } [fill=\"#000000\"] { fill: #e6e6e6 } \
                    [stroke=\"#000000\"] { stroke: #e6e6e6 } [stroke=\"#0072B2\"] { stroke: #4aa3dc } [fill=\"#0072B2\"] { fill: #4aa3dc } }</style>\n";

/// Where a number is along an axis: evenly, or by its logarithm to base 2, where 0 stands one
/// doubling before the least.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Axis {
    Even,
    Doublings { least: f64 },
}

impl Axis {
    /// By doublings where `values` span more than `widest` times.
    fn of(values: &[f64], widest: f64) -> Axis {
        let least = values.iter().copied().filter(|x| *x > 0.0).fold(f64::INFINITY, f64::min);
        let most = values.iter().copied().fold(0.0, f64::max);
        if most > widest * least { Axis::Doublings { least } } else { Axis::Even }
    }

    fn place(self, value: f64) -> f64 {
        match self {
            Axis::Even => value,
            Axis::Doublings { least } if value <= 0.0 => least.log2() - 1.0,
            Axis::Doublings { .. } => value.log2(),
        }
    }
}

/// Places from one end of the paper to the other, some of them with a number.
struct Ruler {
    range: Range<f64>,
    places: Vec<f64>,
}

impl Ranged for Ruler {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, place: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (place - self.range.start) / (self.range.end - self.range.start);
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<H: KeyPointHint>(&self, _: H) -> Vec<f64> {
        self.places.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// One model and layout.
struct Line<'a> {
    name: String,
    rows: Vec<&'a Row>,
}

/// Decoded tokens per second by depth, as SVG: a line for each model, layout and type of weights,
/// with its name at its end and bars as long as the standard deviation.
///
/// Depths that span more than 8 times are drawn by doublings, and so are speeds that span more than
/// 20 times. It can be read on white and on dark paper. `None` where no line has two depths.
///
/// # Errors
/// [`crate::Error::Numeric`] for numbers that cannot be drawn.
pub fn chart(rows: &[Row]) -> Result<Option<String>> {
    let lines = lines(rows);
    if lines.iter().all(|line| line.rows.len() < 2) {
        return Ok(None);
    }
    let depths: Vec<f64> = rows.iter().map(|row| row.depth as f64).collect();
    let speeds: Vec<f64> = rows.iter().map(|row| row.decode_tps).collect();
    let (across, up) = (Axis::of(&depths, 8.0), Axis::of(&speeds, 20.0));
    let [(left, right), (least, most)] = [(across, &depths), (up, &speeds)].map(|(axis, values)| {
        let places = values.iter().map(|value| axis.place(*value));
        places.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), place| (least.min(place), most.max(place)))
    });
    let margin = 0.02 * (right - left);
    let (bottom, top) = if up == Axis::Even { (0.0, 1.08 * most) } else { (least - 0.5, most + 0.5) };
    let depth_ticks = distinct(depths.iter().map(|depth| depth.round() as u64));
    let speed_ticks = if up == Axis::Even { even_ticks(top) } else { ticks(&(bottom.exp2()..top.exp2())) };
    svg((SIZE.0 as u32, SIZE.1 as u32), |area| {
        let inner = area.clone().shrink((0, 0), (SIZE.0 - NAMES, SIZE.1));
        let across_places: Vec<f64> = depth_ticks.iter().map(|depth| across.place(*depth as f64)).collect();
        let up_places: Vec<f64> = speed_ticks.iter().map(|speed| up.place(*speed)).collect();
        let mut chart = ChartBuilder::on(&inner)
            .margin(16)
            .x_label_area_size(46)
            .y_label_area_size(72)
            .build_cartesian_2d(
                Ruler { range: left - margin..right + margin, places: across_places.clone() },
                Ruler { range: bottom..top, places: up_places.clone() },
            )
            .map_err(failed)?;
        let label = |places: &[f64], names: Vec<String>, at: f64| {
            let found = places.iter().position(|place| (place - at).abs() < 1e-9);
            found.and_then(|index| names.get(index).cloned()).unwrap_or_default()
        };
        chart
            .configure_mesh()
            .bold_line_style(BLACK.mix(0.12))
            .x_max_light_lines(0)
            .y_max_light_lines(0)
            .label_style((FONT, 15))
            .axis_desc_style((FONT, 16))
            .x_desc("tokens in the cache")
            .y_desc("tokens decoded per second")
            .x_label_formatter(&|at| label(&across_places, depth_ticks.iter().map(u64::to_string).collect(), *at))
            .y_label_formatter(&|at| label(&up_places, speed_ticks.iter().map(f64::to_string).collect(), *at))
            .draw()
            .map_err(failed)?;
        let mut ends = Vec::new();
        for (index, line) in lines.iter().enumerate() {
            let colour = COLOURS[index % COLOURS.len()];
            let place = |row: &Row, speed: f64| (across.place(row.depth as f64), up.place(speed).clamp(bottom, top));
            let places: Vec<(f64, f64)> = line.rows.iter().map(|row| place(row, row.decode_tps)).collect();
            let stroke = colour.stroke_width(2);
            // Colours come round: the second time they are dashed.
            match index / COLOURS.len() {
                0 => drop(chart.draw_series(LineSeries::new(places.iter().copied(), stroke)).map_err(failed)?),
                _ => drop(chart.draw_series(DashedLineSeries::new(places.iter().copied(), 5, 4, stroke)).map_err(failed)?),
            }
            let bars = line.rows.iter().filter(|row| row.decode_tps_deviation > 0.0).map(|row| {
                let [low, high] = [-1.0, 1.0].map(|side| (row.decode_tps + side * row.decode_tps_deviation).max(row.decode_tps / 10.0));
                PathElement::new([place(row, low), place(row, high)], colour.stroke_width(1))
            });
            chart.draw_series(bars).map_err(failed)?;
            chart.draw_series(places.iter().map(|&place| Circle::new(place, 4, colour.filled()))).map_err(failed)?;
            ends.extend(places.last().map(|place| (chart.backend_coord(place), colour, line.name.clone())));
        }
        name(area, ends)
    })
    .map(|svg| Some(readable_in_the_dark(&svg)))
}

/// Rows of the same model, layout and weights, by depth, called by what distinguishes them.
fn lines(rows: &[Row]) -> Vec<Line<'_>> {
    let of = |row: &Row| [&row.model, &row.method, &row.layout, &row.weights].map(String::clone);
    let kinds = distinct(rows.iter().map(of));
    let varies = [0, 1, 2, 3].map(|part| kinds.iter().any(|kind| kind[part] != kinds[0][part]));
    let kinds = kinds.into_iter().map(|kind| {
        // A method goes with its layouts, which say more.
        let parts = [varies[0], varies[1] && !varies[2], varies[2] || varies == [false; 4], varies[3]];
        let name = kind.iter().zip(parts).filter(|(_, told)| *told).map(|(part, _)| short(part)).collect::<Vec<_>>().join(" ");
        let mut rows: Vec<&Row> = rows.iter().filter(|row| of(row) == kind).collect();
        rows.sort_by_key(|row| row.depth);
        Line { name: short(&name), rows }
    });
    kinds.collect()
}

/// From 0 to `top`, in steps of one, two or five times a power of ten: four to ten of them.
fn even_ticks(top: f64) -> Vec<f64> {
    let decade = 10f64.powf((top / 4.0).log10().floor());
    let step = [5.0, 2.0, 1.0].into_iter().map(|digit| digit * decade).find(|step| 4.0 * step <= top).unwrap_or(top);
    let count = (top / step) as usize;
    // Rounded, so that a tick is the number that it reads as.
    (0..=count).map(|index| (index as f64 * step * 1e6).round() / 1e6).collect()
}

/// Writes a name beside the end of each line; where names would stand on each other they make room,
/// and a thin line says where they belong.
fn name(area: &Area, mut ends: Vec<((i32, i32), RGBColor, String)>) -> Result<()> {
    ends.sort_by_key(|((_, y), ..)| *y);
    let left = SIZE.0 - NAMES + 14;
    let heights = spread(&ends.iter().map(|((_, y), ..)| *y).collect::<Vec<_>>(), SIZE.1 - 16);
    for (((x, y), colour, text), height) in ends.into_iter().zip(heights) {
        area.draw(&PathElement::new([(x + 6, y), (left - 4, height)], colour.stroke_width(1))).map_err(failed)?;
        write(area, text, 14, &BLACK.to_rgba(), (left, height), HPos::Left)?;
    }
    Ok(())
}

/// The heights nearest to `wanted`, which ascend, at which names stand apart and above `lowest`.
fn spread(wanted: &[i32], lowest: i32) -> Vec<i32> {
    let mut heights: Vec<i32> = wanted.to_vec();
    for index in 1..heights.len() {
        heights[index] = heights[index].max(heights[index - 1] + APART);
    }
    let mut below = lowest + APART;
    for height in heights.iter_mut().rev() {
        *height = (*height).min(below - APART);
        below = *height;
    }
    heights
}

/// `svg` with [`DARK`] as its first child.
fn readable_in_the_dark(svg: &str) -> String {
    match svg.split_once('>') {
        Some((head, rest)) => format!("{head}>\n{DARK}{}", rest.trim_start()),
        None => svg.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depths_that_span_widely_are_drawn_by_doublings() {
        let axis = Axis::of(&[0.0, 512.0, 8192.0], 8.0);
        assert_eq!([0.0, 512.0, 1024.0, 8192.0].map(|depth| axis.place(depth)), [8.0, 9.0, 10.0, 13.0]);
        assert_eq!(Axis::of(&[0.0, 512.0, 1024.0], 8.0), Axis::Even);
        assert_eq!(Axis::of(&[0.0], 8.0), Axis::Even);
    }

    #[test]
    fn even_ticks_are_round() {
        assert_eq!(even_ticks(108.0), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(even_ticks(1.3), [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]);
        assert_eq!(even_ticks(40.0), [0.0, 10.0, 20.0, 30.0, 40.0]);
    }

    #[test]
    fn names_make_room_for_each_other() {
        assert_eq!(spread(&[10, 100, 104], 400), [10, 100, 117]);
        assert_eq!(spread(&[380, 390, 395], 400), [366, 383, 400]);
        assert_eq!(spread(&[], 400), [0; 0]);
    }
}
