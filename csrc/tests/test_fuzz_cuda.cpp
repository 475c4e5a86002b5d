// SPDX-License-Identifier: Apache-2.0
//
// Random calls on CUDA, each beside the same call on the CPU, for a library whose kernels are emulated (host memory then serves as device
// memory). Results are compared with all bytes around them, so that a stray write shows; one call in four gets an invalid argument, and
// both must refuse it. Arguments: how many calls, and the first seed.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "v2drop/v2drop.h"

namespace {

uint64_t state;  // of splitmix64
uint64_t seed;

int64_t random(int64_t low, int64_t high) {  // both included
  uint64_t x = state += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return low + static_cast<int64_t>((x ^ (x >> 31)) % (static_cast<uint64_t>(high) - static_cast<uint64_t>(low) + 1));
}
bool one_in(int n) { return random(1, n) == 1; }

int failures = 0;
void check(bool ok, const char* what) {
  if (ok) return;
  if (++failures <= 20) printf("seed %llu: %s (last error: %s)\n", static_cast<unsigned long long>(seed), what, v2drop_last_error());
}

constexpr int64_t kBytes[] = {4, 2, 2, 8, 1, 1, 2, 4, 8, 16, 4};

// A tensor and the memory below it: gaps between rows, strides of either sign, dimensions in any order.
struct Array {
  v2drop_tensor tensor = {};
  std::vector<unsigned char> bytes;
  int64_t origin = 0;

  Array() = default;
  Array(const Array& other) : tensor(other.tensor), bytes(other.bytes), origin(other.origin) { attach(); }
  Array& operator=(const Array&) = delete;
  void attach() { tensor.data = bytes.data() + origin; }
};

enum Layout { kContiguous, kLastIsDense, kAny };

Array make_array(int32_t dtype, const std::vector<int64_t>& shape, Layout layout) {
  Array a;
  v2drop_tensor& t = a.tensor;
  t.dtype = dtype;
  t.ndim = static_cast<int32_t>(shape.size());
  std::vector<int> order;
  for (int d = t.ndim - 1; d >= 0; --d) order.push_back(d);
  if (layout == kAny && one_in(3)) std::swap(order[0], order[static_cast<size_t>(random(0, t.ndim - 1))]);
  const bool plain = layout == kContiguous || one_in(2);
  int64_t stride = 1, before = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    const int d = order[i];
    const bool dense = plain || (layout == kLastIsDense && d == t.ndim - 1);
    if (!dense) stride += one_in(2) ? random(0, 3) : random(0, 1) * 8;
    t.shape[d] = shape[static_cast<size_t>(d)];
    t.stride[d] = stride;
    if (!dense && one_in(4)) {
      t.stride[d] = -stride;
      before += stride * std::max<int64_t>(0, t.shape[d] - 1);
    }
    stride *= std::max<int64_t>(1, t.shape[d]);
  }
  a.bytes.resize(static_cast<size_t>(stride * kBytes[dtype]));
  for (unsigned char& byte : a.bytes) byte = static_cast<unsigned char>(random(0, 255));
  a.origin = before * kBytes[dtype];
  a.attach();
  return a;
}

char* at(const v2drop_tensor& t, std::vector<int64_t> index) {
  int64_t offset = 0;
  for (size_t d = 0; d < index.size(); ++d) offset += index[d] * t.stride[d];
  return static_cast<char*>(t.data) + offset * kBytes[t.dtype];
}

// Calls body(address) for every element.
template <class Body>
void for_each(const v2drop_tensor& t, const Body& body) {
  int64_t count = 1;
  for (int d = 0; d < t.ndim; ++d) count *= t.shape[d];
  for (int64_t i = 0; i < count; ++i) {
    std::vector<int64_t> index(static_cast<size_t>(t.ndim));
    int64_t rest = i;
    for (int d = t.ndim - 1; d >= 0; --d) index[static_cast<size_t>(d)] = rest % t.shape[d], rest /= t.shape[d];
    body(at(t, index));
  }
}

float number(const char* from, int32_t dtype) {
  uint16_t half;
  float f;
  if (dtype == V2DROP_FLOAT32) return memcpy(&f, from, 4), f;
  memcpy(&half, from, 2);
  if (dtype == V2DROP_BFLOAT16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    return memcpy(&f, &bits, 4), f;
  }
  const int exponent = half >> 10 & 31, fraction = half & 1023;
  f = exponent == 31  ? (fraction ? NAN : INFINITY)
      : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                      : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return half >> 15 ? -f : f;
}

// Numbers with few distinct values, so that there are ties, and at times NaN, infinities and both zeros.
void fill_floats(const Array& a, bool special) {
  static const uint32_t bits[] = {0x7fc00000, 0xffc00000, 0x7f800000, 0xff800000, 0x80000000, 0};
  static const uint16_t half_bits[] = {0x7e00, 0xfe00, 0x7c00, 0xfc00, 0x8000, 0};
  const int64_t distinct = one_in(3) ? 3 : 4000;
  for_each(a.tensor, [&](char* to) {
    const float value = static_cast<float>(random(-distinct, distinct)) / 64;
    uint32_t wide;
    memcpy(&wide, &value, 4);
    uint16_t half = static_cast<uint16_t>(wide >> 16);
    if (a.tensor.dtype == V2DROP_FLOAT16) half = static_cast<uint16_t>(random(0, 1) << 15 | (random(0, 20) << 10) | random(0, 7) << 7);
    if (special && one_in(8)) {
      const size_t i = static_cast<size_t>(random(0, 5));
      wide = bits[i];
      half = a.tensor.dtype == V2DROP_FLOAT16 ? half_bits[i] : static_cast<uint16_t>(bits[i] >> 16);
    }
    a.tensor.dtype == V2DROP_FLOAT32 ? memcpy(to, &wide, 4) : memcpy(to, &half, 2);
  });
}

bool close(float a, float b, double relative, double absolute) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::fabs(static_cast<double>(a) - b) <= absolute + relative * std::max(std::fabs(a), std::fabs(b));
}

bool same_bytes(const Array& a, const Array& b) { return a.bytes == b.bytes; }

// One thread of the CPU.
v2drop_context one_thread() {
  v2drop_context context = V2DROP_CONTEXT_INIT;
  context.threads = 1;
  return context;
}
const v2drop_context kCpu = one_thread();

