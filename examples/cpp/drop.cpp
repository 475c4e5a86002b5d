// SPDX-License-Identifier: Apache-2.0
//
// A batch of two images from C++17. Array owns its memory and gives the library views of it; check() turns a status into an exception.
#include <v2drop/v2drop.h>

#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <vector>

namespace {

void check(v2drop_status status) {
  if (status != V2DROP_OK) throw std::runtime_error(v2drop_last_error());
}

// v2drop_dtype of an element type; only what this example needs.
template <class T>
constexpr v2drop_dtype kDtype = V2DROP_FLOAT32;
template <>
constexpr v2drop_dtype kDtype<int64_t> = V2DROP_INT64;

// A contiguous array. Its view stays valid while it lives, also when it is moved.
template <class T>
class Array {
 public:
  Array(std::initializer_list<int64_t> shape) : view_{nullptr, kDtype<T>, static_cast<int32_t>(shape.size()), {}, {}} {
    int64_t size = 1;
    for (int32_t d = view_.ndim; d-- > 0;) {
      view_.shape[d] = shape.begin()[d];
      view_.stride[d] = size;
      size *= view_.shape[d];
    }
    data_.resize(static_cast<size_t>(size));
    view_.data = data_.data();
  }
  Array(Array&&) = default;
  Array(const Array&) = delete;  // the view of a copy would point into the original

  T& operator[](int64_t i) { return data_[static_cast<size_t>(i)]; }
  const v2drop_tensor& view() const { return view_; }

 private:
  std::vector<T> data_;
  v2drop_tensor view_;
};

// [batch, rows, dim] shrinks to [batch, kept, dim]: all rows compete. The positions that survive go into `keep`.
Array<float> drop(const Array<float>& prev, const Array<float>& cur, int64_t kept, Array<int64_t>& keep) {
  const int64_t batch = cur.view().shape[0], rows = cur.view().shape[1];
  Array<float> hidden({batch, kept, cur.view().shape[2]});
  std::vector<v2drop_segment> segments;
  for (int64_t b = 0; b < batch; ++b) {
    v2drop_segment segment = {};
    segment.src_start = b * rows;
    segment.n = rows;
    segment.k = kept;
    segment.dst_start = b * kept;
    segments.push_back(segment);
  }
  const v2drop_gather gather = {cur.view(), hidden.view(), 0, 1, 0};
  v2drop_source source = V2DROP_SOURCE_INIT;
  source.prev = &prev.view();
  source.cur = &cur.view();
  source.metric = V2DROP_COSINE;
  check(v2drop_drop_tokens(&source, segments.data(), batch, nullptr, &keep.view(), nullptr, &gather, 1, nullptr));
  return hidden;
}

}  // namespace

int main() try {
  constexpr int64_t kBatch = 2, kRows = 6, kDim = 8, kKept = 2;
  Array<float> prev({kBatch, kRows, kDim}), cur({kBatch, kRows, kDim});
  for (int64_t i = 0; i < kBatch * kRows * kDim; ++i) prev[i] = cur[i] = 1;
  // The layer reverses the direction of rows 1 and 4 of the first image and of rows 0 and 5 of the second.
  for (const int64_t row : {1, 4, 6, 11}) cur[row * kDim] = -static_cast<float>(row);

  Array<int64_t> keep({kBatch, kKept});
  Array<float> hidden = drop(prev, cur, kKept, keep);
  for (int64_t b = 0; b < kBatch; ++b) {
    std::printf("image %d keeps rows %d and %d: %g and %g\n", static_cast<int>(b), static_cast<int>(keep[b * kKept]),
                static_cast<int>(keep[b * kKept + 1]), static_cast<double>(hidden[b * kKept * kDim]),
                static_cast<double>(hidden[(b * kKept + 1) * kDim]));
  }

  // The same call with a context whose place is V2DROP_CUDA works on device memory.
  if (v2drop_cuda_available() == V2DROP_OK) {
    std::printf("CUDA: kernels for %s\n", v2drop_cuda_archs());
  } else {
    std::printf("CUDA: %s\n", v2drop_last_error());
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "v2drop: %s\n", error.what());
  return 1;
}
