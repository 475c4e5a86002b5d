// SPDX-License-Identifier: Apache-2.0
//
// Whether the tensors of a call share memory in a way that would make its result depend on the order of its accesses.
#ifndef V2DROP_CORE_OVERLAP_H_
#define V2DROP_CORE_OVERLAP_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "v2drop/v2drop.h"

namespace v2drop {

// Whether two elements of a tensor lie at one address, or that takes too long to tell from strides that do not nest.
bool overlaps_itself(const v2drop_tensor& tensor);

// The tensors of a call, all of them checked to be sound. check() throws Error where one that is written shares memory with another:
// exactly for any strides, so that the halves of one buffer and the columns of one matrix are apart, unless that takes too long to tell.
class Regions {
 public:
  struct Name {
    const char* name;  // of the argument
    int64_t tensor;    // of the gathers that it names one of; or -1
  };

  explicit Regions(size_t tensors) {
    given_.reserve(tensors);
    spans_.reserve(tensors);
  }
  void written(Name name, const v2drop_tensor* tensor) { add(name, tensor, true); }
  // Tensors that are not given are no part of the call.
  void read(Name name, const v2drop_tensor* tensor) { add(name, tensor, false); }
  void check();

 private:
  struct Given {
    const v2drop_tensor* tensor;
    Name name;
    bool written;
  };
  struct Span {  // what is sorted: small
    uintptr_t begin, end;
    size_t given;
  };

  void add(Name name, const v2drop_tensor* tensor, bool written);
  [[noreturn]] static void refuse(const Given& first, const Given& second);

  std::vector<Given> given_;
  std::vector<Span> spans_;
};

}  // namespace v2drop

#endif  // V2DROP_CORE_OVERLAP_H_