// CUDA, with scratch memory for so many rows, segments and ranked results.
struct On {
  v2drop_context cuda = V2DROP_CONTEXT_INIT;
  void* memory = nullptr;
  On(int64_t rows, int64_t segments, int64_t width, const std::vector<v2drop_segment>* table) {
    cuda.place = V2DROP_CUDA;
    cuda.workspace_bytes = v2drop_workspace_bytes(rows, segments, width);
    if (posix_memalign(&memory, 256, static_cast<size_t>(cuda.workspace_bytes)) != 0) abort();
    memset(memory, static_cast<int>(random(0, 255)), static_cast<size_t>(cuda.workspace_bytes));
    cuda.workspace = memory;
    cuda.launch_mode = static_cast<int32_t>(random(0, V2DROP_LAUNCH_GRID));
    if (table && one_in(2)) cuda.device_segments = table->data();
  }
  // Whether the launch mode is one that not every call can have.
  bool may_be_unsupported() const { return cuda.launch_mode == V2DROP_LAUNCH_COOPERATIVE || cuda.launch_mode >= V2DROP_LAUNCH_CLUSTER; }
  On(const On&) = delete;
  On& operator=(const On&) = delete;
  ~On() { free(memory); }
};

v2drop_source hidden_source(const v2drop_tensor* prev, const v2drop_tensor* cur, int32_t metric, int32_t score_dtype) {
  v2drop_source source = V2DROP_SOURCE_INIT;
  source.prev = prev;
  source.cur = cur;
  source.metric = metric;
  source.score_dtype = score_dtype;
  return source;
}

v2drop_source score_source(const v2drop_tensor* scores, const v2drop_tensor* mask) {
  v2drop_source source = V2DROP_SOURCE_INIT;
  source.scores = scores;
  source.mask = mask;
  return source;
}

// Arguments that no entry point may accept, whatever the others are.
void spoil(v2drop_tensor& t) {
  switch (random(0, 4)) {
    case 0:
      t.dtype = one_in(2) ? 99 : -1;
      return;
    case 1:
      t.ndim = one_in(2) ? -1 : 9;
      return;
    case 2:
      t.shape[random(0, t.ndim - 1)] = -1;
      return;
    case 3:
      t.shape[t.ndim - 1] = INT64_MAX;
      t.stride[t.ndim - 1] = INT64_MIN;
      return;
    default:
      t.shape[0] = INT64_MAX / 4;
      t.stride[0] = INT64_MAX / 2;
  }
}

std::vector<int64_t> lead(int64_t batch, int64_t rows, bool with_batch, int64_t dim = -1) {
  std::vector<int64_t> shape;
  if (with_batch) shape.push_back(batch);
  shape.push_back(rows);
  if (dim >= 0) shape.push_back(dim);
  return shape;
}

struct Input {
  int64_t batch, rows, dim;
  bool with_batch, computed, masked;
  int32_t metric, score_dtype, dtype;
  std::unique_ptr<Array> prev, cur, scores, mask;

  Input(bool may_mask, bool one_entry) {
    with_batch = !one_entry && one_in(2);
    batch = with_batch ? random(0, 4) : 1;
    const bool large = one_in(40);
    rows = large ? random(2000, 9000) : one_in(10) ? 0 : random(1, 300);
    if (large) batch = std::min<int64_t>(batch, 1);
    dim = large ? random(0, 4) : one_in(20) ? random(0, 5000) : random(0, 40) * (one_in(2) ? 8 : 1);
    if (dim > 400) rows = std::min<int64_t>(rows, 20);
    computed = one_in(2);
    masked = may_mask && one_in(3);
    metric = static_cast<int32_t>(random(0, 2));
    score_dtype = one_in(2) ? 0 : static_cast<int32_t>(random(0, 2));
    dtype = static_cast<int32_t>(random(0, 2));
    const bool special = one_in(3);
    prev.reset(new Array(make_array(dtype, lead(batch, rows, with_batch, dim), kLastIsDense)));
    cur.reset(new Array(make_array(dtype, lead(batch, rows, with_batch, dim), kLastIsDense)));
    fill_floats(*prev, special && one_in(2));
    fill_floats(*cur, special);
    if (masked) {
      mask.reset(new Array(make_array(V2DROP_BOOL, lead(batch, rows, with_batch), kAny)));
      for_each(mask->tensor, [](char* to) { *to = static_cast<char>(one_in(3) ? 0 : random(1, 255)); });
    }
    // What the CUDA kernels compute is what the CPU then selects by: the sums of the two differ in the last bits.
    scores.reset(new Array(make_array(computed ? static_cast<int32_t>(V2DROP_FLOAT32) : dtype, lead(batch, rows, with_batch), kAny)));
    fill_floats(*scores, special);
    if (!computed) return;
    On on(batch * rows, 0, 0, nullptr);
    const v2drop_source source = hidden_source(&prev->tensor, &cur->tensor, metric, score_dtype);
    check(v2drop_variation_score(&source, &scores->tensor, &on.cuda) == V2DROP_OK, "score");
  }
  // By what a call on CUDA ranks, and what a call on the CPU then has to rank by to select the same.
  v2drop_source source() const {
    v2drop_source made =
        computed ? hidden_source(&prev->tensor, &cur->tensor, metric, score_dtype) : score_source(&scores->tensor, nullptr);
    made.mask = mask_tensor();
    return made;
  }
  v2drop_source cpu_source() const { return score_source(&scores->tensor, mask_tensor()); }
  const v2drop_tensor* mask_tensor() const { return masked ? &mask->tensor : nullptr; }
};

