// SPDX-License-Identifier: Apache-2.0
//
// Compaction moves bytes: every part is reduced to planes of rows with some contiguous bytes each, whatever its dtype and layout, and all
// parts of a call share one parallel loop. All offsets are 64-bit (csrc/tests/ moves rows that lie more than 2^32 bytes apart).
#include "ops.h"
#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace v2drop {
namespace {

constexpr int64_t kBytesPerChunk = 128 << 10;

// Results larger than this are written past the cache: they would not stay in it, and would evict what is there.
int64_t streaming_bytes() {
  static const int64_t bytes = [] {
    long cache = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return std::max<int64_t>(cache, 16 << 20) / 4;
  }();
  return bytes;
}

template <class Item>
void gather_items(const Copy& copy, const Copy::Plane& plane, const int64_t* keep, int64_t begin, int64_t end) {
  Item fill;
  std::memcpy(&fill, copy.fill, sizeof fill);
  for (int64_t i = begin; i < end; ++i) {
    Item item = fill;
    if (keep[i] >= 0) std::memcpy(&item, plane.src + keep[i] * copy.src_row, sizeof item);
    std::memcpy(plane.dst + i * copy.dst_row, &item, sizeof item);
  }
}

void fill_row(const Copy& copy, char* to) {
  for (int64_t i = 0; i < copy.inner; i += 16) std::memcpy(to + i, copy.fill, static_cast<size_t>(std::min<int64_t>(16, copy.inner - i)));
}

// How many rows from i on are neighbours in both tensors, so that one copy moves them.
int64_t run_length(const Copy& copy, const int64_t* keep, int64_t i, int64_t end) {
  int64_t n = 1;
  if (copy.src_row == copy.inner && copy.dst_row == copy.inner) {
    while (i + n < end && keep[i + n] == keep[i] + n) ++n;
  }
  return n;
}

void gather_rows(const Copy& copy, const Copy::Plane& plane, const int64_t* keep, int64_t begin, int64_t end, bool past_cache) {
  for (int64_t i = begin; i < end;) {
    char* to = plane.dst + i * copy.dst_row;
    if (keep[i] < 0) {
      fill_row(copy, to);
      ++i;
      continue;
    }
    const int64_t n = run_length(copy, keep, i, end);
    const char* from = plane.src + keep[i] * copy.src_row;
    const size_t bytes = static_cast<size_t>(n * copy.inner);
    past_cache ? kernels().copy_past_cache(to, from, bytes) : static_cast<void>(std::memcpy(to, from, bytes));
    i += n;
  }
}

struct Item16 {
  char bytes[16];
};

void gather_chunk(const Copy& copy, const Copy::Plane& plane, const int64_t* keep, int64_t begin, int64_t end, bool past_cache) {
  switch (copy.inner) {
    case 1:
      return gather_items<uint8_t>(copy, plane, keep, begin, end);
    case 2:
      return gather_items<uint16_t>(copy, plane, keep, begin, end);
    case 4:
      return gather_items<uint32_t>(copy, plane, keep, begin, end);
    case 8:
      return gather_items<uint64_t>(copy, plane, keep, begin, end);
    case 16:
      return gather_items<Item16>(copy, plane, keep, begin, end);
    default:
      return gather_rows(copy, plane, keep, begin, end, past_cache);
  }
}

// The rows of one plane move to the front, all or a slice of their bytes. Row i never lies behind its source, so going forward is safe.
void move_to_front(const Copy& copy, char* plane, const Keep& keep, int64_t entry, int64_t first_byte, int64_t bytes) {
  const int64_t* rows = keep.data + entry * keep.count;
  const bool whole_rows = bytes == copy.inner && copy.src_row == copy.inner;
  int64_t to = 0;
  for (int64_t i = 0; i < keep.count;) {
    if (rows[i] < 0) {
      ++i;
      continue;
    }
    int64_t n = 1;
    while (whole_rows && i + n < keep.count && rows[i + n] == rows[i] + n) ++n;
    if (rows[i] != to) {
      std::memmove(plane + to * copy.src_row + first_byte, plane + rows[i] * copy.src_row + first_byte, static_cast<size_t>(n * bytes));
    }
    to += n;
    i += n;
  }
}

Copy check_part(const char* name, const v2drop_part& part, int64_t batch, int64_t src_rows, int64_t dst_rows, bool in_place) {
  char src_name[64], dst_name[64];
  std::snprintf(src_name, sizeof src_name, "%s.src", name);
  std::snprintf(dst_name, sizeof dst_name, "%s.dst", name);
  const v2drop_tensor &src = part.src, &dst = in_place ? part.src : part.dst;
  check_tensor(src_name, &src);
  check_tensor(dst_name, &dst);
  check_writable(in_place ? src_name : dst_name, dst);
  if (src.dtype != dst.dtype) fail("%s: has dtype code %d, but src has %d", dst_name, dst.dtype, src.dtype);
  if (src.ndim != dst.ndim) fail("%s: has %d dimensions, but src has %d", dst_name, dst.ndim, src.ndim);
  const int row_dim = part.row_dim, batch_dim = part.batch_dim;
  if (row_dim < 0 || row_dim >= src.ndim) fail("%s.row_dim: is %d, not in 0..%d", name, row_dim, src.ndim - 1);
  if (batch_dim < -1 || batch_dim >= src.ndim || batch_dim == row_dim)
    fail("%s.batch_dim: is %d, not -1 or another dimension", name, batch_dim);
  const int64_t entries = batch_dim < 0 ? 1 : src.shape[batch_dim];
  if (entries != batch) fail("%s: has %" PRId64 " batch entries, but there are %" PRId64, src_name, entries, batch);
  if (src_rows >= 0 && src.shape[row_dim] != src_rows) {
    fail("%s: has %" PRId64 " rows, but must have %" PRId64, src_name, src.shape[row_dim], src_rows);
  }
  if (!in_place && dst.shape[row_dim] != dst_rows) {
    fail("%s: has %" PRId64 " rows, but must have %" PRId64, dst_name, dst.shape[row_dim], dst_rows);
  }
  for (int d = 0; d < src.ndim; ++d) {
    if (d != row_dim && src.shape[d] != dst.shape[d]) {
      fail("%s: has extent %" PRId64 " in dimension %d, but src has %" PRId64, dst_name, dst.shape[d], d, src.shape[d]);
    }
  }

  const int64_t item = kDtypeBytes[src.dtype];
  Copy copy = {};
  copy.src = static_cast<char*>(src.data);
  copy.dst = static_cast<char*>(dst.data);
  copy.src_rows = src.shape[row_dim];
  copy.dst_rows = dst.shape[row_dim];
  copy.src_row = copy.src_rows > 1 ? src.stride[row_dim] * item : 0;
  copy.dst_row = copy.dst_rows > 1 ? dst.stride[row_dim] * item : 0;
  copy.inner = item;
  copy.planes = 1;
  int d = src.ndim - 1;
  for (; d > row_dim && d != batch_dim; --d) {
    if (src.shape[d] == 1) continue;
    if (src.stride[d] * item != copy.inner || dst.stride[d] * item != copy.inner) break;
    copy.inner *= src.shape[d];
  }
  for (; d >= 0; --d) {
    if (d == row_dim || src.shape[d] == 1) continue;
    copy.dims[copy.n_dims++] = {src.shape[d], src.stride[d] * item, dst.stride[d] * item, d == batch_dim};
    copy.planes *= src.shape[d];
  }
  if (copy.inner == 0) copy.planes = 0;
  const int64_t low = part.fill, high = low < 0 ? -1 : 0;  // an element of 16 bytes gets the sign extended
  char wide[16];
  std::memcpy(wide, &low, 8);
  std::memcpy(wide + 8, &high, 8);
  for (int64_t i = 0; i < 16; i += item) std::memcpy(copy.fill + i, wide, static_cast<size_t>(item));
  return copy;
}

// Chunks of several copies, numbered through.
class Chunks {
 public:
  void add(int64_t count) { ends_.push_back(total() + count); }
  int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }
  // The copy that a chunk belongs to; the chunk becomes its number there.
  size_t find(int64_t* chunk) const {
    const size_t c = static_cast<size_t>(std::upper_bound(ends_.begin(), ends_.end(), *chunk) - ends_.begin());
    if (c > 0) *chunk -= ends_[c - 1];
    return c;
  }

