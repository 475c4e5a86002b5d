// SPDX-License-Identifier: Apache-2.0
//
// The argument checks of all entry points, for CPU and CUDA alike. Only what the CPU alone can see, such as the indices of `keep`, is
// checked by the CPU ops themselves.
#include "request.h"

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <utility>

#include "checks.h"
#include "kernels.h"
#include "ordinal.h"
#include "overlap.h"

namespace v2drop {
namespace {

constexpr int kDtypes = sizeof(kDtypeBytes) / sizeof(kDtypeBytes[0]);

// A struct that grows with versions, as this version has it; see "Compatibility" in v2drop.h. `first_size` is its size in version 0.1.0.
template <class T>
T check_struct(const char* name, const T* given, size_t first_size) {
  if (!given) fail("%s: is NULL", name);
  size_t size;
  std::memcpy(&size, given, sizeof size);
  constexpr size_t kLargest = 4096;  // anything larger was not initialised
  if (size < first_size || size > kLargest) fail("%s: size is %zu, which is not the sizeof of the struct in any version", name, size);
  T known = {};
  std::memcpy(&known, given, std::min(size, sizeof known));
  const char* bytes = reinterpret_cast<const char*>(given);
  for (size_t i = sizeof known; i < size; ++i) {
    if (bytes[i] == 0) continue;
    fail_with(V2DROP_ERROR_UNSUPPORTED, "%s: sets a field that is newer than this library, version %d.%d.%d", name, V2DROP_VERSION_MAJOR,
              V2DROP_VERSION_MINOR, V2DROP_VERSION_PATCH);
  }
  return known;
}

v2drop_source read_source(const v2drop_source* given) {
  return check_struct("source", given, offsetof(v2drop_source, score_dtype) + sizeof(int32_t));
}

}  // namespace

void check_tensor(const char* name, const v2drop_tensor* tensor) {
  if (!tensor) fail("%s: is NULL", name);
  if (tensor->dtype < 0 || tensor->dtype >= kDtypes) fail("%s: unknown dtype %d", name, tensor->dtype);
  if (tensor->ndim < 0 || tensor->ndim > V2DROP_MAX_DIMS) fail("%s: %d dimensions, at most %d", name, tensor->ndim, V2DROP_MAX_DIMS);
  bool empty = false, overflow = false;
  int64_t reach = kDtypeBytes[tensor->dtype], elements = reach;
  for (int d = 0; d < tensor->ndim; ++d) {
    const int64_t size = tensor->shape[d], stride = tensor->stride[d];
    if (size < 0) fail("%s: extent %" PRId64 " of dimension %d is negative", name, size, d);
    if (size == 0) {
      empty = true;
      continue;
    }
    int64_t span;
    overflow |= __builtin_mul_overflow(elements, size, &elements);
    overflow |= stride == INT64_MIN || __builtin_mul_overflow(stride < 0 ? -stride : stride, size - 1, &span) ||
                __builtin_mul_overflow(span, kDtypeBytes[tensor->dtype], &span) || __builtin_add_overflow(reach, span, &reach);
  }
  if (overflow) fail("%s: shape and strides exceed 64 bits", name);
  if (!empty && !tensor->data) fail("%s: data is NULL", name);
}

bool is_empty(const v2drop_tensor& tensor) {
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] == 0) return true;
  }
  return false;
}

void check_dtype(const char* name, const v2drop_tensor& tensor, int32_t dtype, const char* dtype_name) {
  if (tensor.dtype != dtype) fail("%s: must have dtype %s, got code %d", name, dtype_name, tensor.dtype);
}
void check_float(const char* name, const v2drop_tensor& tensor) {
  if (tensor.dtype >= kFloats) fail("%s: must be float32, float16 or bfloat16, got dtype code %d", name, tensor.dtype);
}