void test_scores() {
  Input in(false, false);
  Array cpu = make_array(V2DROP_FLOAT32, lead(in.batch, in.rows, in.with_batch), kAny), cuda(cpu);
  On on(0, 0, 0, nullptr);
  const v2drop_source source = hidden_source(&in.prev->tensor, &in.cur->tensor, in.metric, in.score_dtype);
  const v2drop_status a = v2drop_variation_score(&source, &cpu.tensor, &kCpu);
  const v2drop_status b = v2drop_variation_score(&source, &cuda.tensor, &on.cuda);
  check(a == V2DROP_OK && b == V2DROP_OK, "scores");
  // A cosine loses digits where one row is much longer than the other.
  const double relative = in.score_dtype == 0 ? 1e-4 : 2e-2, absolute = in.metric == V2DROP_COSINE ? 2e-2 : 1e-5;
  std::vector<float> expected;
  for_each(cpu.tensor, [&](char* from) { expected.push_back(number(from, 0)); });
  size_t i = 0;
  for_each(cuda.tensor, [&](char* from) { check(close(number(from, 0), expected[i++], relative, absolute), "a score"); });
  for_each(cpu.tensor, [](char* to) { memset(to, 0, 4); });
  for_each(cuda.tensor, [](char* to) { memset(to, 0, 4); });
  check(same_bytes(cpu, cuda), "around the scores");

  Array grad = make_array(V2DROP_FLOAT32, lead(in.batch, in.rows, in.with_batch), kAny);
  fill_floats(grad, false);
  Array p = make_array(in.dtype, lead(in.batch, in.rows, in.with_batch, in.dim), kLastIsDense), q(p);
  Array c = make_array(in.dtype, lead(in.batch, in.rows, in.with_batch, in.dim), kLastIsDense), d(c);
  const bool only_cur = one_in(3);
  check(v2drop_variation_score_backward(&grad.tensor, &source, only_cur ? nullptr : &p.tensor, &c.tensor, &kCpu) == V2DROP_OK,
        "backward on the CPU");
  check(v2drop_variation_score_backward(&grad.tensor, &source, only_cur ? nullptr : &q.tensor, &d.tensor, &on.cuda) == V2DROP_OK,
        "backward");
  std::vector<float> to_prev, to_cur;
  for_each(p.tensor, [&](char* from) { to_prev.push_back(number(from, in.dtype)); });
  for_each(c.tensor, [&](char* from) { to_cur.push_back(number(from, in.dtype)); });
  // The differences of nearly equal terms of a cosine are left alone.
  const double exact = in.metric == V2DROP_COSINE ? 1e-1 : 2e-2, floor = in.metric == V2DROP_COSINE ? 1e-1 : 1e-3;
  i = 0;
  for_each(q.tensor, [&](char* from) { check(only_cur || close(number(from, in.dtype), to_prev[i], exact, floor), "grad_prev"), ++i; });
  i = 0;
  for_each(d.tensor, [&](char* from) { check(close(number(from, in.dtype), to_cur[i++], exact, floor), "grad_cur"); });
  if (only_cur) check(same_bytes(p, q), "grad_prev was not wanted");
}

std::vector<v2drop_segment> make_table(const Input& in, bool padded) {
  std::vector<v2drop_segment> table;
  const bool alike = one_in(2);
  int64_t out = 0;
  v2drop_segment first = {};
  for (int64_t b = 0; b < in.batch; ++b) {
    int64_t row = 0;
    const int64_t count = alike ? 1 : random(1, one_in(20) ? 90 : 5);
    for (int64_t g = 0; g < count; ++g) {
      const int64_t left = in.rows - row;
      v2drop_segment s = {};
      s.src_start = b * in.rows + row;
      s.n_prefix = g + 1 == count ? random(0, left / 4) : random(0, left / 8);
      s.n = g + 1 == count ? random(0, left - s.n_prefix) : random(0, left / 2);
      s.n = std::min(s.n, left - s.n_prefix);
      s.n_suffix = std::min(random(0, 3), left - s.n_prefix - s.n);
      s.k = one_in(8) ? 0 : one_in(8) ? s.n : random(0, s.n);
      if (padded) s.pad_before = random(0, 2), s.pad_after = random(0, 2);
      if (alike && b > 0) {
        const int64_t src_start = s.src_start;
        s = first;
        s.src_start = src_start;
      }
      s.dst_start = out;
      if (b == 0 && g == 0) first = s;
      row += s.n_prefix + s.n + s.n_suffix;
      out += s.pad_before + s.n_prefix + s.k + s.n_suffix + s.pad_after;
      table.push_back(s);
    }
  }
  return table;
}

void test_topk() {
  Input in(true, false);
  std::vector<v2drop_segment> table = make_table(in, false);
  const int64_t n = static_cast<int64_t>(table.size());
  int64_t width = random(0, 2);
  for (const v2drop_segment& s : table) width = std::max(width, s.k);
  const int32_t order = static_cast<int32_t>(random(0, 1)), dtype = in.scores->tensor.dtype;
  Array v = make_array(dtype, {n, width}, kContiguous), w(v), i = make_array(V2DROP_INT64, {n, width}, kContiguous), j(i);
  On on(in.batch * in.rows, n, order == V2DROP_ORDER_SCORE ? width : 0, &table);
  const v2drop_source cpu = in.cpu_source(), cuda = in.source();
  check(v2drop_topk(&cpu, table.data(), n, nullptr, order, &v.tensor, &i.tensor, &kCpu) == V2DROP_OK, "topk on the CPU");
  const auto topk = [&] { return v2drop_topk(&cuda, table.data(), n, nullptr, order, &w.tensor, &j.tensor, &on.cuda); };
  v2drop_status status = topk();
  if (status == V2DROP_ERROR_UNSUPPORTED && on.may_be_unsupported()) {
    on.cuda.launch_mode = V2DROP_LAUNCH_AUTO;
    status = topk();
  }
  check(status == V2DROP_OK, "topk");
  check(same_bytes(i, j), "the indices of topk");
  std::vector<float> values;
  for_each(v.tensor, [&](char* from) { values.push_back(number(from, dtype)); });
  size_t e = 0;
  for_each(w.tensor, [&](char* from) { check(close(number(from, dtype), values[e++], 0, 0), "a value of topk"); });
}

struct Gathers {
  std::vector<std::unique_ptr<Array>> arrays;  // src, dst on the CPU, dst on CUDA; or src twice
  std::vector<v2drop_gather> cpu, cuda;

