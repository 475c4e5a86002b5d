// SPDX-License-Identifier: Apache-2.0
//
// The inner loops of attention: every instruction set gives the bits of the narrowest one, and the exponential is within its bound.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace v2drop {
extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;
#endif
}  // namespace v2drop

using namespace v2drop;

namespace {

int failures = 0;
void check(bool ok, const char* isa, const char* what, int64_t at) {
  if (!ok && ++failures <= 20) std::printf("%s: %s, case %lld\n", isa, what, static_cast<long long>(at));
}

uint32_t state = 1;
uint32_t random() {
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}
float number() { return static_cast<float>(random()) / 8388608.0f - 1.0f; }

// Rows of numbers of a dtype, among them zeros, infinities and NaN where `special`.
std::vector<unsigned char> make_rows(int64_t elements, int dtype, bool special) {
  static const uint32_t odd[] = {0x7fc00000, 0x7f800000, 0xff800000, 0x80000000, 0, 1};
  std::vector<unsigned char> rows(static_cast<size_t>(elements) * (dtype == 0 ? 4 : 2));
  for (int64_t i = 0; i < elements; ++i) {
    const float value = number();
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (special && random() % 50 == 0) bits = odd[random() % 6];
    const uint16_t half = dtype == 1 ? static_cast<uint16_t>(special ? random() : random() & 0xbfff) : static_cast<uint16_t>(bits >> 16);
    if (dtype == 0) {
      std::memcpy(&rows[static_cast<size_t>(i) * 4], &bits, 4);
    } else {
      std::memcpy(&rows[static_cast<size_t>(i) * 2], &half, 2);
    }
  }
  return rows;
}

// Any two NaN are the same here: which of two operands' payloads survives is the compiler's choice.
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](float x, float y) { return (std::isnan(x) && std::isnan(y)) || std::memcmp(&x, &y, sizeof x) == 0; });
}

void test_isa(const Kernels& wide) {
  const Kernels& narrow = kernels_baseline;
  for (int64_t c = 0; c < 400; ++c) {
    const int dtype = static_cast<int>(c % 3);
    const int64_t n = 1 + random() % 21, vectors = 1 + random() % 9, dim = c % 5 ? 1 + random() % 200 : 128, stride = dim + random() % 3;
    const int64_t bytes = dtype == 0 ? 4 : 2, pitch = packed_dim(dim);
    const bool special = c % 4 == 0;
    const std::vector<unsigned char> rows = make_rows(n * stride, dtype, special), others = make_rows(vectors * dim, dtype, special);
    std::vector<float> packed[2], out[2], norms[2];
    for (int side = 0; side < 2; ++side) {
      const Kernels& k = side ? wide : narrow;
      packed[side].assign(static_cast<size_t>(vectors * pitch), -1);
      for (int64_t v = 0; v < vectors; ++v) k.pack[dtype](others.data() + v * dim * bytes, dim, packed[side].data() + v * pitch);
      out[side].assign(static_cast<size_t>(vectors * (n + 2)), -1);
      k.dots[dtype](rows.data(), stride * bytes, n, packed[side].data(), vectors, dim, 0.37f, out[side].data(), n + 2);
      norms[side].assign(static_cast<size_t>(2 * n), 0.25f);
      for (int norm = 0; norm < kNorms; ++norm)
        k.add_norms[norm][dtype](rows.data(), stride * bytes, n, dim, norms[side].data() + norm * n);
    }
    check(same(packed[0], packed[1]), wide.isa, "pack", c);
    check(same(out[0], out[1]), wide.isa, "dots", c);
    check(same(norms[0], norms[1]), wide.isa, "norms", c);
    for (int64_t v = 0; v < vectors; ++v) check(out[1][static_cast<size_t>(v * (n + 2) + n)] == -1, wide.isa, "behind the dots", c);

    std::vector<float> x(static_cast<size_t>(random() % 300)), y(x.size());
    std::vector<unsigned char> where(x.size());
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = special && random() % 40 == 0 ? -INFINITY : 30 * number(), y[i] = number(), where[i] = random() % 2;
    if (special && c % 8 == 0) std::fill(x.begin(), x.end(), c % 16 ? -INFINITY : NAN);
    const int64_t length = static_cast<int64_t>(x.size());
    std::vector<float> results[2];
    for (int side = 0; side < 2; ++side) {
      const Kernels& k = side ? wide : narrow;
      std::vector<float> e = x, a = y, b = y, s = y, ends(3);
      k.exponentials(e.data(), length, &ends[0], &ends[1]);
      ends[2] = k.sum_where(e.data(), where.data(), length);
      k.add_scaled(a.data(), e.data(), 0.3f, length);
      k.max_scaled(b.data(), e.data(), 0.3f, length);
      k.add_squares(s.data(), e.data(), length);
      for (const std::vector<float>* part : {&e, &a, &b, &s, &ends}) results[side].insert(results[side].end(), part->begin(), part->end());
    }
    check(same(results[0], results[1]), wide.isa, "weights", c);
  }
}

