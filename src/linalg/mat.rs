//! Small matrices of f32 that the inner loops work on: rows (query heads or queries) at a stride.

#![forbid(unsafe_code)]

/// A borrowed matrix; a row's numbers may end before the next one begins.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    /// From the first number on.
    pub data: &'a [f32],
    /// Rows.
    pub rows: usize,
    /// Distance of rows.
    pub stride: usize,
}

impl<'a> Mat<'a> {
    /// `rows` rows of `data`, `stride` apart.
    pub fn new(data: &'a [f32], rows: usize, stride: usize) -> Self {
        Self { data, rows, stride }
    }

    /// The matrix from column `column` on.
    #[must_use]
    pub fn from_column(self, column: usize) -> Self {
        Self { data: &self.data[column..], ..self }
    }

    /// The `rows` rows from row `row` on.
    #[must_use]
    pub fn part(self, row: usize, rows: usize) -> Self {
        Self { data: &self.data[row * self.stride..], rows, ..self }
    }

    /// Row `i` from the matrix' first column to the end of its stride, or of the data.
    pub fn row(self, i: usize) -> &'a [f32] {
        &self.data[i * self.stride..self.data.len().min((i + 1) * self.stride)]
    }

    /// Whether all rows have `columns` numbers.
    pub fn has_columns(self, columns: usize) -> bool {
        columns <= self.stride && (self.rows == 0 || (self.rows - 1) * self.stride + columns <= self.data.len())
    }
}

/// As [`Mat`], to be written.
pub struct MatMut<'a> {
    /// From the first number on.
    pub data: &'a mut [f32],
    /// Rows.
    pub rows: usize,
    /// Distance of rows.
    pub stride: usize,
}

impl<'a> MatMut<'a> {
    /// `rows` rows of `data`, `stride` apart.
    pub fn new(data: &'a mut [f32], rows: usize, stride: usize) -> Self {
        Self { data, rows, stride }
    }

    /// The matrix from column `column` on, for a shorter time.
    pub fn from_column(&mut self, column: usize) -> MatMut<'_> {
        MatMut { data: &mut self.data[column..], rows: self.rows, stride: self.stride }
    }

    /// The `rows` rows from row `row` on, for a shorter time.
    pub fn part(&mut self, row: usize, rows: usize) -> MatMut<'_> {
        MatMut { data: &mut self.data[row * self.stride..], rows, stride: self.stride }
    }

    /// The matrix from row `row` on, for a shorter time.
    pub fn from_row(&mut self, row: usize) -> MatMut<'_> {
        self.part(row, self.rows - row)
    }

    /// Row `i`, as [`Mat::row`].
    pub fn row(&mut self, i: usize) -> &mut [f32] {
        let end = self.data.len().min((i + 1) * self.stride);
        &mut self.data[i * self.stride..end]
    }

    /// Whether all rows have `columns` numbers.
    pub fn has_columns(&self, columns: usize) -> bool {
        Mat::new(self.data, self.rows, self.stride).has_columns(columns)
    }
}