  Gathers(int64_t batch, int64_t src_rows, int64_t dst_rows, bool in_place) {
    const int64_t count = one_in(15) ? random(120, 300) : random(0, 12);
    const int64_t shapes = one_in(2) ? 1 : count;  // few classes, or many
    std::vector<int64_t> shape;
    int32_t dtype = 0, row_dim = 0, batch_dim = -1;
    for (int64_t p = 0; p < count; ++p) {
      if (p < shapes) {
        const bool small = count > 20;
        const int32_t extra = static_cast<int32_t>(random(0, small ? 2 : one_in(6) ? 6 : 3));
        shape.clear();
        for (int32_t d = 0; d < extra; ++d) shape.push_back(one_in(30) ? 0 : random(1, extra > 4 ? 2 : small ? 4 : 9));
        if (extra == 1 && !small && one_in(6)) shape[0] = random(200, 9000) * (one_in(2) ? 8 : 1) % 9000;
        row_dim = static_cast<int32_t>(random(0, extra));
        shape.insert(shape.begin() + row_dim, src_rows);
        batch_dim = -1;
        if (batch != 1 || one_in(2)) {
          batch_dim = static_cast<int32_t>(random(0, extra + 1));  // in front of the rows or behind them
          shape.insert(shape.begin() + batch_dim, batch);
          if (batch_dim <= row_dim) ++row_dim;
        }
        dtype = static_cast<int32_t>(random(0, 10));
      }
      v2drop_gather gather = {};
      gather.row_dim = row_dim;
      gather.batch_dim = batch_dim;
      gather.fill = one_in(2) ? random(-3, 3) : random(INT64_MIN / 4, INT64_MAX / 4);
      arrays.emplace_back(new Array(make_array(dtype, shape, kAny)));
      const size_t src = arrays.size() - 1;
      gather.src = arrays[src]->tensor;
      if (in_place) {
        arrays.emplace_back(new Array(*arrays[src]));
        cpu.push_back(gather);
        gather.src = arrays.back()->tensor;
        cuda.push_back(gather);
        continue;
      }
      std::vector<int64_t> out = shape;
      out[static_cast<size_t>(row_dim)] = dst_rows;
      arrays.emplace_back(new Array(make_array(dtype, out, kAny)));
      gather.dst = arrays.back()->tensor;
      cpu.push_back(gather);
      arrays.emplace_back(new Array(*arrays.back()));
      gather.dst = arrays.back()->tensor;
      cuda.push_back(gather);
    }
    step = in_place ? 2 : 3;
  }
  size_t step;
  int64_t count() const { return static_cast<int64_t>(cpu.size()); }
  bool same() const {
    for (size_t p = 0; p < cpu.size(); ++p) {
      if (!same_bytes(*arrays[step * p + step - 2], *arrays[step * p + step - 1])) return false;
    }
    return true;
  }
};

void test_drop() {
  Input in(true, false);
  std::vector<v2drop_segment> table = make_table(in, true);
  // Entries of equal length: the last segment of each pads up.
  std::vector<int64_t> lengths(static_cast<size_t>(in.batch), 0);
  const auto entry_of = [&](const v2drop_segment& s) { return in.rows > 0 ? std::min(s.src_start / in.rows, in.batch - 1) : 0; };
  if (in.rows == 0 && in.batch > 1) return;
  for (v2drop_segment& s : table) {
    if (s.n_prefix + s.n + s.n_suffix == 0 && s.src_start > 0) --s.src_start;  // an empty one at the end of an entry belongs to it
    lengths[static_cast<size_t>(entry_of(s))] += s.pad_before + s.n_prefix + s.k + s.n_suffix + s.pad_after;
  }
  int64_t count = 0, out = 0;
  for (int64_t length : lengths) count = std::max(count, length);
  for (size_t g = 0; g < table.size(); ++g) {
    v2drop_segment& s = table[g];
    const int64_t entry = entry_of(s);
    if (g + 1 == table.size() || entry_of(table[g + 1]) != entry) s.pad_after += count - lengths[static_cast<size_t>(entry)];
    s.dst_start = out;
    out += s.pad_before + s.n_prefix + s.k + s.n_suffix + s.pad_after;
  }
  const int64_t n = static_cast<int64_t>(table.size());
  Array keep = make_array(V2DROP_INT64, lead(in.batch, count, in.with_batch), kContiguous), again(keep);
  Gathers gathers(in.batch, in.rows, count, false);
  On on(in.batch * in.rows, n, 0, &table);
  const v2drop_source cpu = in.cpu_source(), cuda = in.source();
  check(v2drop_drop_tokens(&cpu, table.data(), n, nullptr, &keep.tensor, nullptr, gathers.cpu.data(), gathers.count(), &kCpu) == V2DROP_OK,
        "drop on the CPU");
  const auto drop = [&] {
    return v2drop_drop_tokens(&cuda, table.data(), n, nullptr, &again.tensor, nullptr, gathers.cuda.data(), gathers.count(), &on.cuda);
  };
  v2drop_status status = drop();
  if (status == V2DROP_ERROR_UNSUPPORTED && on.may_be_unsupported()) {
    on.cuda.launch_mode = V2DROP_LAUNCH_AUTO;
    status = drop();
  }
  check(status == V2DROP_OK, "drop");
  check(same_bytes(keep, again), "keep");
  check(gathers.same(), "the gathers of a drop");
}