 private:
  std::vector<int64_t> ends_;
};

void check_indices(const Keep& keep, const std::vector<Copy>& copies, bool ascending) {
  int64_t rows = INT64_MAX;
  for (const Copy& copy : copies) rows = std::min(rows, copy.src_rows);
  for (int64_t b = 0; b < keep.batch; ++b) {
    int64_t last = -1;
    for (int64_t i = 0; i < keep.count; ++i) {
      const int64_t row = keep.data[b * keep.count + i];
      if (row >= rows) fail("keep: index %" PRId64 " at [%" PRId64 ", %" PRId64 "] is outside the %" PRId64 " rows", row, b, i, rows);
      if (!ascending || row < 0) continue;
      if (row <= last)
        fail("keep: index %" PRId64 " at [%" PRId64 ", %" PRId64 "] does not ascend, %" PRId64 " came before", row, b, i, last);
      last = row;
    }
  }
}

// The inverse of keep: the output row of every input row, -1 where it was dropped.
std::vector<int64_t> invert(const Keep& keep, int64_t rows) {
  std::vector<int64_t> inverse(static_cast<size_t>(keep.batch * rows), -1);
  for (int64_t b = 0; b < keep.batch; ++b) {
    for (int64_t i = 0; i < keep.count; ++i) {
      const int64_t row = keep.data[b * keep.count + i];
      if (row < 0) continue;
      if (row >= rows) fail("keep: index %" PRId64 " at [%" PRId64 ", %" PRId64 "] is outside the %" PRId64 " rows", row, b, i, rows);
      int64_t& to = inverse[static_cast<size_t>(b * rows + row)];
      if (to >= 0) fail("keep: index %" PRId64 " at [%" PRId64 ", %" PRId64 "] occurs twice", row, b, i);
      to = i;
    }
  }
  return inverse;
}

}  // namespace