// Whole blocks of bfloat16, which AVX512-BF16 multiplies in pairs where exponents allow it: numbers whose sums cancel, so that one that
// rounded otherwise would be seen, and tiles that must be left to the other instructions: a row of zeros, subnormals, tiny or huge numbers,
// infinities or NaN; or vectors of such numbers, or of floats that are no bfloat16.
void test_pairs(const Kernels& wide) {
  test_isa(wide);
  constexpr int64_t kRows = 22;
  for (int64_t c = 0; c < 900; ++c) {
    const int64_t vectors = 2 + random() % 8, dim = 32 * (1 + random() % 6), pitch = packed_dim(dim);
    const auto fill = [&](float* to, uint32_t least, uint32_t exponents, uint32_t mantissa) {
      for (int64_t i = 0; i < dim; ++i) {
        const uint32_t bits = (random() & 1) << 31 | (least + random() % exponents) << 23 | (random() & mantissa) << 16;
        std::memcpy(to + i, &bits, sizeof bits);
      }
    };
    std::vector<float> numbers(static_cast<size_t>((kRows + vectors) * dim));
    for (int64_t r = 0; r < kRows + vectors; ++r) fill(&numbers[static_cast<size_t>(r * dim)], c % 2 ? 120 : 87, c % 2 ? 14 : 90, 0x7f);
    static const uint32_t odd[][3] = {{0, 1, 0}, {0, 1, 0x7f}, {1, 60, 0x7f}, {86, 1, 0x7f}, {177, 1, 0}, {200, 55, 0x7f}, {255, 1, 0x7f}};
    const uint32_t* const kind = odd[random() % 7];
    if (c % 3) fill(&numbers[static_cast<size_t>(random() % (c % 3 == 1 ? kRows : kRows + vectors)) * dim], kind[0], kind[1], kind[2]);
    std::vector<uint16_t> rows(numbers.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      uint32_t bits;
      std::memcpy(&bits, &numbers[i], sizeof bits);
      rows[i] = static_cast<uint16_t>(bits >> 16);
    }
    std::vector<float> out[2];
    for (int side = 0; side < 2; ++side) {
      const Kernels& k = side ? wide : kernels_baseline;
      std::vector<float> packed(static_cast<size_t>(vectors * pitch));
      for (int64_t v = 0; v < vectors; ++v) {
        k.pack[2](rows.data() + (kRows + v) * dim, dim, packed.data() + v * pitch);
        if (c % 5 == 0) packed[static_cast<size_t>(v * pitch)] *= 1.001f;
      }
      out[side].assign(static_cast<size_t>(vectors * kRows), -1);
      k.dots[2](rows.data(), dim * 2, kRows, packed.data(), vectors, dim, 1.0f, out[side].data(), kRows);
    }
    check(same(out[0], out[1]), wide.isa, "pairs", c);
  }
}

// Every 97th float from 0 down to where results are subnormal, and beyond.
void test_exponential() {
  const float end = -87.33654f;  // the logarithm of 2^-126
  double worst = 0;
  std::vector<float> x(4096), e;
  uint32_t bits = 0x80000000u;
  for (bool more = true; more;) {
    x[0] = 0;  // the maximum
    for (size_t i = 1; i < x.size(); ++i, bits += 97) std::memcpy(&x[i], &bits, 4);
    e = x;
    float max, sum;
    kernels_baseline.exponentials(e.data(), static_cast<int64_t>(e.size()), &max, &sum);
    check(max == 0, "baseline", "the maximum", bits);
    for (size_t i = 0; i < x.size(); ++i) {
      if (x[i] < end) {
        check(e[i] <= std::numeric_limits<float>::min(), "baseline", "what underflows", bits);
        more = false;
        continue;
      }
      const double exact = std::exp(static_cast<double>(x[i])), ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
      worst = std::max(worst, std::fabs(e[i] - exact) / ulp);
    }
  }
  check(worst <= 2, "baseline", "the error of the exponential", 0);
  float ends[] = {-INFINITY, -1e30f, -100.0f, NAN, 5.0f}, max, sum;
  kernels_baseline.exponentials(ends, 5, &max, &sum);
  check(ends[0] == 0 && ends[1] == 0 && ends[2] == 0 && std::isnan(ends[3]) && ends[4] == 1 && max == 5 && std::isnan(sum), "baseline",
        "special values", 0);
  std::printf("exponential: off by %.2f ulp at most\n", worst);
}

}  // namespace

int main() {
  test_exponential();
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) test_isa(kernels_avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    test_isa(kernels_avx512);
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & bit_AVX512BF16)) test_pairs(kernels_avx512bf16);
  }
#endif
  std::printf("dots: %s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