// Lengths that only the device knows, good ones and any others.
void test_packed() {
  Input in(false, true);
  const int64_t n = one_in(10) ? 0 : random(1, one_in(20) ? 400 : 6);
  std::vector<v2drop_segment> budgets(static_cast<size_t>(n));
  const int64_t k = random(0, 40), count = random(0, 200);
  for (v2drop_segment& s : budgets) {
    s = {};
    s.k = one_in(20) ? INT64_MAX : one_in(2) ? k : random(0, 60);
  }
  Array cu = make_array(V2DROP_INT32, {n + 1}, kContiguous);
  std::vector<int32_t> offsets;
  const bool good = one_in(2);
  for (int64_t g = 0; g <= n; ++g) offsets.push_back(static_cast<int32_t>(good ? random(0, in.rows) : random(INT32_MIN, INT32_MAX)));
  if (good) std::sort(offsets.begin(), offsets.end());
  if (!good && one_in(2)) {
    for (int32_t& x : offsets) x = one_in(2) ? INT32_MIN : INT32_MAX;
  }
  memcpy(cu.tensor.data, offsets.data(), offsets.size() * 4);
  const auto clamp = [&](int32_t x) { return std::min(std::max<int64_t>(x, 0), in.rows); };

  // What it should be, by the CPU with lengths that the host knows.
  std::vector<int64_t> kept;
  std::vector<int32_t> expected = {0};
  for (size_t g = 0; g < budgets.size(); ++g) {
    v2drop_segment s = {};
    s.src_start = clamp(offsets[g]);
    s.n = std::max<int64_t>(0, clamp(offsets[g + 1]) - s.src_start);
    s.k = std::min({budgets[g].k, s.n, count - static_cast<int64_t>(kept.size())});
    Array values = make_array(in.scores->tensor.dtype, {1, s.k}, kContiguous), indices = make_array(V2DROP_INT64, {1, s.k}, kContiguous);
    const v2drop_source source = in.cpu_source();
    check(v2drop_topk(&source, &s, 1, nullptr, V2DROP_ORDER_POSITION, &values.tensor, &indices.tensor, &kCpu) == V2DROP_OK,
          "topk of a segment");
    for_each(indices.tensor, [&](char* from) {
      int64_t index;
      memcpy(&index, from, 8);
      kept.push_back(index);
    });
    expected.push_back(static_cast<int32_t>(kept.size()));
  }
  kept.resize(static_cast<size_t>(count), -1);

  Array keep = make_array(V2DROP_INT64, {count}, kContiguous), again(keep), new_cu = make_array(V2DROP_INT32, {n + 1}, kContiguous);
  Gathers gathers(1, in.rows, count, false);
  On on(in.rows, n, 0, &budgets);
  if (on.may_be_unsupported()) on.cuda.launch_mode = V2DROP_LAUNCH_SEPARATE;
  const v2drop_source source = in.source();
  check(v2drop_drop_tokens(&source, budgets.data(), n, &cu.tensor, &again.tensor, &new_cu.tensor, gathers.cuda.data(), gathers.count(),
                           &on.cuda) == V2DROP_OK,
        "packed drop");
  check(count == 0 || memcmp(again.tensor.data, kept.data(), kept.size() * 8) == 0, "keep of a packed drop");
  check(memcmp(new_cu.tensor.data, expected.data(), expected.size() * 4) == 0, "new_cu");
  if (count == 0) return;
  memcpy(keep.tensor.data, kept.data(), kept.size() * 8);
  check(v2drop_compact(&keep.tensor, gathers.cpu.data(), gathers.count(), &kCpu) == V2DROP_OK, "compact on the CPU");
  check(gathers.same(), "the gathers of a packed drop");
}

void test_compact() {
  const bool with_batch = one_in(2), in_place = one_in(3), backward = !in_place && one_in(2);
  const int64_t batch = with_batch ? random(0, 4) : 1, rows = one_in(10) ? 0 : random(1, one_in(20) ? 9000 : 300);
  const int64_t count = one_in(10) ? 0 : random(1, 300);
  Array keep = make_array(V2DROP_INT64, lead(batch, count, with_batch), kContiguous), known(keep);
  std::vector<int64_t> indices;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int64_t> entry;
    for (int64_t i = 0; i < count; ++i) entry.push_back(rows > 0 ? random(0, rows - 1) : -1);
    if (in_place || backward) {  // every row once
      std::sort(entry.begin(), entry.end());
      for (size_t i = 1; i < entry.size(); ++i) entry[i] = entry[i] > entry[i - 1] ? entry[i] : entry[i - 1] + 1;
      if (backward && one_in(2)) std::reverse(entry.begin(), entry.end());
    }
    indices.insert(indices.end(), entry.begin(), entry.end());
  }
  std::vector<int64_t> wild = indices;
  for (size_t i = 0; i < indices.size(); ++i) {
    if (one_in(6)) {
      indices[i] = -1;
      wild[i] = one_in(2) ? random(INT64_MIN / 4, -1) : one_in(2) ? random(-300, -1) : random(1, 300) - (int64_t{1} << 40);
    }
    if (indices[i] >= rows) {  // an error on the CPU, an empty row on a GPU
      indices[i] = -1;
      if (one_in(2)) wild[i] += int64_t{1} << 32;
    }
  }
  if (!indices.empty()) {
    memcpy(known.tensor.data, indices.data(), indices.size() * 8);
    memcpy(keep.tensor.data, wild.data(), wild.size() * 8);
  }
  Gathers gathers(batch, backward ? count : rows, backward ? rows : count, in_place);
  On on(batch * rows, 0, 0, nullptr);
  v2drop_status a, b;
  if (in_place) {
    a = v2drop_compact_inplace(&known.tensor, gathers.cpu.data(), gathers.count(), &kCpu);
    b = v2drop_compact_inplace(&keep.tensor, gathers.cuda.data(), gathers.count(), &on.cuda);
  } else if (backward) {
    a = v2drop_compact_backward(&known.tensor, rows, gathers.cpu.data(), gathers.count(), &kCpu);
    b = v2drop_compact_backward(&keep.tensor, rows, gathers.cuda.data(), gathers.count(), &on.cuda);
  } else {
    a = v2drop_compact(&known.tensor, gathers.cpu.data(), gathers.count(), &kCpu);
    b = v2drop_compact(&keep.tensor, gathers.cuda.data(), gathers.count(), &on.cuda);
  }
  check(a == V2DROP_OK && b == V2DROP_OK, "compact");
  check(gathers.same(), in_place ? "compact in place" : backward ? "compact backward" : "the gathers of compact");
}

