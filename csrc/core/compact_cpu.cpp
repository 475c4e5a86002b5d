// SPDX-License-Identifier: Apache-2.0
//
// Compaction moves bytes: every tensor is reduced to planes of rows with some contiguous bytes each, whatever its dtype and layout, and
// all tensors of a call share one parallel phase. All offsets are 64-bit (csrc/tests/ moves rows that lie more than 2^32 bytes apart).
#include "kernels.h"
#include "ops.h"
#include "select_cpu.h"
#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

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

Phase gather(const Keep& keep, const std::vector<Copy>& copies, int64_t* bytes) {
  Chunks chunks;
  int64_t written = 0;
  const auto rows_per_chunk = [](const Copy& copy) { return std::max<int64_t>(1, kBytesPerChunk / std::max<int64_t>(1, copy.inner)); };
  for (const Copy& copy : copies) {
    written += copy.planes * copy.dst_rows * copy.inner;
    chunks.add(copy.planes * ((copy.dst_rows + rows_per_chunk(copy) - 1) / rows_per_chunk(copy)));
  }
  *bytes += 2 * written;
  const int64_t total = chunks.total();
  const bool past_cache = written > streaming_bytes();
  return {total, [&keep, &copies, rows_per_chunk, past_cache, chunks = std::move(chunks)](int64_t chunk) {
            const Copy& copy = copies[chunks.find(&chunk)];
            const int64_t rows = rows_per_chunk(copy), per_plane = (copy.dst_rows + rows - 1) / rows;
            const Copy::Plane plane = copy.plane(chunk / per_plane);
            const int64_t begin = chunk % per_plane * rows, end = std::min(copy.dst_rows, begin + rows);
            gather_chunk(copy, plane, keep.data + plane.entry * keep.count, begin, end, past_cache);
            if (past_cache) kernels().store_fence();
          }};
}

namespace cpu {

void compact(const CompactRequest& request, const v2drop_context& context) {
  check_indices(request.keep, request.copies, false);
  int64_t bytes = 0;
  const Phase rows = gather(request.keep, request.copies, &bytes);
  parallel({rows}, useful_threads(context.threads, bytes));
}

void compact_backward(const CompactRequest& request, const v2drop_context& context) {
  std::vector<int64_t> inverse = invert(request.keep, request.rows);
  const Keep from = {inverse.data(), request.keep.batch, request.rows};
  int64_t bytes = 0;
  const Phase rows = gather(from, request.copies, &bytes);
  parallel({rows}, useful_threads(context.threads, bytes));
}

void compact_inplace(const CompactRequest& request, const v2drop_context& context) {
  const Keep& keep = request.keep;
  check_indices(keep, request.copies, true);

  int64_t bytes = 0;
  for (const Copy& copy : request.copies) bytes += 2 * copy.planes * std::min(keep.count, copy.src_rows) * copy.inner;
  const int useful = useful_threads(context.threads, bytes);
  // The rows of a plane move one after the other. With fewer planes than threads, each thread moves a slice of every row.
  const auto slices = [&](const Copy& copy) {
    return copy.planes >= useful ? 1 : std::max<int64_t>(1, std::min<int64_t>(useful, copy.inner / 1024));
  };
  Chunks chunks;
  for (const Copy& copy : request.copies) chunks.add(copy.planes * slices(copy));
  parallel_for(chunks.total(), useful, [&](int64_t chunk) {
    const Copy& copy = request.copies[chunks.find(&chunk)];
    const Copy::Plane plane = copy.plane(chunk / slices(copy));
    const int64_t slice = chunk % slices(copy), begin = copy.inner * slice / slices(copy), end = copy.inner * (slice + 1) / slices(copy);
    move_to_front(copy, plane.src, keep, plane.entry, begin, end - begin);
  });
}

void upload(const UploadRequest& request, const v2drop_context&) {
  if (request.dtype == V2DROP_INT64) {
    std::copy_n(request.values, request.count, static_cast<int64_t*>(request.to));
  } else {
    std::transform(request.values, request.values + request.count, static_cast<int32_t*>(request.to),
                   [](int64_t value) { return static_cast<int32_t>(value); });
  }
}

}  // namespace cpu
}  // namespace v2drop