Copy::Plane Copy::plane(int64_t index) const {
  Plane plane = {src, dst, 0};
  for (int d = 0; d < n_dims; ++d) {
    const int64_t i = index % dims[d].size;
    index /= dims[d].size;
    plane.src += i * dims[d].src;
    plane.dst += i * dims[d].dst;
    if (dims[d].is_batch) plane.entry = i;
  }
  return plane;
}

Keep check_keep(const v2drop_tensor* keep) {
  const Rows view = check_rows("keep", keep, false);
  check_dtype("keep", *keep, V2DROP_INT64, "int64");
  check_contiguous("keep", *keep);
  return {reinterpret_cast<int64_t*>(view.data), view.batch, view.rows};
}

std::vector<Copy> check_parts(const v2drop_part* parts, int64_t n_parts, int64_t batch, int64_t src_rows, int64_t dst_rows, bool in_place) {
  if (n_parts < 0) fail("n_parts: must not be negative, got %" PRId64, n_parts);
  if (n_parts > 0 && !parts) fail("parts: is NULL");
  std::vector<Copy> copies;
  copies.reserve(static_cast<size_t>(n_parts));
  for (int64_t p = 0; p < n_parts; ++p) {
    char name[40];
    std::snprintf(name, sizeof name, "parts[%" PRId64 "]", p);
    copies.push_back(check_part(name, parts[p], batch, src_rows, dst_rows, in_place));
  }
  return copies;
}

