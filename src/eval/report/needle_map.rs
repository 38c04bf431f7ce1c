//! The picture of what was found in long texts.

use crate::Result;
use crate::chart::{COLOURS, failed, svg, write};
use crate::eval::needle;
use plotters::prelude::*;
use plotters::style::text_anchor::HPos;

/// One model's answers to one kind of question.
///
/// A column per length, a row per depth, darker where more answers were right. Below each share the
/// mean log-probability of the right answer.
///
/// # Errors
/// [`crate::Error::Numeric`] for numbers that cannot be drawn.
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
