//! Matrix products on all cores.
//!
//! One shape of product carries the whole decoder: `AᵀB` with `A: [k, m]` and `B: [k, n]`, both
//! contiguous along `k`. A linear layer is that (`A` its weight, `B` a token per column), and so
//! are attention's scores. Matrices are nalgebra's, the kernel underneath is faer's: up to twice as
//! fast as nalgebra's on one core. `A` is read transposed in place, and the rows or columns of the
//! result are shared out over the cores. With few columns the blocked kernel would spend its time
//! packing `A`, and plain dot products are faster: that is decoding.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// A number that matrices are made of: f32 or f64.
pub trait Real: nalgebra::RealField + faer::traits::ComplexField + Copy {}

impl Real for f32 {}
impl Real for f64 {}

/// A product of which any side is no longer than this is made of dot products.
const FEW: usize = 6;
/// Products of fewer multiply-adds than this stay on one core.
const SHARE_OUT: usize = 1 << 17;
/// No core is given fewer rows or columns of a result than this: the blocked kernel needs some to
/// work on.
const LEAST: usize = 16;

/// `AᵀB`, `[m, n]`, of `a: [k, m]` and `b: [k, n]`.
///
/// # Panics
/// Where the two differ in `k`.
pub fn tr_product<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>) -> DMatrix<T> {
    let mut y = DMatrix::zeros(a.ncols(), b.ncols());
    tr_product_into(a, b, y.as_view_mut());
    y
}

/// [`tr_product`] into `y: [m, n]`.
///
/// # Panics
/// Where the shapes do not fit.
pub fn tr_product_into<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>, y: DMatrixViewMut<'_, T>) {
    assert_eq!((a.nrows(), y.shape()), (b.nrows(), (a.ncols(), b.ncols())), "the shapes of a product");
    // The longer side of the result is shared out: each core packs all of the other operand.
    let block = |side: usize, other: usize| (SHARE_OUT / other.max(1) + LEAST).max(side.div_ceil(4 * rayon::current_num_threads()));
    if b.ncols() > a.ncols() {
        share_columns(a, b, y, block(b.ncols(), a.len()));
    } else {
        share_rows(a, b, y, block(a.ncols(), b.len()));
    }
}

/// `AB`, `[m, n]`, of `a: [m, k]` and `b: [k, n]`.
///
/// The columns of the result are shared out over the cores. A few are made on one, as attention has
/// it of one token, whose heads are shared out.
///
/// # Panics
/// Where the two differ in `k`.
pub fn product<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>) -> DMatrix<T> {
    assert_eq!(a.ncols(), b.nrows(), "the shapes of a product");
    let mut y = DMatrix::zeros(a.nrows(), b.ncols());
    share_out(a, b, &mut y, Accum::Replace);
    y
}

/// Shares the columns of the result out.
fn share_out<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>, y: &mut DMatrix<T>, accum: Accum) {
    let block = b.ncols().div_ceil(rayon::current_num_threads()).max(LEAST);
    y.as_mut_slice().par_chunks_mut((a.nrows() * block).max(1)).enumerate().for_each(|(index, columns)| {
        let count = columns.len() / a.nrows();
        let (b, mut y) = (b.columns(index * block, count), DMatrixViewMut::from_slice(columns, a.nrows(), count));
        if count > FEW {
            return multiply_blocked(view(&a), view(&b), y, accum);
        }
        if let Accum::Replace = accum {
            y.fill(T::zero());
        }
        Arch::new().dispatch(Combine { a, b, y });
    });
}

/// `Y + AB`, into `y: [m, n]`, of `a: [m, k]` and `b: [k, n]`.
///
/// # Panics
/// Where the shapes do not fit.
pub fn add_product<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>, y: &mut DMatrix<T>) {
    assert_eq!((a.ncols(), y.shape()), (b.nrows(), (a.nrows(), b.ncols())), "the shapes of a product");
    share_out(a, b, y, Accum::Add);
}