RowView check_rows(const char* name, const v2drop_tensor* tensor, bool has_dim) {
  check_tensor(name, tensor);
  const int lead = tensor->ndim - has_dim;
  if (lead != 1 && lead != 2) {
    fail("%s: must be %s, got %d dimensions", name, has_dim ? "[batch, rows, dim] or [rows, dim]" : "[batch, rows] or [rows]",
         tensor->ndim);
  }
  const int64_t bytes = kDtypeBytes[tensor->dtype];
  if (reinterpret_cast<uintptr_t>(tensor->data) % static_cast<uintptr_t>(bytes) != 0) fail("%s: data is not aligned to its dtype", name);
  if (has_dim && tensor->stride[lead] != 1 && tensor->shape[lead] > 1 && !is_empty(*tensor))
    fail("%s: the last dimension must have stride 1", name);
  RowView view = {static_cast<char*>(tensor->data), 1, tensor->shape[lead - 1], has_dim ? tensor->shape[lead] : 1, 0, 0, tensor->dtype};
  // An extent of one or none is never stepped over, and its stride may be anything.
  if (view.rows > 1) view.row_stride = tensor->stride[lead - 1] * bytes;
  if (lead == 2) {
    view.batch = tensor->shape[0];
    if (view.batch > 1) view.batch_stride = tensor->stride[0] * bytes;
  }
  return view;
}

void check_same_rows(const char* name, const RowView& view, const char* model_name, const RowView& model) {
  if (view.batch != model.batch || view.rows != model.rows || view.dim != model.dim) {
    fail("%s: is %" PRId64 " x %" PRId64 " x %" PRId64 ", but %s is %" PRId64 " x %" PRId64 " x %" PRId64, name, view.batch, view.rows,
         view.dim, model_name, model.batch, model.rows, model.dim);
  }
}

void check_writable(const char* name, const v2drop_tensor& tensor) {
  if (is_empty(tensor)) return;
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] == 0) fail("%s: dimension %d has stride 0, a result must not overlap itself", name, d);
  }
  if (overlaps_itself(tensor)) fail("%s: elements share memory, a result must not overlap itself", name);
}

constexpr int64_t kNoGather = -1;

// Of two tensors of a call that share memory none may be written.
void check_apart(std::initializer_list<std::pair<const char*, const v2drop_tensor*>> written,
                 std::initializer_list<std::pair<const char*, const v2drop_tensor*>> read, const v2drop_source* source = nullptr,
                 const v2drop_gather* gathers = nullptr, int64_t n_gathers = 0, bool in_place = false) {
  Regions regions(written.size() + read.size() + 4 + 2 * static_cast<size_t>(n_gathers));
  for (const auto& [name, tensor] : written) regions.written({name, kNoGather}, tensor);
  for (const auto& [name, tensor] : read) regions.read({name, kNoGather}, tensor);
  if (source) {
    regions.read({"prev", kNoGather}, source->prev);
    regions.read({"cur", kNoGather}, source->cur);
    regions.read({"scores", kNoGather}, source->scores);
    regions.read({"mask", kNoGather}, source->mask);
  }
  for (int64_t p = 0; p < n_gathers; ++p) {
    if (in_place) {
      regions.written({"src", p}, &gathers[p].src);
    } else {
      regions.read({"src", p}, &gathers[p].src);
      regions.written({"dst", p}, &gathers[p].dst);
    }
  }
  regions.check();
}

void check_contiguous(const char* name, const v2drop_tensor& tensor) {
  if (is_empty(tensor)) return;
  int64_t stride = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] != stride) fail("%s: must be contiguous", name);
    stride *= tensor.shape[d];
  }
}