// Attention, norms and cosines; at times with one wrong argument, or with little scratch memory.
void test_attention() {
  const int64_t batch = random(0, 3), kv = random(1, 3), group = random(1, one_in(4) ? 9 : 4), queries = one_in(10) ? 0 : random(1, 7);
  const int64_t rows = one_in(10) ? 0 : random(1, one_in(6) ? 700 : 150), dim = one_in(8) ? random(0, 300) : 8 * random(1, 16);
  const int64_t heads = kv * group, n_pivots = random(0, 10);
  const int32_t dtype = static_cast<int32_t>(random(0, 2)), causal = static_cast<int32_t>(random(0, 1));
  const auto numbers = [](Array& a, bool special) {  // small enough for no exponential to overflow, with a gap between most
    fill_floats(a, special);
    for_each(a.tensor, [&](char* to) {
      const float value = number(to, a.tensor.dtype), small = std::isfinite(value) ? std::fmod(value, 1.0f) / 4 : value;
      uint32_t bits;
      memcpy(&bits, &small, 4);
      const uint16_t brief = static_cast<uint16_t>(bits >> 16);
      if (a.tensor.dtype == V2DROP_FLOAT32) memcpy(to, &bits, 4);
      if (a.tensor.dtype == V2DROP_BFLOAT16) memcpy(to, &brief, 2);
    });
  };
  Array q = make_array(dtype, {batch, heads, queries, dim}, kLastIsDense), k = make_array(dtype, {batch, kv, rows, dim}, kLastIsDense);
  Array at = make_array(V2DROP_INT64, {batch, queries}, kAny), scores = make_array(V2DROP_FLOAT32, {batch, rows}, kAny), again(scores);
  numbers(q, false);
  numbers(k, false);
  for_each(at.tensor, [&](char* to) {
    const int64_t row = one_in(4) ? -random(1, 5) : random(0, rows + 3);
    memcpy(to, &row, 8);
  });
  std::unique_ptr<Array> masks[2];
  for (std::unique_ptr<Array>& mask : masks) {
    if (one_in(2)) continue;
    mask.reset(new Array(make_array(V2DROP_BOOL, {batch, rows}, kAny)));
    for_each(mask->tensor, [](char* to) { *to = static_cast<char>(one_in(3) ? 0 : random(1, 255)); });
  }
  // Which heads are chosen may hang on the last bit; the tests of the op see to that.
  int32_t mode = static_cast<int32_t>(random(0, 1)), how = one_in(4) ? static_cast<int32_t>(heads) : -static_cast<int32_t>(random(0, 2)),
          over = static_cast<int32_t>(random(0, 1)), norm = static_cast<int32_t>(random(0, 1));
  v2drop_tensor a = q.tensor, b = k.tensor, c = at.tensor;
  bool wrong = one_in(4);
  if (wrong) {
    switch (random(0, 6)) {
      case 0:
        spoil(a);
        break;
      case 1:
        spoil(b);
        break;
      case 2:
        spoil(c);
        break;
      case 3:
        mode = one_in(2) ? -1 : 2;
        break;
      case 4:
        how = one_in(2) ? -3 : static_cast<int32_t>(heads) + 1;
        break;
      case 5:
        over = 2;
        break;
      default:
        b.shape[1] = heads + 1;
        b.stride[1] = 0;
    }
  }
  On on(0, 0, 0, nullptr);
  free(on.memory);
  const int64_t least = v2drop_attention_workspace_bytes(batch, heads, std::min<int64_t>(queries, 1), rows);
  on.cuda.workspace_bytes = one_in(2) ? v2drop_attention_workspace_bytes(batch, heads, queries, rows) : least + random(0, 5000);
  if (posix_memalign(&on.memory, 256, static_cast<size_t>(on.cuda.workspace_bytes)) != 0) abort();
  memset(on.memory, static_cast<int>(random(0, 255)), static_cast<size_t>(on.cuda.workspace_bytes));
  on.cuda.workspace = on.memory;
  const v2drop_tensor *mask = masks[0] ? &masks[0]->tensor : nullptr, *droppable = masks[1] ? &masks[1]->tensor : nullptr;
  const v2drop_status x = v2drop_attention_score(&a, &b, &c, mask, droppable, causal, 0.5f, mode, how, over, &scores.tensor, &kCpu);
  const v2drop_status y = v2drop_attention_score(&a, &b, &c, mask, droppable, causal, 0.5f, mode, how, over, &again.tensor, &on.cuda);
  check(x == (wrong ? V2DROP_ERROR_ARGUMENT : V2DROP_OK) && y == x, "attention");
  const auto compare = [](const Array& expected, const Array& got, double absolute, const char* what) {
    std::vector<float> values;
    for_each(expected.tensor, [&](char* from) { values.push_back(number(from, 0)); });
    size_t i = 0;
    for_each(got.tensor, [&](char* from) { check(close(number(from, 0), values[i++], 1e-4, absolute), what); });
    for_each(expected.tensor, [](char* to) { memset(to, 0, 4); });
    for_each(got.tensor, [](char* to) { memset(to, 0, 4); });
    check(same_bytes(expected, got), "around the results of attention");
  };
  // Products of up to 300 numbers below 1/4 (of float16 ones, below 2^5): what is left of a sum that cancels has their rounding.
  const double scale = dtype == V2DROP_FLOAT16 ? 1e5 * 300 * 1e-6 : 300.0 / 16 * 1e-6;
  if (wrong) {
    check(same_bytes(scores, again), "a refused call has written");
  } else if (dtype != V2DROP_FLOAT16 || mode == V2DROP_DOT) {  // those of float16 reach logits whose rounding is a factor
    compare(scores, again, mode == V2DROP_DOT ? scale * static_cast<double>(heads) * 3 : 1e-4, "a score of attention");
  }
  numbers(k, one_in(3));
  check(v2drop_key_norm(&k.tensor, norm, &scores.tensor, &kCpu) == V2DROP_OK, "norms on the CPU");
  check(v2drop_key_norm(&k.tensor, norm, &again.tensor, &on.cuda) == V2DROP_OK, "norms");
  compare(scores, again, 1e-5, "a norm");

  Array rows_of = make_array(dtype, {batch, rows, dim}, kLastIsDense), pivots = make_array(V2DROP_INT64, {batch, n_pivots}, kAny);
  Array cosines = make_array(V2DROP_FLOAT32, {batch, n_pivots, rows}, kLastIsDense), those(cosines);
  numbers(rows_of, one_in(3));
  for_each(pivots.tensor, [&](char* to) {
    const int64_t row = one_in(4) ? random(-3, rows + 3) : random(0, rows > 0 ? rows - 1 : 0);
    memcpy(to, &row, 8);
  });
  check(v2drop_cosine_to_pivots(&rows_of.tensor, &pivots.tensor, &cosines.tensor, &kCpu) == V2DROP_OK, "cosines on the CPU");
  check(v2drop_cosine_to_pivots(&rows_of.tensor, &pivots.tensor, &those.tensor, &on.cuda) == V2DROP_OK, "cosines");
  compare(cosines, those, 1e-5, "a cosine");
}