/// `AᵀB`, `[m, n]`, of `b: [k, n]` and an `A` of `[k, m]` that is made as it is needed.
///
/// `columns` makes those from a column on, for as many as there is room; there is none for more
/// than `tile`.
///
/// # Panics
/// Where the shapes do not fit.
pub fn tr_product_by([k, m]: [usize; 2], tile: usize, columns: impl Fn(usize, &mut [f32]) + Sync, b: DMatrixView<'_, f32>) -> DMatrix<f32> {
    assert_eq!(k, b.nrows(), "the shapes of a product");
    let mut y = DMatrix::zeros(m, b.ncols());
    share_tiles(b, 0, y.as_view_mut(), tile.max(1), &columns);
    y
}

/// Halves the rows of the result down to `tile` of them, which begin with row `first` of the whole.
fn share_tiles(b: DMatrixView<'_, f32>, first: usize, mut y: DMatrixViewMut<'_, f32>, tile: usize, columns: &(impl Fn(usize, &mut [f32]) + Sync)) {
    let rows = y.nrows();
    if rows > tile {
        let half = (rows / 2).next_multiple_of(tile);
        let (top, bottom) = y.rows_range_pair_mut(..half, half..);
        rayon::join(|| share_tiles(b, first, top, tile, columns), || share_tiles(b, first + half, bottom, tile, columns));
    } else {
        let mut a = vec![0.0; b.nrows() * rows];
        columns(first, &mut a);
        multiply(DMatrixView::from_slice(&a, b.nrows(), rows), b, y);
    }
}

/// `XYᵀ`, `[d, e]`, of `x: [d, n]` and `y: [e, n]`: the sum over columns of their outer products.
///
/// # Panics
/// Where the two differ in `n`.
pub fn outer_products<T: Real>(x: &DMatrix<T>, y: &DMatrix<T>) -> DMatrix<T> {
    tr_product(x.transpose().as_view(), y.transpose().as_view())
}

/// `XXᵀ`, `[d, d]`, of `x: [d, n]`, exactly symmetric.
pub fn gram<T: Real>(x: &DMatrix<T>) -> DMatrix<T> {
    let columns = x.transpose();
    let mut y = tr_product(columns.as_view(), columns.as_view());
    y.fill_upper_triangle_with_lower_triangle();
    y
}

/// Halves the rows of the result, and with them the columns of `a`, down to `block` of them.
fn share_rows<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>, mut y: DMatrixViewMut<'_, T>, block: usize) {
    let rows = y.nrows();
    if rows <= block {
        return multiply(a, b, y);
    }
    let half = rows / 2;
    let (top, bottom) = y.rows_range_pair_mut(..half, half..);
    rayon::join(|| share_rows(a.columns(0, half), b, top, block), || share_rows(a.columns(half, rows - half), b, bottom, block));
}

/// Halves the columns of the result, which are those of `b`.
fn share_columns<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>, mut y: DMatrixViewMut<'_, T>, block: usize) {
    let columns = y.ncols();
    if columns <= block {
        return multiply(a, b, y);
    }
    let half = columns / 2;
    let (left, right) = y.columns_range_pair_mut(..half, half..);
    rayon::join(|| share_columns(a, b.columns(0, half), left, block), || share_columns(a, b.columns(half, columns - half), right, block));
}

/// On one core.
fn multiply<T: Real>(a: DMatrixView<'_, T>, b: DMatrixView<'_, T>, mut y: DMatrixViewMut<'_, T>) {
    if y.nrows() > FEW && a.nrows() > FEW && b.ncols() > FEW {
        multiply_blocked(view(&a).transpose(), view(&b), y, Accum::Replace);
    } else {
        Arch::new().dispatch(Dots { a, b, y: y.as_view_mut() });
    }
}

/// `AᵀB` by dot products, compiled for every instruction set.
struct Dots<'a, T> {
    a: DMatrixView<'a, T>,
    b: DMatrixView<'a, T>,
    y: DMatrixViewMut<'a, T>,
}

impl<T: Real> WithSimd for Dots<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Dots { a, b, mut y } = self;
        for (j, column) in b.column_iter().enumerate() {
            let column = column.as_slice();
            for (i, row) in a.column_iter().enumerate() {
                y[(i, j)] = dot(row.as_slice(), column);
            }
        }
    }
}

/// `Y + AB` of few columns, as combinations of those of `A`, compiled for every instruction set.
struct Combine<'a, T> {
    a: DMatrixView<'a, T>,
    b: DMatrixView<'a, T>,
    y: DMatrixViewMut<'a, T>,
}

