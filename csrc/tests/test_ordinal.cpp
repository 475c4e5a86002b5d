// SPDX-License-Identifier: Apache-2.0
//
// Ordinals, cut and placement against a stable sort, for every array of length <= 7 over several small sets of values and every k.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "ordinal.h"

using namespace v2drop;

namespace {

int failures = 0;
#define CHECK(condition) ((condition) ? void() : void((std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition), ++failures)))

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Higher, as the contract defines it: NaN above all, -0.0 equal to 0.0.
bool higher(float a, float b) { return std::isnan(a) ? !std::isnan(b) : !std::isnan(b) && a > b; }

std::vector<int64_t> best_by_sort(const std::vector<float>& scores, size_t k) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return higher(scores[a], scores[b]); });
  order.resize(k);
  std::sort(order.begin(), order.end());
  return order;
}

Cut cut_by_bins(const std::vector<int32_t>& ordinals, int64_t k) {
  const auto ends = std::minmax_element(ordinals.begin(), ordinals.end());
  int passes = 0;
  const Cut cut =
      find_cut_by_bins(*ends.first, *ends.second, static_cast<int64_t>(ordinals.size()), k, [&](Bins bins, int32_t hi, int64_t wanted) {
        ++passes;
        CHECK(bins.lo < hi && bin_of(bins, bins.lo) == 0 && bin_of(bins, hi) < kBins && first_of_bin(bins, 0) == bins.lo);
        std::vector<int64_t> count(kBins, 0);
        for (int32_t ordinal : ordinals) {
          if (ordinal < bins.lo || ordinal > hi) continue;
          const int bin = bin_of(bins, ordinal);
          CHECK(ordinal >= first_of_bin(bins, bin) &&
                (bin == kBins - 1 || bin_of(bins, hi) == bin || ordinal < first_of_bin(bins, bin + 1)));
          ++count[static_cast<size_t>(bin)];
        }
        int64_t from = 0;
        for (int bin = kBins - 1; bin >= 0; --bin) {
          const int64_t beyond = from;
          from += count[static_cast<size_t>(bin)];
          if (from >= wanted) return FoundBin{bin, from, beyond};
        }
        CHECK(!"the range holds fewer ordinals than are wanted");
        return FoundBin{0, from, 0};
      });
  CHECK(passes <= 4);
  return cut;
}

// Thresholds may differ where no ordinal lies between them.
bool same_kept(Cut a, Cut b, const std::vector<int32_t>& ordinals) {
  int64_t equal_a = 0, equal_b = 0;
  for (int32_t ordinal : ordinals) {
    if (kept(a, ordinal, equal_a) != kept(b, ordinal, equal_b)) return false;
    equal_a += ordinal == a.threshold;
    equal_b += ordinal == b.threshold;
  }
  return true;
}

std::vector<int64_t> best_by_cut(const std::vector<int32_t>& ordinals, int64_t k) {
  const int64_t n = static_cast<int64_t>(ordinals.size());
  if (n == 0) return {};
  const auto ends = std::minmax_element(ordinals.begin(), ordinals.end());
  int counts = 0;
  const Cut cut = find_cut(*ends.first, *ends.second, n, k, [&](int32_t t) {
    ++counts;
    return static_cast<int64_t>(std::count_if(ordinals.begin(), ordinals.end(), [&](int32_t ordinal) { return ordinal >= t; }));
  });
  CHECK(counts <= 33);
  CHECK(same_kept(cut, cut_by_bins(ordinals, k), ordinals));
  std::vector<int64_t> out(ordinals.size(), -1);
  int64_t above = 0, equal = 0, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (kept(cut, ordinals[i], equal)) {
      CHECK(place(cut, above, equal) == total);
      out[total++] = i;
    }
    above += ordinals[i] > cut.threshold;
    equal += ordinals[i] == cut.threshold;
  }
  CHECK(place(cut, above, equal) == total);
  out.resize(static_cast<size_t>(total));
  return out;
}

