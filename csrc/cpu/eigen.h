// Eigenvalues and eigenvectors of a symmetric matrix: Householder tridiagonalization, then QL with implicit shifts
// (Golub and Van Loan, Matrix Computations, section 8.3). Rows are what all loops run along. LAPACK's would do but for
// its bits, which depend on the number of threads and on how the matrix is aligned. Included by kernels.cpp.

// y += factor x, doubles.
inline void add_double(double factor, const double* x, int64_t count, double* y) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

inline double inner_double(const double* x, const double* y, int64_t count) {
  double part[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int64_t j = 0; j < 8; ++j) part[j] += x[i + j] * y[i + j];
  for (; i < count; ++i) part[0] += x[i] * y[i];
  return ((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7]));
}

// H [n, n] -> its tridiagonal form Q^T H Q: `diagonal` [n], `beside` [n - 1], and Q^T in `rows` [n, n]. H is used up.
void tridiagonalize(double* H, int64_t n, double* diagonal, double* beside, double* rows, double* work) {
  // Reflection k, 1 - factor v v^T, leaves only the first of H[k+1.., k]; its v stays in row k of H.
  for (int64_t k = 0; k + 2 < n; ++k) {
    const int64_t length = n - k - 1;
    double* const v = H + k * n + k + 1;
    double largest = 0;
    for (int64_t i = 0; i < length; ++i) largest = fmax(largest, fabs(v[i]));
    diagonal[k] = H[k * n + k];
    if (largest == 0) {
      beside[k] = H[k * n + k] = 0;  // the factor takes the diagonal's place
      continue;
    }
    for (int64_t i = 0; i < length; ++i) v[i] /= largest;
    const double norm = copysign(sqrt(inner_double(v, v, length)), v[0]);
    beside[k] = -norm * largest;
    v[0] += norm;
    const double factor = 1 / (norm * v[0]);  // 2 / v.v
    H[k * n + k] = factor;
    double* const w = work;
    for (int64_t i = 0; i < length; ++i) w[i] = factor * inner_double(H + (k + 1 + i) * n + k + 1, v, length);
    add_double(-0.5 * factor * inner_double(w, v, length), v, length, w);
    for (int64_t i = 0; i < length; ++i) {
      double* const row = H + (k + 1 + i) * n + k + 1;
      const double vi = v[i], wi = w[i];
      for (int64_t j = 0; j < length; ++j) row[j] -= vi * w[j] + wi * v[j];
    }
  }
  for (int64_t k = n > 2 ? n - 2 : 0; k < n; ++k) {
    diagonal[k] = H[k * n + k];
    if (k + 1 < n) beside[k] = H[k * n + k + 1];
  }
  // Q^T = (product of the reflections)^T, from the last one, which touches the fewest rows.
  for (int64_t i = 0; i < n * n; ++i) rows[i] = 0;
  for (int64_t i = 0; i < n; ++i) rows[i * n + i] = 1;
  for (int64_t k = n - 3; k >= 0; --k) {
    const int64_t length = n - k - 1;
    const double* const v = H + k * n + k + 1;
    // Row i of Q^T is a column of Q, whose elements k+1.. are reflected.
    for (int64_t i = k + 1; i < n; ++i) {
      double* const row = rows + i * n + k + 1;
      add_double(-H[k * n + k] * inner_double(row, v, length), v, length, row);
    }
  }
}

// The eigenvalues replace `diagonal`, and eigenvectors the `rows` of Q^T. False, with what was reached, after 60 steps
// for one value.
bool diagonalize(double* diagonal, double* beside, int64_t n, double* rows) {
  bool converged = true;
  double norm = 0;
  for (int64_t i = 0; i < n; ++i) norm = fmax(norm, fabs(diagonal[i]));
  // The matrix itself is known no better. Where it is singular, its smallest entries are rounding that would never
  // become small beside their neighbours.
  const double negligible = DBL_EPSILON * norm;
  for (int64_t l = 0; l < n; ++l) {
    for (int step = 0;; ++step) {
      int64_t m = l;
      for (; m + 1 < n; ++m)
        if (fabs(beside[m]) <= DBL_EPSILON * (fabs(diagonal[m]) + fabs(diagonal[m + 1])) + negligible) break;
      if (m == l) break;
      if (step == 60) {
        converged = false;
        break;
      }
      // Wilkinson's shift.
      double g = (diagonal[l + 1] - diagonal[l]) / (2 * beside[l]);
      double r = hypot(g, 1.0);
      g = diagonal[m] - diagonal[l] + beside[l] / (g + copysign(r, g));
      double s = 1, c = 1, p = 0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        double f = s * beside[i];
        const double b = c * beside[i];
        r = sqrt(f * f + g * g);
        if (i + 1 < m) beside[i + 1] = r;
        if (r == 0) {  // the rotation has decoupled the matrix
          diagonal[i + 1] -= p;
          break;
        }
        s = f / r;
        c = g / r;
        g = diagonal[i + 1] - p;
        r = (diagonal[i] - g) * s + 2 * c * b;
        p = s * r;
        diagonal[i + 1] = g + p;
        g = c * r - b;
        double *const upper = rows + i * n, *const lower = upper + n;
        for (int64_t j = 0; j < n; ++j) {
          const double u = upper[j], v = lower[j];
          lower[j] = s * u + c * v;
          upper[j] = c * u - s * v;
        }
      }
      if (m + 1 < n) beside[m] = 0;
      if (r == 0 && i >= l) continue;
      diagonal[l] -= p;
      beside[l] = g;
    }
  }
  return converged;
}