void write_integers(const Array& a, const std::vector<int64_t>& values) {
  size_t i = 0;
  for_each(a.tensor, [&](char* to) { memcpy(to, &values[i++], 8); });
}

void expect_close(const Array& a, const Array& b, double absolute, const char* what) {
  std::vector<float> expected;
  for_each(a.tensor, [&](char* from) { expected.push_back(number(from, a.tensor.dtype)); });
  size_t i = 0;
  const double relative = a.tensor.dtype == V2DROP_FLOAT32 ? 1e-4 : 2e-2;
  for_each(b.tensor, [&](char* from) { check(close(number(from, a.tensor.dtype), expected[i++], relative, absolute), what); });
}

// Merges and their gradients, with unused edges at both ends; at times with lists that are wrong, which only the CPU can see.
void test_merge() {
  const int64_t batch = random(0, 3), n = random(1, 40), k = random(0, 12), edges = random(0, 80), dim = random(1, 5) * random(1, 40);
  const int32_t dtype = static_cast<int32_t>(random(0, 2)), mean = static_cast<int32_t>(random(0, 1));
  std::vector<int64_t> offsets, rows, back_offsets, back;
  for (int64_t b = 0; b < batch; ++b) {
    std::vector<int64_t> starts, by_row(static_cast<size_t>(edges));
    for (int64_t i = 0; i <= k; ++i) starts.push_back(random(0, edges));
    std::sort(starts.begin(), starts.end());
    offsets.insert(offsets.end(), starts.begin(), starts.end());
    const size_t first = rows.size();
    for (int64_t e = 0; e < edges; ++e) rows.push_back(random(0, n - 1)), by_row[static_cast<size_t>(e)] = e;
    const auto row = [&](int64_t e) { return rows[first + static_cast<size_t>(e)]; };
    std::stable_sort(by_row.begin(), by_row.end(), [&](int64_t x, int64_t y) { return row(x) < row(y); });
    for (int64_t i = 0; i <= n; ++i)
      back_offsets.push_back(std::count_if(by_row.begin(), by_row.end(), [&](int64_t e) { return row(e) < i; }));
    back.insert(back.end(), by_row.begin(), by_row.end());
  }
  const bool wrong = batch > 0 && k > 0 && one_in(4);
  if (wrong) offsets[0] = one_in(2) ? -1 - random(0, 9) : edges + 1 + random(0, 1000);
  Array x = make_array(dtype, {batch, n, dim}, kLastIsDense), starts = make_array(V2DROP_INT64, {batch, k + 1}, kContiguous);
  Array from = make_array(V2DROP_INT64, {batch, edges}, kContiguous), w = make_array(V2DROP_FLOAT32, {batch, edges}, kContiguous);
  Array by_source = make_array(V2DROP_INT64, {batch, n + 1}, kContiguous), sorted = make_array(V2DROP_INT64, {batch, edges}, kContiguous);
  Array out = make_array(dtype, {batch, k, dim}, kLastIsDense), again(out), grad = make_array(dtype, {batch, k, dim}, kLastIsDense);
  Array to_x = make_array(dtype, {batch, n, dim}, kLastIsDense), to_x_again(to_x);
  Array to_w = make_array(V2DROP_FLOAT32, {batch, edges}, kContiguous), to_w_again(to_w);
  fill_floats(x, false), fill_floats(grad, false);
  for_each(w.tensor, [](char* to) {
    const float value = static_cast<float>(random(1, 64)) / 64;
    memcpy(to, &value, 4);
  });
  write_integers(starts, offsets), write_integers(from, rows), write_integers(by_source, back_offsets), write_integers(sorted, back);
  const v2drop_tensor* weights = one_in(2) ? &w.tensor : nullptr;
  On on(batch * edges + 128, 0, 0, nullptr);
  const v2drop_status expected = wrong ? V2DROP_ERROR_ARGUMENT : V2DROP_OK;
  check(v2drop_weighted_merge(&x.tensor, &starts.tensor, &from.tensor, weights, mean, &out.tensor, &kCpu) == expected, "merge on the CPU");
  check(v2drop_weighted_merge(&x.tensor, &starts.tensor, &from.tensor, weights, mean, &again.tensor, &on.cuda) == V2DROP_OK, "merge");
  check(v2drop_weighted_merge_backward(&grad.tensor, &x.tensor, &starts.tensor, &from.tensor, weights, mean, nullptr, nullptr, &to_x.tensor,
                                       &to_w.tensor, &kCpu) == expected,
        "gradients of a merge on the CPU");
  check(v2drop_weighted_merge_backward(&grad.tensor, &x.tensor, &starts.tensor, &from.tensor, weights, mean, &by_source.tensor,
                                       &sorted.tensor, &to_x_again.tensor, &to_w_again.tensor, &on.cuda) == V2DROP_OK,
        "its gradients");
  if (wrong) return;
  const double size = dtype == V2DROP_FLOAT16 ? 6e4 : 64;  // of a number; at most 80 are added
  expect_close(out, again, dtype == V2DROP_FLOAT32 ? 1e-3 : 1e-2 * size, "a merged number");
  expect_close(to_x, to_x_again, dtype == V2DROP_FLOAT32 ? 1e-3 : 1e-2 * size, "a gradient of a merge");
  expect_close(to_w, to_w_again, 1e-5 * size * size * static_cast<double>(dim), "a gradient of a weight");
}

void test_random_scores() {
  const int64_t batch = random(0, 4), n = random(0, 300), key = random(INT64_MIN / 2, INT64_MAX / 2);
  Array items = make_array(V2DROP_INT64, {batch}, kAny), cpu = make_array(V2DROP_FLOAT32, {batch, n}, kContiguous), cuda(cpu);
  const v2drop_tensor* seeds = one_in(2) ? &items.tensor : nullptr;
  On on(0, 0, 0, nullptr);
  check(v2drop_random_score(key, seeds, &cpu.tensor, &kCpu) == V2DROP_OK, "random scores on the CPU");
  check(v2drop_random_score(key, seeds, &cuda.tensor, &on.cuda) == V2DROP_OK, "random scores");
  check(same_bytes(cpu, cuda), "the bits of random scores");
}