impl<T: Real> WithSimd for Combine<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Combine { a, b, mut y } = self;
        for (mut y, weights) in y.column_iter_mut().zip(b.column_iter()) {
            let y = y.as_mut_slice();
            for (column, &weight) in a.column_iter().zip(weights.as_slice()) {
                y.iter_mut().zip(column.as_slice()).for_each(|(y, &x)| *y += weight * x);
            }
        }
    }
}

/// faer's blocked kernel, for the instruction set at hand.
fn multiply_blocked<T: Real>(a: MatRef<'_, T>, b: MatRef<'_, T>, mut y: DMatrixViewMut<'_, T>, accum: Accum) {
    let ((rows, columns), (_, stride)) = (y.shape(), y.strides());
    // SAFETY: the same elements, borrowed as long: columns of `rows` numbers each, `stride` apart.
    let y = unsafe { MatMut::from_raw_parts_mut(y.as_mut_ptr(), rows, columns, 1, stride as isize) };
    matmul(y, accum, a, b, T::one(), Par::Seq);
}

/// A view, as faer sees it.
fn view<'a, T: Real>(a: &'a DMatrixView<'_, T>) -> MatRef<'a, T> {
    let ((rows, columns), (_, stride)) = (a.shape(), a.strides());
    // SAFETY: the same elements, borrowed as long: columns of `rows` numbers each, `stride` apart.
    unsafe { MatRef::from_raw_parts(a.as_ptr(), rows, columns, 1, stride as isize) }
}

/// The sum of products, in sixteen partial sums so that the compiler can use vectors.
#[inline(always)]
fn dot<T: Real>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::zero(); 16];
    let (a_blocks, b_blocks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail = a_blocks.remainder().iter().zip(b_blocks.remainder()).fold(T::zero(), |sum, (&x, &y)| sum + x * y);
    for (x, y) in a_blocks.zip(b_blocks) {
        for i in 0..16 {
            sums[i] += x[i] * y[i];
        }
    }
    sums.iter().fold(tail, |sum, &x| sum + x)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers without a pattern, in −1 to 1.
    fn numbers(rows: usize, columns: usize, seed: usize) -> DMatrix<f64> {
        DMatrix::from_fn(rows, columns, |i, j| (((i * 37 + j * 101 + seed * 13) as f64 * 0.731).sin() * 43758.5453).fract())
    }

    #[test]
    fn products_equal_nalgebra_on_odd_sizes_and_few_columns() {
        for (k, m, n) in [(1, 1, 1), (17, 5, 1), (64, 33, 6), (63, 700, 7), (300, 129, 40), (40, 3, 301), (5, 4, 0)] {
            let (a, b) = (numbers(k, m, 1), numbers(k, n, 2));
            let expected = a.transpose() * &b;
            assert!((tr_product(a.as_view(), b.as_view()) - &expected).amax() < 1e-12, "{k} {m} {n}");
            let single = tr_product(a.map(|x| x as f32).as_view(), b.map(|x| x as f32).as_view());
            assert!((single.map(f64::from) - &expected).amax() < 1e-4, "{k} {m} {n} in f32");
            assert!((product(a.transpose().as_view(), b.as_view()) - &expected).amax() < 1e-12, "{k} {m} {n}, not transposed");
            assert!((outer_products(&a.transpose(), &b.transpose()) - &expected).amax() < 1e-12, "{k} {m} {n}, by outer products");
        }
    }

    #[test]
    fn products_of_parts_of_matrices() {
        let (a, b) = (numbers(30, 20, 3), numbers(40, 50, 4));
        let part = tr_product(a.view((5, 2), (16, 11)), b.view((20, 7), (16, 31)));
        assert!((part - a.view((5, 2), (16, 11)).transpose() * b.view((20, 7), (16, 31))).amax() < 1e-12);
    }

    #[test]
    fn a_gram_matrix_is_the_sum_of_outer_products_and_symmetric() {
        let x = numbers(37, 90, 5);
        let sum = x.column_iter().fold(DMatrix::zeros(37, 37), |sum, column| sum + column * column.transpose());
        let gram = gram(&x);
        assert!((&gram - sum).amax() < 1e-12);
        assert_eq!(gram, gram.transpose());
    }
}
