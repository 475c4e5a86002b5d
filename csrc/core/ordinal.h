// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic of exact selection, free of any device: how a score becomes an integer ordinal, where the cut lies, who is kept and where
// each kept row goes. Shared by every backend that is written in C++, and tested exhaustively on small inputs.
#ifndef V2DROP_CORE_ORDINAL_H_
#define V2DROP_CORE_ORDINAL_H_

#include <cstdint>

#if defined(__CUDACC__)
#define V2DROP_FN static __host__ __device__ inline
// The functors of a kernel run on the device only, those of a test on the host only.
#define V2DROP_WITH_FUNCTOR _Pragma("nv_exec_check_disable")
#else
#define V2DROP_WITH_FUNCTOR
// `static`: the same header is compiled for several instruction sets, and the linker must not mix their copies.
#define V2DROP_FN [[maybe_unused]] static inline
#endif

namespace v2drop {

constexpr int32_t kExcluded = INT32_MIN;  // below every score: never returned
constexpr int32_t kForced = INT32_MAX;    // above every score: always kept
constexpr int32_t kNaN = INT32_MAX - 1;   // every NaN, above +inf

// Orders floats as signed integers: NaN highest, -0.0 equal to 0.0.
V2DROP_FN int32_t ordinal_of_bits(uint32_t bits) {
  const int32_t s = static_cast<int32_t>(bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const int32_t ordinal = s ^ ((s >> 31) & 0x7fffffff);
  return magnitude > 0x7f800000u ? kNaN : magnitude == 0 ? 0 : ordinal;
}

// The inverse, up to the sign of zero and the payload of NaN.
V2DROP_FN uint32_t bits_of_ordinal(int32_t ordinal) { return static_cast<uint32_t>(ordinal ^ ((ordinal >> 31) & 0x7fffffff)); }

// A row is kept if its ordinal is above the threshold, or equal to it with fewer than `ties` equal ordinals before it.
struct Cut {
  int32_t threshold;
  int64_t ties;
};

V2DROP_FN bool kept(Cut cut, int32_t ordinal, int64_t equal_before) {
  return ordinal > cut.threshold || (ordinal == cut.threshold && equal_before < cut.ties);
}

// The place of a kept row among the kept rows, in position order.
V2DROP_FN int64_t place(Cut cut, int64_t above_before, int64_t equal_before) {
  return above_before + (equal_before < cut.ties ? equal_before : cut.ties);
}

// The cut that keeps the best k of n ordinals, all within [lo, hi]. `at_least(t)` counts the ordinals >= t. Bisection needs no sort, no
// buffer and at most 32 counts whatever the ordinals are, ties included, and mostly stops early: as soon as a count is exactly k. Excluded
// ordinals stay out even where that leaves fewer than k.
V2DROP_WITH_FUNCTOR
template <class AtLeast>
V2DROP_FN Cut find_cut(int32_t lo, int32_t hi, int64_t n, int64_t k, const AtLeast& at_least) {
  if (k <= 0) return {INT32_MAX, 0};
  if (k >= n) return {kExcluded, lo == kExcluded ? 0 : n};
  while (lo < hi) {  // at_least(lo) >= k > at_least(hi + 1)
    const int32_t mid = static_cast<int32_t>(lo + (static_cast<int64_t>(hi) - lo + 1) / 2);
    const int64_t count = at_least(mid);
    if (count == k) return {mid - 1, 0};
    if (count > k) {
      lo = mid;
    } else {
      hi = mid - 1;
    }
  }
  if (lo == kExcluded) return {kExcluded, 0};
  return {lo, lo == INT32_MAX ? k : k - at_least(lo + 1)};
}

// A range of ordinals cut into at most kBins bins of equal width, a power of two.
constexpr int kBins = 256;

struct Bins {
  int32_t lo;
  int shift;
};

V2DROP_FN Bins make_bins(int32_t lo, int32_t hi) {
  Bins bins = {lo, 0};
  while ((static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo)) >> bins.shift >= kBins) ++bins.shift;
  return bins;
}
V2DROP_FN int bin_of(Bins bins, int32_t ordinal) {
  return static_cast<int>((static_cast<uint32_t>(ordinal) - static_cast<uint32_t>(bins.lo)) >> bins.shift);
}
V2DROP_FN int32_t first_of_bin(Bins bins, int bin) {
  return static_cast<int32_t>(static_cast<uint32_t>(bins.lo) + (static_cast<uint32_t>(bin) << bins.shift));
}

// The bin that holds the `wanted`-th best ordinal of a range: `from` ordinals lie in it and above, `beyond` of them above.
struct FoundBin {
  int bin;
  int64_t from, beyond;
};

// The same cut as find_cut, for ordinals too many to be held: where a count costs a pass over memory, a pass should tell more than one bit.
// `find_bin(bins, hi, wanted)` counts the ordinals of [bins.lo, hi] by bin, once; at most four passes whatever the ordinals are.
V2DROP_WITH_FUNCTOR
template <class FindBin>
V2DROP_FN Cut find_cut_by_bins(int32_t lo, int32_t hi, int64_t n, int64_t k, const FindBin& find_bin) {
  if (k <= 0) return {INT32_MAX, 0};
  if (k >= n) return {kExcluded, lo == kExcluded ? 0 : n};
  int64_t wanted = k;  // places left for the ordinals of [lo, hi]
  while (lo < hi) {
    const Bins bins = make_bins(lo, hi);
    const FoundBin found = find_bin(bins, hi, wanted);
    lo = first_of_bin(bins, found.bin);
    if (found.from == wanted) return {lo - 1, 0};
    const uint32_t rest = static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo), width = (1u << bins.shift) - 1;
    hi = static_cast<int32_t>(static_cast<uint32_t>(lo) + (rest < width ? rest : width));
    wanted -= found.beyond;
  }
  return {lo, lo == kExcluded ? 0 : wanted};
}

}  // namespace v2drop

#endif  // V2DROP_CORE_ORDINAL_H_