// One wrong argument among good ones.
void test_wrong() {
  Input in(true, false);
  in.computed = one_in(2);
  std::vector<v2drop_segment> table(static_cast<size_t>(in.batch));
  const int64_t n = in.batch, k = random(0, in.rows);
  for (int64_t b = 0; b < n; ++b) table[static_cast<size_t>(b)] = {b * in.rows, 0, in.rows, 0, k, b * k, 0, 0};
  Array keep = make_array(V2DROP_INT64, lead(in.batch, k, in.with_batch), kContiguous), was(keep);
  Array values = make_array(in.computed ? static_cast<int32_t>(V2DROP_FLOAT32) : in.scores->tensor.dtype, {n, k}, kContiguous),
        indices = make_array(V2DROP_INT64, {n, k}, kContiguous), no_values(values), no_indices(indices);
  Gathers gathers(in.batch, in.rows, k, false);
  On on(in.batch * in.rows, n, k, &table);
  on.cuda.launch_mode = V2DROP_LAUNCH_AUTO;

  v2drop_tensor scores = in.scores->tensor, prev = in.prev->tensor, cur = in.cur->tensor, to = keep.tensor, v = values.tensor,
                i = indices.tensor;
  int32_t metric = in.metric, score_dtype = in.score_dtype, order = 0;
  int64_t count = n, n_gathers = gathers.count();
  const v2drop_context* cuda = &on.cuda;
  const bool topk = one_in(2);
  bool only_cuda = false;
  switch (random(0, 10)) {
    case 0:
      in.computed ? spoil(one_in(2) ? prev : cur) : spoil(scores);
      break;
    case 1:
      topk ? spoil(one_in(2) ? v : i) : spoil(to);
      break;
    case 2:
      in.computed ? metric = one_in(2) ? -1 : 3 : scores.dtype = V2DROP_INT64;
      break;
    case 3:
      in.computed ? score_dtype = one_in(2) ? -1 : 3 : scores.ndim = 0;
      break;
    case 4:
      topk ? order = 2 : n_gathers = -1;
      break;
    case 5:
      count = -1;
      break;
    case 6: {
      if (table.empty()) return;
      int64_t* fields[] = {&table[0].src_start, &table[0].n_prefix, &table[0].n, &table[0].n_suffix, &table[0].k};
      *fields[random(0, 4)] = one_in(2) ? random(INT64_MIN, -1) : INT64_MAX - random(0, 1000);
      break;
    }
    case 7: {
      if (topk || gathers.cuda.empty()) return;
      const size_t p = static_cast<size_t>(random(0, gathers.count() - 1));
      v2drop_gather& gather = gathers.cuda[p];
      switch (random(0, 4)) {
        case 0:
          spoil(gather.src);
          break;
        case 1:
          spoil(gather.dst);
          break;
        case 2:
          gather.row_dim = one_in(2) ? -1 : 8;
          break;
        case 3:
          gather.batch_dim = one_in(2) ? gather.row_dim : 8;
          break;
        default:
          ++gather.src.shape[gather.row_dim];
      }
      gathers.cpu[p] = gather;
      break;
    }
    case 8:
      only_cuda = true;
      if (one_in(2)) {
        on.cuda.launch_mode = one_in(2) ? -1 : V2DROP_LAUNCH_GRID + 1;
      } else {
        on.cuda.size = one_in(2) ? 0 : sizeof on.cuda - 1;
      }
      break;
    case 9: {  // a result in the memory of an input or of another result
      if (n * k == 0 || in.rows == 0) return;
      const v2drop_tensor& input = in.computed ? (one_in(2) ? prev : cur) : scores;
      if (in.computed && input.shape[input.ndim - 1] == 0) return;
      v2drop_tensor& result = topk ? (one_in(2) ? v : i) : to;
      result.data = topk && one_in(2) ? (&result == &v ? i : v).data : input.data;
      break;
    }
    default:
      only_cuda = true;
      if (!in.computed || in.rows * in.batch * k == 0) return;
      if (one_in(2)) {
        on.cuda.workspace_bytes = random(-1000, 255);
      } else {
        on.cuda.workspace = one_in(2) ? nullptr : static_cast<char*>(on.memory) + 64;
      }
  }
  v2drop_source source = in.computed ? hidden_source(&prev, &cur, metric, score_dtype) : score_source(&scores, nullptr);
  source.mask = in.mask_tensor();
  v2drop_status a = V2DROP_ERROR_ARGUMENT, b;
  if (topk) {
    if (!only_cuda) a = v2drop_topk(&source, table.data(), count, nullptr, order, &v, &i, &kCpu);
    b = v2drop_topk(&source, table.data(), count, nullptr, order, &v, &i, cuda);
  } else {
    if (!only_cuda) a = v2drop_drop_tokens(&source, table.data(), count, nullptr, &to, nullptr, gathers.cpu.data(), n_gathers, &kCpu);
    b = v2drop_drop_tokens(&source, table.data(), count, nullptr, &to, nullptr, gathers.cuda.data(), n_gathers, cuda);
  }
  check(a == V2DROP_ERROR_ARGUMENT, "the CPU takes a wrong argument");
  check(b == V2DROP_ERROR_ARGUMENT, "CUDA takes a wrong argument");
  check(same_bytes(keep, was) && same_bytes(values, no_values) && same_bytes(indices, no_indices) && gathers.same(),
        "a refused call has written");
}

}  // namespace

int main(int argc, char** argv) {
  if (strcmp(v2drop_cuda_archs(), "emulated") != 0) {
    printf("the kernels of this library are not emulated\n");
    return 1;
  }
  const long calls = argc > 1 ? atol(argv[1]) : 250;
  const uint64_t first = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  for (seed = first; seed < first + static_cast<uint64_t>(calls); ++seed) {
    state = seed * 1000003;
    void (*const tests[])() = {test_scores, test_topk,  test_drop,      test_drop,      test_packed, test_compact, test_compact,
                               test_wrong,  test_wrong, test_attention, test_attention, test_merge,  test_merge,   test_random_scores};
    tests[random(0, 13)]();
  }
  if (!failures) printf("%ld random calls: ok\n", calls);
  return failures != 0;
}
