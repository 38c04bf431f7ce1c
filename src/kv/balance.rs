//! KVarN's variance normalisation (arXiv 2606.03458; released as huawei-csl/KVarN): factors of rows
//! and columns after which all of both have equal variance.
//!
//! As Sinkhorn and Knopp's iteration makes sums equal: by turns, columns and then rows are divided
//! by their standard deviation, whose logarithms add up. Both are kept within bounds, so that what
//! hardly varies is not blown up, and of all rounds the one counts after which the largest and the
//! smallest deviations are the least apart. The constants are the release's.

/// Rounds.
pub const ROUNDS: usize = 16;
/// What a standard deviation is taken for at the least; at the most it is one over that.
pub const LEAST_DEVIATION: f32 = 1e-3;
/// The least and the largest logarithm of a factor.
pub const LOGARITHMS: [f32; 2] = [-0.3, 10.0];

/// What rows and columns are divided by.
#[derive(Debug, Clone, PartialEq)]
pub struct Balance {
    /// By row.
    pub rows: Vec<f32>,
    /// By column.
    pub columns: Vec<f32>,
}

/// Balances a matrix of `rows` by `columns`, at least two of both.
///
/// Its entries are `at(row, column)`.
pub fn balance(rows: usize, columns: usize, at: impl Fn(usize, usize) -> f32) -> Balance {
    let matrix: Vec<f32> = (0..rows * columns).map(|i| at(i / columns, i % columns)).collect();
    let mut logarithms = [vec![0f32; rows], vec![0f32; columns]];
    let (_, mut column_deviations) = deviations(&matrix, &logarithms);
    let mut best = (f32::INFINITY, Balance { rows: vec![1.0; rows], columns: vec![1.0; columns] });
    for round in 0..=ROUNDS {
        if round > 0 {
            divide(&mut logarithms[1], &column_deviations);
            let (row_deviations, _) = deviations(&matrix, &logarithms);
            divide(&mut logarithms[0], &row_deviations);
        }
        let (row_deviations, found) = deviations(&matrix, &logarithms);
        column_deviations = found;
        let apart = spread(&row_deviations) + spread(&column_deviations);
        if apart <= best.0 {
            let [rows, columns] = [0, 1].map(|side: usize| logarithms[side].iter().map(|log| log.exp()).collect());
            best = (apart, Balance { rows, columns });
        }
    }
    best.1
}

fn divide(logarithms: &mut [f32], deviations: &[f32]) {
    for (log, deviation) in logarithms.iter_mut().zip(deviations) {
        *log = (*log + deviation.clamp(LEAST_DEVIATION, 1.0 / LEAST_DEVIATION).ln()).clamp(LOGARITHMS[0], LOGARITHMS[1]);
    }
}

/// The standard deviations of rows and of columns of what `matrix` is after division.
fn deviations(matrix: &[f32], [rows, columns]: &[Vec<f32>; 2]) -> (Vec<f32>, Vec<f32>) {
    let [by_row, by_column] = [rows, columns].map(|logs| logs.iter().map(|log| (-log).exp()).collect::<Vec<f32>>());
    let (mut of_rows, mut sums, mut squares) = (Vec::with_capacity(rows.len()), vec![0f64; columns.len()], vec![0f64; columns.len()]);
    let deviation = |sum: f64, squares: f64, count: usize| ((squares - sum * sum / count as f64).max(0.0) / (count - 1) as f64).sqrt() as f32;
    for (line, by_row) in matrix.chunks_exact(columns.len()).zip(&by_row) {
        let (mut sum, mut square) = (0f64, 0f64);
        for (((x, by_column), sums), squares) in line.iter().zip(&by_column).zip(&mut sums).zip(&mut squares) {
            let x = f64::from(x * by_row * by_column);
            sum += x;
            square += x * x;
            *sums += x;
            *squares += x * x;
        }
        of_rows.push(deviation(sum, square, columns.len()));
    }
    (of_rows, sums.iter().zip(&squares).map(|(sum, square)| deviation(*sum, *square, rows.len())).collect())
}

/// How many times larger the largest is than the smallest.
fn spread(deviations: &[f32]) -> f32 {
    let (low, high) = deviations.iter().fold((f32::INFINITY, 0f32), |(low, high), &x| (low.min(x), high.max(x)));
    high / low.max(1e-8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::Random;

    /// A matrix of even noise whose rows and columns were scaled is given back its scales, but for
    /// a factor common to either side and what the noise itself has.
    #[test]
    fn scales_of_rows_and_columns_are_found() {
        let (rows, columns) = (128, 64);
        let mut random = Random::new(6);
        let noise: Vec<f32> = (0..rows * columns).map(|_| random.gaussian() as f32).collect();
        let (of_row, of_column) = (|r: usize| 1.0 + (r % 9) as f32 / 20.0, |c: usize| 2.0 + (c % 5) as f32 * 3.0);
        let scaled = |r: usize, c: usize| noise[r * columns + c] * of_row(r) * of_column(c);
        let found = balance(rows, columns, scaled);
        let plain = balance(rows, columns, |r, c| noise[r * columns + c]);
        let ratios =
            |found: &[f32], plain: &[f32], of: &dyn Fn(usize) -> f32| -> Vec<f32> { (0..found.len()).map(|i| found[i] / plain[i] / of(i)).collect() };
        for ratios in [ratios(&found.rows, &plain.rows, &of_row), ratios(&found.columns, &plain.columns, &of_column)] {
            // But for the few whose factors would have to be smaller than they may.
            assert!(ratios.iter().filter(|ratio| (*ratio / ratios[0] - 1.0).abs() > 2e-2).count() * 10 < ratios.len(), "{ratios:?}");
        }
        let logarithms = [&found.rows, &found.columns].map(|side| side.iter().map(|x| x.ln()).collect());
        let matrix: Vec<f32> = (0..rows * columns).map(|i| scaled(i / columns, i % columns)).collect();
        let (of_rows, of_columns) = deviations(&matrix, &logarithms);
        assert!(spread(&of_rows) < 1.2 && spread(&of_columns) < 1.2);
    }

    /// What does not vary at all is not divided by nothing.
    #[test]
    fn a_constant_stays_finite() {
        for x in [0.0, 3.0, 6e4] {
            let found = balance(4, 3, |_, _| x);
            assert!(found.rows.iter().chain(&found.columns).all(|factor| factor.is_finite() && *factor > 0.0));
        }
    }
}