void every_array(const std::vector<float>& values, size_t longest) {
  for (size_t n = 0; n <= longest; ++n) {
    std::vector<size_t> digits(n, 0);
    for (;;) {
      std::vector<float> scores;
      std::vector<int32_t> ordinals;
      for (size_t d : digits) scores.push_back(values[d]), ordinals.push_back(ordinal_of_bits(bits_of(values[d])));
      for (size_t k = 0; k <= n; ++k) CHECK(best_by_cut(ordinals, static_cast<int64_t>(k)) == best_by_sort(scores, k));
      size_t i = 0;
      while (i < n && ++digits[i] == values.size()) digits[i++] = 0;
      if (i == n) break;
    }
  }
}

// Forced ordinals come first, excluded ones never.
void every_mask() {
  const std::vector<int32_t> values = {kExcluded, 0, kNaN, kForced};
  for (int code = 0; code < 4 * 4 * 4 * 4 * 4; ++code) {
    std::vector<int32_t> ordinals;
    for (int c = code, i = 0; i < 5; ++i, c /= 4) ordinals.push_back(values[static_cast<size_t>(c % 4)]);
    const int64_t competing = 5 - std::count(ordinals.begin(), ordinals.end(), kExcluded);
    for (int64_t k = 0; k <= 5; ++k) {
      std::vector<int64_t> order = {0, 1, 2, 3, 4};
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return ordinals[a] > ordinals[b]; });
      order.resize(static_cast<size_t>(std::min(k, competing)));
      std::sort(order.begin(), order.end());
      CHECK(best_by_cut(ordinals, k) == order);
    }
  }
}

// Long arrays: spread over all integers, clustered in a few, and far apart with clusters in between.
void many_keys() {
  uint64_t state = 1;
  const auto random = [&] { return static_cast<uint32_t>((state = state * 6364136223846793005u + 1442695040888963407u) >> 32); };
  for (int kind = 0; kind < 4; ++kind) {
    std::vector<int32_t> ordinals(3000);
    for (int32_t& ordinal : ordinals) {
      const uint32_t r = random();
      ordinal = kind == 0   ? static_cast<int32_t>(r)
                : kind == 1 ? static_cast<int32_t>(r % 5) - 2
                : kind == 2 ? 1000000000 + static_cast<int32_t>(r % 2000)
                            : (r % 3 == 0   ? kExcluded
                               : r % 3 == 1 ? kForced
                                            : static_cast<int32_t>(r % 700));
    }
    for (int64_t k : {1, 2, 999, 1000, 1001, 1500, 2000, 2998, 2999, 3000}) best_by_cut(ordinals, k);
  }
}

}  // namespace

int main() {
  const float inf = std::numeric_limits<float>::infinity(), tiny = std::numeric_limits<float>::denorm_min();
  const float nan = float_of(0x7fc00000u), negative_nan = float_of(0xffc00001u), loud_nan = float_of(0x7f800001u);

  const std::vector<float> ascending = {-inf, -std::numeric_limits<float>::max(), -1,  -tiny, 0, tiny,
                                        1,    std::numeric_limits<float>::max(),  inf, nan};
  for (size_t i = 1; i < ascending.size(); ++i) CHECK(ordinal_of_bits(bits_of(ascending[i - 1])) < ordinal_of_bits(bits_of(ascending[i])));
  for (float x : ascending) {
    const float back = float_of(bits_of_ordinal(ordinal_of_bits(bits_of(x))));
    CHECK(std::isnan(x) ? std::isnan(back) : back == x);
  }
  CHECK(ordinal_of_bits(bits_of(-0.0f)) == ordinal_of_bits(bits_of(0.0f)));
  for (float x : {nan, negative_nan, loud_nan}) CHECK(ordinal_of_bits(bits_of(x)) == kNaN);
  CHECK(kExcluded < ordinal_of_bits(bits_of(-inf)) && kNaN < kForced);

  every_array({1.0f}, 7);
  every_array({1.0f, 2.0f, -3.0f}, 7);
  every_array({nan, inf, 0.0f}, 7);
  every_array({-0.0f, 0.0f, negative_nan}, 7);
  every_array({-inf, -tiny, -0.0f, tiny, nan}, 5);
  every_mask();
  many_keys();
  if (!failures) std::printf("ordinals: ok\n");
  return failures != 0;
}