namespace {

HeadRows check_heads(const char* name, const v2drop_tensor* tensor) {
  check_tensor(name, tensor);
  check_float(name, *tensor);
  if (tensor->ndim != 4) fail("%s: must be [batch, heads, rows, dim], got %d dimensions", name, tensor->ndim);
  const int64_t bytes = kDtypeBytes[tensor->dtype];
  if (reinterpret_cast<uintptr_t>(tensor->data) % static_cast<uintptr_t>(bytes) != 0) fail("%s: data is not aligned to its dtype", name);
  if (tensor->stride[3] != 1 && tensor->shape[3] > 1 && !is_empty(*tensor)) fail("%s: the last dimension must have stride 1", name);
  const auto stride = [&](int d) { return tensor->shape[d] > 1 ? tensor->stride[d] * bytes : 0; };
  return {static_cast<char*>(tensor->data),
          tensor->shape[0],
          tensor->shape[1],
          tensor->shape[2],
          tensor->shape[3],
          stride(0),
          stride(1),
          stride(2),
          tensor->dtype};
}

// One number for each of batch x rows: where scores go, or what is known of every row.
RowView check_row_values(const char* name, const v2drop_tensor* tensor, int32_t dtype, const char* dtype_name, int64_t batch,
                         int64_t rows) {
  const RowView view = check_rows(name, tensor, false);
  check_dtype(name, *tensor, dtype, dtype_name);
  if (view.batch != batch || view.rows != rows) {
    fail("%s: is %" PRId64 " x %" PRId64 ", not %" PRId64 " x %" PRId64, name, view.batch, view.rows, batch, rows);
  }
  return view;
}

void check_metric(int32_t metric) {
  if (metric < 0 || metric >= kMetrics) fail("metric: unknown code %d", metric);
}

Hidden check_hidden(const v2drop_source& source, bool rounded) {
  check_metric(source.metric);
  if (rounded && (source.score_dtype < 0 || source.score_dtype >= kFloats)) {
    fail("score_dtype: must be float32, float16 or bfloat16, got dtype code %d", source.score_dtype);
  }
  const RowView prev = check_rows("prev", source.prev, true), cur = check_rows("cur", source.cur, true);
  check_float("prev", *source.prev);
  if (prev.dtype != cur.dtype) fail("cur: has dtype code %d, but prev has %d", cur.dtype, prev.dtype);
  check_same_rows("cur", cur, "prev", prev);
  return {prev, cur, source.metric, rounded ? source.score_dtype : static_cast<int32_t>(V2DROP_FLOAT32)};
}

// The hidden states of a source that gives nothing else.
Hidden check_only_hidden(const v2drop_source* given, bool rounded) {
  const v2drop_source source = read_source(given);
  if (source.scores) fail("scores: must be NULL in the source here, they are computed");
  if (source.mask) fail("mask: must be NULL here, every row is scored");
  return check_hidden(source, rounded);
}

// One float32 for each row of `hidden`.
RowView check_scores_of(const char* name, const Hidden& hidden, const v2drop_tensor* scores) {
  const RowView view = check_rows(name, scores, false);
  check_dtype(name, *scores, V2DROP_FLOAT32, "float32");
  RowView like = hidden.prev;
  like.dim = 1;
  check_same_rows(name, view, "the score of prev", like);
  return view;
}

// `wide`: scores may be float64 as well.
ScoreSource check_source(const v2drop_source& given, int32_t masked_ordinal, bool wide = false) {
  ScoreSource source = {};
  RowView ranked;
  if (given.scores) {
    if (given.prev || given.cur) fail("%s: give either scores or prev and cur, not both", given.prev ? "prev" : "cur");
    ranked = check_rows("scores", given.scores, false);
    if (!wide || given.scores->dtype != V2DROP_FLOAT64) check_float("scores", *given.scores);
    source.has_scores = true;
    source.scores = ranked;
  } else {
    source.hidden = check_hidden(given, true);
    ranked = source.hidden.prev;
    ranked.dim = 1;
  }
  if (given.mask) {
    source.mask = check_rows("mask", given.mask, false);
    check_dtype("mask", *given.mask, V2DROP_BOOL, "bool");
    check_same_rows("mask", source.mask, given.scores ? "scores" : "the score of prev", ranked);
    source.has_mask = true;
  }
  source.masked_ordinal = masked_ordinal;
  source.batch = ranked.batch;
  source.rows = ranked.rows;
  return source;
}

// A table of segments, each within one entry of a batch of `rows` rows, with 0 <= k <= n.
void check_segments(const v2drop_segment* segments, int64_t n_segments, int64_t batch, int64_t rows) {
  if (n_segments < 0) fail("n_segments: must not be negative, got %" PRId64, n_segments);
  if (n_segments > 0 && !segments) fail("segments: is NULL");
  for (int64_t g = 0; g < n_segments; ++g) {
    const v2drop_segment& s = segments[g];
    const int64_t limit = batch * rows;  // each field is checked against what is left, so that no sum overflows
    if (s.src_start < 0 || s.src_start > limit)
      fail("segments[%" PRId64 "]: src_start %" PRId64 " is outside the %" PRId64 " rows", g, s.src_start, limit);
    const int64_t left = s.src_start == limit ? 0 : rows - s.src_start % rows;
    if (s.n_prefix < 0 || s.n < 0 || s.n_suffix < 0 || s.n_prefix > left || s.n > left - s.n_prefix ||
        s.n_suffix > left - s.n_prefix - s.n) {
      fail("segments[%" PRId64 "]: n_prefix %" PRId64 ", n %" PRId64 ", n_suffix %" PRId64 " do not fit in the %" PRId64
           " rows left in the entry",
           g, s.n_prefix, s.n, s.n_suffix, left);
    }
    if (s.k < 0 || s.k > s.n) fail("segments[%" PRId64 "]: k is %" PRId64 ", not in 0..%" PRId64, g, s.k, s.n);
  }
}

// Offsets [n_segments + 1] that only the device can read, in place of the rows of a table that then says no more than k.
const int32_t* check_cu(const char* name, const v2drop_tensor* cu, int64_t n_segments) {
  const RowView view = check_rows(name, cu, false);
  check_dtype(name, *cu, V2DROP_INT32, "int32");
  check_contiguous(name, *cu);
  if (cu->ndim != 1 || view.rows != n_segments + 1) fail("%s: must be [%" PRId64 "]", name, n_segments + 1);
  return reinterpret_cast<const int32_t*>(view.data);
}

void check_budgets(const v2drop_segment* segments, int64_t n_segments, int64_t batch) {
  if (batch != 1) fail("cu_seqlens: goes with one batch entry, but there are %" PRId64, batch);
  if (n_segments < 0) fail("n_segments: must not be negative, got %" PRId64, n_segments);
  if (n_segments > 0 && !segments) fail("segments: is NULL");
  for (int64_t g = 0; g < n_segments; ++g) {
    if (segments[g].k < 0) fail("segments[%" PRId64 "]: k is %" PRId64 ", negative", g, segments[g].k);
  }
}

// The segments must write every row of keep exactly once, each within the batch entry that it reads from.
void check_tiling(const v2drop_segment* segments, int64_t n_segments, int64_t rows, const Keep& keep) {
  int64_t next = 0;
  const int64_t limit = keep.batch * keep.count;
  for (int64_t g = 0; g < n_segments; ++g) {
    const v2drop_segment& s = segments[g];
    if (s.dst_start != next)
      fail("segments[%" PRId64 "]: dst_start is %" PRId64 ", but the rows before it end at %" PRId64, g, s.dst_start, next);
    const int64_t kept = s.n_prefix + s.k + s.n_suffix, left = next == limit ? 0 : keep.count - next % keep.count;
    if (s.pad_before < 0 || s.pad_after < 0 || s.pad_before > left || kept > left - s.pad_before ||
        s.pad_after > left - s.pad_before - kept) {
      fail("segments[%" PRId64 "]: %" PRId64 " + %" PRId64 " + %" PRId64 " output rows do not fit in the %" PRId64 " left in the entry", g,
           s.pad_before, kept, s.pad_after, left);
    }
    if (kept > 0 && s.src_start / rows != next / keep.count) fail("segments[%" PRId64 "]: reads and writes different batch entries", g);
    next += s.pad_before + kept + s.pad_after;
  }
  if (next != limit) fail("segments: give %" PRId64 " output rows, but keep has %" PRId64, next, limit);
}

Segments check_all_segments(const ScoreSource& source, const v2drop_segment* segments, int64_t n_segments, const v2drop_tensor* cu_seqlens,
                            int32_t place) {
  if (!cu_seqlens) {
    check_segments(segments, n_segments, source.batch, source.rows);
    return {segments, n_segments, nullptr};
  }
  if (place != V2DROP_CUDA) fail("cu_seqlens: must be NULL on the CPU, where the segments say which rows they have");
  check_budgets(segments, n_segments, source.batch);
  return {segments, n_segments, check_cu("cu_seqlens", cu_seqlens, n_segments)};
}

Keep check_keep(const v2drop_tensor* keep) {
  const RowView view = check_rows("keep", keep, false);
  check_dtype("keep", *keep, V2DROP_INT64, "int64");
  check_contiguous("keep", *keep);
  return {reinterpret_cast<int64_t*>(view.data), view.batch, view.rows};
}

// "gathers[7]" and what follows. By hand: snprintf for three names would take longer than the checks of a tensor.
struct GatherName {
  char text[40];
  GatherName(int64_t index, const char* suffix) {
    char digits[20];
    int n = 0;
    for (; n == 0 || index > 0; index /= 10) digits[n++] = static_cast<char>('0' + index % 10);
    char* to = append(text, "gathers[");
    while (n > 0) *to++ = digits[--n];
    *append(append(to, "]"), suffix) = 0;
  }
  static char* append(char* to, const char* from) {
    const size_t size = std::strlen(from);
    std::memcpy(to, from, size);
    return to + size;
  }
};

Copy check_gather(int64_t index, const v2drop_gather& given, int64_t batch, int64_t src_rows, int64_t dst_rows, bool in_place) {
  const GatherName name_of(index, ""), name_of_src(index, ".src"), name_of_dst(index, ".dst");
  const char *const name = name_of.text, *const src_name = name_of_src.text, *const dst_name = name_of_dst.text;
  const v2drop_tensor &src = given.src, &dst = in_place ? given.src : given.dst;
  check_tensor(src_name, &src);
  check_tensor(dst_name, &dst);
  check_writable(in_place ? src_name : dst_name, dst);
  if (src.dtype != dst.dtype) fail("%s: has dtype code %d, but src has %d", dst_name, dst.dtype, src.dtype);
  if (src.ndim != dst.ndim) fail("%s: has %d dimensions, but src has %d", dst_name, dst.ndim, src.ndim);
  const int row_dim = given.row_dim, batch_dim = given.batch_dim;
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
  const int64_t low = given.fill, high = low < 0 ? -1 : 0;  // an element of 16 bytes gets the sign extended
  char wide[16];
  std::memcpy(wide, &low, 8);
  std::memcpy(wide + 8, &high, 8);
  for (int64_t i = 0; i < 16; i += item) std::memcpy(copy.fill + i, wide, static_cast<size_t>(item));
  return copy;
}

bool same_geometry(const v2drop_tensor& a, const v2drop_tensor& b) {
  const size_t size = a.ndim < 0 ? 0 : static_cast<size_t>(a.ndim) * sizeof a.shape[0];
  return a.dtype == b.dtype && a.ndim == b.ndim && !std::memcmp(a.shape, b.shape, size) && !std::memcmp(a.stride, b.stride, size);
}

// Whether the checks of a gather find what they found for the one before it, but for its addresses: the layers of a cache are alike.
bool is_like(const v2drop_gather& a, const v2drop_gather& before) {
  return a.src.data && a.dst.data && before.src.data && before.dst.data && a.batch_dim == before.batch_dim && a.row_dim == before.row_dim &&
         a.fill == before.fill && same_geometry(a.src, before.src) && same_geometry(a.dst, before.dst);
}

// Checks gathers whose dst has dst_rows rows and whose src has src_rows (negative: any number). In place, dst is not read.
std::vector<Copy> check_gathers(const v2drop_gather* gathers, int64_t n_gathers, int64_t batch, int64_t src_rows, int64_t dst_rows,
                                bool in_place) {
  if (n_gathers < 0) fail("n_gathers: must not be negative, got %" PRId64, n_gathers);
  if (n_gathers > 0 && !gathers) fail("gathers: is NULL");
  std::vector<Copy> copies;
  copies.reserve(static_cast<size_t>(n_gathers));
  for (int64_t p = 0; p < n_gathers; ++p) {
    if (p > 0 && !in_place && is_like(gathers[p], gathers[p - 1])) {
      copies.push_back(copies.back());
      copies.back().src = static_cast<char*>(gathers[p].src.data);
      copies.back().dst = static_cast<char*>(gathers[p].dst.data);
      copies.back().like_last = true;
    } else {
      copies.push_back(check_gather(p, gathers[p], batch, src_rows, dst_rows, in_place));
    }
  }
  return copies;
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

int64_t Segments::largest() const {
  int64_t n = 0;
  for (int64_t g = 0; g < count; ++g) n = std::max(n, data[g].n);
  return n;
}

v2drop_context check_context(const v2drop_context* context) {
  if (!context) return V2DROP_CONTEXT_INIT;
  const v2drop_context known = check_struct("context", context, offsetof(v2drop_context, device_segments) + sizeof(void*));
  if (known.place != V2DROP_CPU && known.place != V2DROP_CUDA) fail("context.place: unknown code %d", known.place);
  if (known.threads < 0) fail("context.threads: must not be negative, got %d", known.threads);
  if (known.launch_mode < V2DROP_LAUNCH_AUTO || known.launch_mode > V2DROP_LAUNCH_GRID) {
    fail("context.launch_mode: unknown code %d", known.launch_mode);
  }
  if (known.reserved != 0) fail("context.reserved: must be 0, got %d", known.reserved);
  return known;
}

ScoreRequest check_score(const v2drop_source* source, const v2drop_tensor* scores) {
  const Hidden hidden = check_only_hidden(source, true);
  const RowView out = check_scores_of("scores", hidden, scores);
  check_writable("scores", *scores);
  const v2drop_source given = read_source(source);
  check_apart({{"scores", scores}}, {}, &given);
  return {hidden, out};
}

ScoreBackwardRequest check_score_backward(const v2drop_tensor* grad, const v2drop_source* source, const v2drop_tensor* grad_prev,
                                          const v2drop_tensor* grad_cur) {
  const Hidden hidden = check_only_hidden(source, false);
  const auto check_one = [&](const char* name, const v2drop_tensor* tensor) {
    if (!tensor) return RowView{};
    const RowView view = check_rows(name, tensor, true);
    check_dtype(name, *tensor, hidden.prev.dtype, "of prev");
    check_writable(name, *tensor);
    check_same_rows(name, view, "prev", hidden.prev);
    return view;
  };
  const RowView of_scores = check_scores_of("grad", hidden, grad);
  const ScoreBackwardRequest request = {hidden, of_scores, check_one("grad_prev", grad_prev), check_one("grad_cur", grad_cur)};
  const v2drop_source given = read_source(source);
  check_apart({{"grad_prev", grad_prev}, {"grad_cur", grad_cur}}, {{"grad", grad}}, &given);
  return request;
}

TopkRequest check_topk(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments, const v2drop_tensor* cu_seqlens,
                       int32_t order, const v2drop_tensor* values, const v2drop_tensor* indices, int32_t place) {
  const v2drop_source given = read_source(source);
  TopkRequest request = {};
  request.source = check_source(given, kExcluded, place == V2DROP_CPU);
  request.segments = check_all_segments(request.source, segments, n_segments, cu_seqlens, place);
  if (order != V2DROP_ORDER_POSITION && order != V2DROP_ORDER_SCORE) fail("order: unknown code %d", order);
  request.order = order;
  request.dtype = given.scores ? given.scores->dtype : static_cast<int32_t>(V2DROP_FLOAT32);
  const RowView out_values = check_rows("values", values, false), out_indices = check_rows("indices", indices, false);
  check_dtype("values", *values, request.dtype, given.scores ? "of scores" : "float32");
  check_dtype("indices", *indices, V2DROP_INT64, "int64");
  check_contiguous("values", *values);
  check_contiguous("indices", *indices);
  if (indices->ndim != 2 || out_indices.batch != n_segments) fail("indices: must be [%" PRId64 ", K]", n_segments);
  check_same_rows("values", out_values, "indices", out_indices);
  request.values = out_values.data;
  request.indices = reinterpret_cast<int64_t*>(out_indices.data);
  request.width = out_indices.rows;
  for (int64_t g = 0; g < n_segments; ++g) {
    if (segments[g].k <= request.width) continue;
    fail("indices: width %" PRId64 " is less than k %" PRId64 " of segment %" PRId64, request.width, segments[g].k, g);
  }
  check_apart({{"values", values}, {"indices", indices}}, {{"cu_seqlens", cu_seqlens}}, &given);
  return request;
}

DropRequest check_drop(const v2drop_source* source, const v2drop_segment* segments, int64_t n_segments, const v2drop_tensor* cu_seqlens,
                       const v2drop_tensor* keep, const v2drop_tensor* new_cu, const v2drop_gather* gathers, int64_t n_gathers,
                       int32_t place) {
  const v2drop_source given = read_source(source);
  DropRequest request = {};
  request.source = check_source(given, kForced);
  const ScoreSource& ranked = request.source;
  if (new_cu && !cu_seqlens) fail("new_cu: is given without cu_seqlens");
  request.segments = check_all_segments(ranked, segments, n_segments, cu_seqlens, place);
  if (cu_seqlens) {
    if (ranked.has_mask) fail("mask: does not go with cu_seqlens");
    request.new_cu = const_cast<int32_t*>(check_cu("new_cu", new_cu, n_segments));
  }
  request.keep = check_keep(keep);
  if (request.keep.batch != ranked.batch) fail("keep: has %" PRId64 " entries, but there are %" PRId64, request.keep.batch, ranked.batch);
  if (!cu_seqlens) check_tiling(segments, n_segments, ranked.rows, request.keep);
  request.copies = check_gathers(gathers, n_gathers, ranked.batch, ranked.rows, request.keep.count, false);
  check_apart({{"keep", keep}, {"new_cu", new_cu}}, {{"cu_seqlens", cu_seqlens}}, &given, gathers, n_gathers);
  return request;
}

CompactRequest check_compact(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers) {
  const Keep kept = check_keep(keep);
  CompactRequest request = {kept, 0, check_gathers(gathers, n_gathers, kept.batch, -1, kept.count, false)};
  check_apart({}, {{"keep", keep}}, nullptr, gathers, n_gathers);
  return request;
}

CompactRequest check_compact_backward(const v2drop_tensor* keep, int64_t rows, const v2drop_gather* gathers, int64_t n_gathers) {
  const Keep kept = check_keep(keep);
  int64_t total;
  if (rows < 0 || __builtin_mul_overflow(kept.batch, rows, &total)) fail("rows: is %" PRId64, rows);
  CompactRequest request = {kept, rows, check_gathers(gathers, n_gathers, kept.batch, kept.count, rows, false)};
  check_apart({}, {{"keep", keep}}, nullptr, gathers, n_gathers);
  return request;
}

CompactRequest check_compact_inplace(const v2drop_tensor* keep, const v2drop_gather* gathers, int64_t n_gathers) {
  const Keep kept = check_keep(keep);
  CompactRequest request = {kept, 0, check_gathers(gathers, n_gathers, kept.batch, -1, -1, true)};
  check_apart({}, {{"keep", keep}}, nullptr, gathers, n_gathers, true);
  return request;
}

AttentionRequest check_attention(const v2drop_tensor* q, const v2drop_tensor* k, const v2drop_tensor* query_rows,
                                 const v2drop_tensor* key_mask, const v2drop_tensor* droppable, int32_t causal, float scale, int32_t mode,
                                 int32_t heads, int32_t queries, const v2drop_tensor* scores) {
  AttentionRequest a = {check_heads("q", q), check_heads("k", k), {}, {}, {}, {}, causal != 0, mode == V2DROP_DOT, scale, heads, queries};
  if (a.k.dtype != a.q.dtype) fail("k: has dtype code %d, but q has %d", a.k.dtype, a.q.dtype);
  if (a.k.batch != a.q.batch) fail("k: has a batch of %" PRId64 ", but q has %" PRId64, a.k.batch, a.q.batch);
  if (a.k.dim != a.q.dim) fail("k: has rows of %" PRId64 " elements, but q has %" PRId64, a.k.dim, a.q.dim);
  if (a.k.heads == 0 || a.q.heads == 0 || a.q.heads % a.k.heads != 0) {
    fail("q: has %" PRId64 " heads, which is no multiple of the %" PRId64 " of k", a.q.heads, a.k.heads);
  }
  a.query_rows = check_row_values("query_rows", query_rows, V2DROP_INT64, "int64", a.q.batch, a.q.rows);
  if (key_mask) a.key_mask = check_row_values("key_mask", key_mask, V2DROP_BOOL, "bool", a.k.batch, a.k.rows);
  if (droppable) a.droppable = check_row_values("droppable", droppable, V2DROP_BOOL, "bool", a.k.batch, a.k.rows);
  if (mode != V2DROP_SOFTMAX && mode != V2DROP_DOT) fail("mode: unknown code %d", mode);
  if (heads < V2DROP_HEADS_MAX || heads > a.q.heads) {
    fail("heads: must be a v2drop_heads or a number of heads up to %" PRId64 ", got %d", a.q.heads, heads);
  }
  if (queries != V2DROP_QUERIES_MEAN && queries != V2DROP_QUERIES_L2) fail("queries: unknown code %d", queries);
  a.scores = check_row_values("scores", scores, V2DROP_FLOAT32, "float32", a.k.batch, a.k.rows);
  check_writable("scores", *scores);
  check_apart({{"scores", scores}}, {{"q", q}, {"k", k}, {"query_rows", query_rows}, {"key_mask", key_mask}, {"droppable", droppable}});
  return a;
}

NormRequest check_key_norm(const v2drop_tensor* k, int32_t norm, const v2drop_tensor* scores) {
  const HeadRows keys = check_heads("k", k);
  if (norm < 0 || norm >= kNorms) fail("norm: must be l2 or l1, got code %d", norm);
  const RowView out = check_row_values("scores", scores, V2DROP_FLOAT32, "float32", keys.batch, keys.rows);
  check_writable("scores", *scores);
  check_apart({{"scores", scores}}, {{"k", k}});
  return {keys, norm, out};
}

PivotsRequest check_pivots(const v2drop_tensor* x, const v2drop_tensor* pivots, const v2drop_tensor* cosines) {
  const PivotsRequest p = {check_rows("x", x, true), check_rows("pivots", pivots, false), check_rows("cosines", cosines, true)};
  check_float("x", *x);
  check_dtype("pivots", *pivots, V2DROP_INT64, "int64");
  if (p.pivots.batch != p.x.batch) fail("pivots: has a batch of %" PRId64 ", but x has %" PRId64, p.pivots.batch, p.x.batch);
  check_dtype("cosines", *cosines, V2DROP_FLOAT32, "float32");
  check_writable("cosines", *cosines);
  const RowView& out = p.cosines;
  if (out.batch != p.x.batch || out.rows != p.pivots.rows || out.dim != p.x.rows) {
    fail("cosines: is %" PRId64 " x %" PRId64 " x %" PRId64 ", not %" PRId64 " x %" PRId64 " x %" PRId64, out.batch, out.rows, out.dim,
         p.x.batch, p.pivots.rows, p.x.rows);
  }
  check_apart({{"cosines", cosines}}, {{"x", x}, {"pivots", pivots}});
  return p;
}

UploadRequest check_upload(const v2drop_tensor* values, const v2drop_tensor* to) {
  check_rows("values", values, false);
  check_rows("to", to, false);
  check_dtype("values", *values, V2DROP_INT64, "int64");
  if (to->dtype != V2DROP_INT64 && to->dtype != V2DROP_INT32) fail("to: must be int64 or int32, got dtype code %d", to->dtype);
  if (values->ndim != 1 || to->ndim != 1) fail("to: has %d dimensions and values has %d; both must have 1", to->ndim, values->ndim);
  if (to->shape[0] != values->shape[0]) fail("to: has %" PRId64 " elements, not %" PRId64, to->shape[0], values->shape[0]);
  check_contiguous("values", *values);
  check_contiguous("to", *to);
  check_apart({{"to", to}}, {{"values", values}});
  return {static_cast<const int64_t*>(values->data), values->shape[0], to->data, to->dtype};
}

}  // namespace v2drop