void gather(const Keep& keep, const std::vector<Copy>& copies, int32_t threads) {
  Chunks chunks;
  int64_t bytes = 0;
  const auto rows_per_chunk = [&](const Copy& copy) { return std::max<int64_t>(1, kBytesPerChunk / std::max<int64_t>(1, copy.inner)); };
  for (const Copy& copy : copies) {
    bytes += copy.planes * copy.dst_rows * copy.inner;
    chunks.add(copy.planes * ((copy.dst_rows + rows_per_chunk(copy) - 1) / rows_per_chunk(copy)));
  }
  const bool past_cache = bytes > streaming_bytes();
  parallel_for(chunks.total(), useful_threads(threads, 2 * bytes), [&](int64_t chunk) {
    const Copy& copy = copies[chunks.find(&chunk)];
    const int64_t rows = rows_per_chunk(copy), per_plane = (copy.dst_rows + rows - 1) / rows;
    const Copy::Plane plane = copy.plane(chunk / per_plane);
    const int64_t begin = chunk % per_plane * rows, end = std::min(copy.dst_rows, begin + rows);
    gather_chunk(copy, plane, keep.data + plane.entry * keep.count, begin, end, past_cache);
    if (past_cache) kernels().store_fence();
  });
}

}  // namespace v2drop

using namespace v2drop;

v2drop_status v2drop_compact(const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts, int32_t threads) {
  return guard([&] {
    const Keep rows = check_keep(keep);
    const std::vector<Copy> copies = check_parts(parts, n_parts, rows.batch, -1, rows.count, false);
    check_threads(threads);
    check_indices(rows, copies, false);
    gather(rows, copies, threads);
  });
}

v2drop_status v2drop_compact_backward(const v2drop_tensor* keep, int64_t rows, const v2drop_part* parts, int64_t n_parts, int32_t threads) {
  return guard([&] {
    const Keep kept = check_keep(keep);
    int64_t total;
    if (rows < 0 || __builtin_mul_overflow(kept.batch, rows, &total)) fail("rows: is %" PRId64, rows);
    const std::vector<Copy> copies = check_parts(parts, n_parts, kept.batch, kept.count, rows, false);
    check_threads(threads);
    std::vector<int64_t> inverse = invert(kept, rows);
    gather({inverse.data(), kept.batch, rows}, copies, threads);
  });
}

v2drop_status v2drop_compact_inplace(const v2drop_tensor* keep, const v2drop_part* parts, int64_t n_parts, int32_t threads) {
  return guard([&] {
    const Keep rows = check_keep(keep);
    const std::vector<Copy> copies = check_parts(parts, n_parts, rows.batch, -1, -1, true);
    check_threads(threads);
    check_indices(rows, copies, true);

    int64_t bytes = 0;
    for (const Copy& copy : copies) bytes += 2 * copy.planes * std::min(rows.count, copy.src_rows) * copy.inner;
    const int useful = useful_threads(threads, bytes);
    // The rows of a plane move one after the other. With fewer planes than threads, each thread moves a slice of every row.
    const auto slices = [&](const Copy& copy) {
      return copy.planes >= useful ? 1 : std::max<int64_t>(1, std::min<int64_t>(useful, copy.inner / 1024));
    };
    Chunks chunks;
    for (const Copy& copy : copies) chunks.add(copy.planes * slices(copy));
    parallel_for(chunks.total(), useful, [&](int64_t chunk) {
      const Copy& copy = copies[chunks.find(&chunk)];
      const Copy::Plane plane = copy.plane(chunk / slices(copy));
      const int64_t slice = chunk % slices(copy), begin = copy.inner * slice / slices(copy), end = copy.inner * (slice + 1) / slices(copy);
      move_to_front(copy, plane.src, rows, plane.entry, begin, end - begin);
    });
  });
}
