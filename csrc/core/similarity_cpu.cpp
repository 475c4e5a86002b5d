// SPDX-License-Identifier: Apache-2.0
//
// Norms of keys, and cosines with pivot rows. Rows are taken in blocks that one thread processes in one order, so results do not depend
// on the threads.
#include <algorithm>
#include <cmath>
#include <memory>

#include "kernels.h"
#include "ops.h"
#include "thread_pool.h"

namespace v2drop {
namespace {

constexpr int64_t kBytesOfBlock = 256 << 10;  // of one head or entry: a block is still in the cache when it is read again

int64_t block_rows(int64_t rows, int64_t row_bytes) {
  return std::max<int64_t>(1, std::min(rows, kBytesOfBlock / std::max<int64_t>(1, row_bytes)));
}

}  // namespace
namespace cpu {

void key_norm(const NormRequest& request, const v2drop_context& context) {
  const HeadRows& keys = request.k;
  const AddNorms add = kernels().add_norms[request.norm][keys.dtype];
  const int64_t block = block_rows(keys.rows, keys.dim * kDtypeBytes[keys.dtype]), blocks = (keys.rows + block - 1) / block;
  const std::unique_ptr<float[]> sums(new float[static_cast<size_t>(keys.batch * keys.rows)]());
  parallel_for(keys.batch * blocks, useful_threads(context.threads, keys.bytes()), [&](int64_t item) {
    const int64_t b = item / blocks, first = item % blocks * block, n = std::min(block, keys.rows - first);
    float* to = sums.get() + b * keys.rows + first;
    for (int64_t h = 0; h < keys.heads; ++h) add(keys.at(b, h, first), keys.row_stride, n, keys.dim, to);
    for (int64_t i = 0; i < n; ++i) {
      const float score = request.norm == V2DROP_L2 ? std::sqrt(to[i]) : to[i];
      __builtin_memcpy(request.scores.at(b, first + i), &score, sizeof score);
    }
  });
}

void cosine_to_pivots(const PivotsRequest& p, const v2drop_context& context) {
  const RowView& rows = p.x;
  const int64_t n_pivots = p.pivots.rows, pitch = wide_dim(rows.dim);

  // Pivots as floats, and their norms; all zeros where there is none.
  const Kernels& k = kernels();
  const std::unique_ptr<float[]> wide(new float[static_cast<size_t>(rows.batch * n_pivots * pitch)]());
  const std::unique_ptr<double[]> norms(new double[static_cast<size_t>(rows.batch * n_pivots)]());
  for (int64_t b = 0; b < rows.batch; ++b) {
    for (int64_t i = 0; i < n_pivots; ++i) {
      int64_t pivot;
      __builtin_memcpy(&pivot, p.pivots.at(b, i), sizeof pivot);
      if (pivot < 0 || pivot >= rows.rows) continue;
      double* norm = norms.get() + b * n_pivots + i;
      k.widen_row[rows.dtype](rows.at(b, pivot), rows.dim, wide.get() + (b * n_pivots + i) * pitch);
      k.wide_squares[rows.dtype](rows.at(b, pivot), 0, 1, rows.dim, norm);
      *norm = std::sqrt(*norm);
    }
  }
  constexpr int64_t kRows = 64, kVectors = 8;  // products of a step
  const int64_t block = std::min(kRows, block_rows(rows.rows, rows.dim * kDtypeBytes[rows.dtype]));
  const int64_t blocks = (rows.rows + block - 1) / block;
  parallel_for(rows.batch * blocks, useful_threads(context.threads, rows.bytes()), [&](int64_t item) {
    const int64_t b = item / blocks, first = item % blocks * block, n = std::min(block, rows.rows - first);
    const char* at = rows.at(b, first);
    double own[kRows], products[kVectors * kRows];
    k.wide_squares[rows.dtype](at, rows.row_stride, n, rows.dim, own);
    for (int64_t i = 0; i < n; ++i) own[i] = std::sqrt(own[i]);
    for (int64_t v = 0; v < n_pivots; ++v) {
      if (v % kVectors == 0) {
        k.wide_dots[rows.dtype](at, rows.row_stride, n, wide.get() + (b * n_pivots + v) * pitch, std::min(kVectors, n_pivots - v), rows.dim,
                                products, kRows);
      }
      const double norm = norms[static_cast<size_t>(b * n_pivots + v)], *product = products + v % kVectors * kRows;
      float* to = reinterpret_cast<float*>(p.cosines.at(b, v)) + first;
      for (int64_t i = 0; i < n; ++i) to[i] = norm == 0 || own[i] == 0 ? 0.0f : static_cast<float>(product[i] / (own[i] * norm));
    }
  });
}

}  // namespace cpu
}  // namespace v2drop
