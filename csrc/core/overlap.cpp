// SPDX-License-Identifier: Apache-2.0
#include "overlap.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "request.h"

namespace v2drop {
namespace {

__extension__ typedef __int128 Wide;  // distances between any two addresses, and their sums

// Steps of the search for a common byte. Nested strides, those of any view of a contiguous tensor, take a few for each dimension.
constexpr int kMostSteps = 4096;

// Pieces of `width` bytes, the first at `begin`, and how to step from one to the next; strides are positive.
struct Pieces {
  struct Dim {
    int64_t stride, size;
  };
  uintptr_t begin;
  int64_t width;
  Dim dims[V2DROP_MAX_DIMS];
  int n_dims = 0;

  explicit Pieces(const v2drop_tensor& tensor) {
    width = kDtypeBytes[tensor.dtype];
    begin = reinterpret_cast<uintptr_t>(tensor.data);
    for (int d = 0; d < tensor.ndim; ++d) {
      const int64_t stride = tensor.stride[d] * width, size = tensor.shape[d];
      if (size <= 1 || stride == 0) continue;
      if (stride < 0) begin -= static_cast<uintptr_t>(-stride * (size - 1));
      dims[n_dims++] = {stride < 0 ? -stride : stride, size};
    }
    // Smallest stride first: a handful of dimensions, which come nearly sorted, the other way round.
    for (int i = 1; i < n_dims; ++i) {
      for (int j = i; j > 0 && dims[j].stride < dims[j - 1].stride; --j) std::swap(dims[j], dims[j - 1]);
    }
    int joined = 0;
    while (joined < n_dims && dims[joined].stride == width) width *= dims[joined++].size;
    std::copy(dims + joined, dims + n_dims, dims);
    n_dims -= joined;
  }
};

// Whether steps through two tensors bring a distance strictly between -width_b and width_a.
class Search {
 public:
  Search(int64_t width_a, int64_t width_b) : width_a_(width_a), width_b_(width_b) {}

  void step(const Pieces::Dim& dim, int sign) { steps_[n_++] = {dim.stride, dim.size, sign}; }
  bool finds(Wide distance) {
    std::sort(steps_, steps_ + n_, [](const Step& a, const Step& b) { return a.stride > b.stride; });
    // The least and the most that the steps from each on can add.
    low_[n_] = high_[n_] = 0;
    for (int i = n_; i-- > 0;) {
      const Wide far = static_cast<Wide>(steps_[i].stride) * (steps_[i].size - 1);
      low_[i] = low_[i + 1] - (steps_[i].sign < 0 ? far : 0);
      high_[i] = high_[i + 1] + (steps_[i].sign < 0 ? 0 : far);
    }
    return from(distance, 0);
  }

 private:
  struct Step {
    int64_t stride, size;
    int sign;
  };

  static Wide floor_div(Wide a, int64_t b) { return a / b - (a % b != 0 && a < 0); }

  bool from(Wide at, int i) {
    if (i == n_ || ++done_ > kMostSteps) return true;
    const Step& s = steps_[i];
    // at + sign * stride * v must come strictly between -width_b - high and width_a - low.
    Wide first = -width_b_ - high_[i + 1] - at + 1, last = width_a_ - low_[i + 1] - at - 1;
    if (s.sign < 0) {
      std::swap(first, last);
      first = -first;
      last = -last;
    }
    first = std::max<Wide>(-floor_div(-first, s.stride), 0);
    last = std::min<Wide>(floor_div(last, s.stride), s.size - 1);
    for (Wide v = first; v <= last; ++v) {
      if (from(at + s.sign * s.stride * v, i + 1)) return true;
    }
    return false;
  }

  Wide width_a_, width_b_;
  Step steps_[2 * V2DROP_MAX_DIMS];
  Wide low_[2 * V2DROP_MAX_DIMS + 1], high_[2 * V2DROP_MAX_DIMS + 1];
  int n_ = 0, done_ = 0;
};

bool share(const v2drop_tensor& one, const v2drop_tensor& other) {
  const Pieces a(one), b(other);
  if (a.n_dims == 0 && b.n_dims == 0) return true;  // their spans meet, and have no gaps
  Search search(a.width, b.width);
  for (int d = 0; d < a.n_dims; ++d) search.step(a.dims[d], -1);
  for (int d = 0; d < b.n_dims; ++d) search.step(b.dims[d], 1);
  return search.finds(static_cast<Wide>(b.begin) - static_cast<Wide>(a.begin));
}

}  // namespace

bool overlaps_itself(const v2drop_tensor& tensor) {
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] == 0) return false;
  }
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] > 1 && tensor.stride[d] == 0) return true;
  }
  const Pieces pieces(tensor);
  Wide reach = pieces.width;
  bool nested = true;
  for (int d = 0; d < pieces.n_dims; ++d) {
    nested &= pieces.dims[d].stride >= reach;
    reach += static_cast<Wide>(pieces.dims[d].stride) * (pieces.dims[d].size - 1);
  }
  if (nested) return false;
  // Two different elements: in the first dimension in which they differ, the second is further on.
  for (int d = 0; d < pieces.n_dims; ++d) {
    Search search(pieces.width, pieces.width);
    search.step({pieces.dims[d].stride, pieces.dims[d].size - 1}, 1);
    for (int after = d + 1; after < pieces.n_dims; ++after) {
      search.step(pieces.dims[after], 1);
      search.step(pieces.dims[after], -1);
    }
    if (search.finds(pieces.dims[d].stride)) return true;
  }
  return false;
}

void Regions::add(Name name, const v2drop_tensor* tensor, bool written) {
  if (!tensor) return;
  const int64_t bytes = kDtypeBytes[tensor->dtype];
  uintptr_t begin = reinterpret_cast<uintptr_t>(tensor->data), reach = static_cast<uintptr_t>(bytes);
  for (int d = 0; d < tensor->ndim; ++d) {
    if (tensor->shape[d] == 0) return;
    const int64_t span = tensor->shape[d] > 1 ? tensor->stride[d] * bytes * (tensor->shape[d] - 1) : 0;
    if (span < 0) begin -= static_cast<uintptr_t>(-span);
    reach += static_cast<uintptr_t>(span < 0 ? -span : span);
  }
  uintptr_t end;
  if (__builtin_add_overflow(begin, reach, &end)) end = UINTPTR_MAX;  // nothing lies further
  spans_.push_back({begin, end, given_.size()});
  given_.push_back({tensor, name, written});
}

void Regions::check() {
  std::sort(spans_.begin(), spans_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  size_t open = 0;  // the spans before this one have all ended
  for (size_t i = 1; i < spans_.size(); ++i) {
    while (open < i && spans_[open].end <= spans_[i].begin) ++open;
    for (size_t j = open; j < i; ++j) {
      if (spans_[j].end <= spans_[i].begin) continue;
      const Given &first = given_[spans_[j].given], &second = given_[spans_[i].given];
      if ((first.written || second.written) && share(*first.tensor, *second.tensor)) refuse(first, second);
    }
  }
}

void Regions::refuse(const Given& first, const Given& second) {
  char names[2][40];
  for (int i = 0; i < 2; ++i) {
    const Name& name = ((i == 0) == first.written ? first : second).name;
    if (name.tensor < 0) {
      std::snprintf(names[i], sizeof names[i], "%s", name.name);
    } else {
      std::snprintf(names[i], sizeof names[i], "gathers[%" PRId64 "].%s", name.tensor, name.name);
    }
  }
  fail("%s: shares memory with %s, but a result must overlap neither an input nor another result", names[0], names[1]);
}

}  // namespace v2drop
