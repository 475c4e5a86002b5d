// SPDX-License-Identifier: Apache-2.0
//
// Which tensors share memory, against their addresses one by one, for random strides of either sign in a small buffer.
#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "overlap.h"
#include "request.h"

using namespace v2drop;

namespace {

uint64_t state = 1;
int64_t random(int64_t low, int64_t high) {  // both included; of splitmix64
  uint64_t x = state += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return low + static_cast<int64_t>((x ^ (x >> 31)) % static_cast<uint64_t>(high - low + 1));
}

int failures = 0;
void check(bool ok, const char* what, int call) {
  if (!ok && ++failures <= 20) std::printf("call %d: %s\n", call, what);
}

char room[4096];

v2drop_tensor random_tensor() {
  v2drop_tensor t = {};
  constexpr int32_t kDtypes[] = {V2DROP_BOOL, V2DROP_FLOAT16, V2DROP_FLOAT32};
  t.dtype = kDtypes[random(0, 2)];
  t.ndim = static_cast<int32_t>(random(1, 3));
  for (int d = 0; d < t.ndim; ++d) {
    t.shape[d] = random(0, 12) == 0 ? 0 : random(1, 4);
    t.stride[d] = random(-3, 3) * (random(0, 1) ? 1 : random(1, 8));
  }
  t.data = room + sizeof room / 2 + random(-40, 40);
  return t;
}

// The bytes of a tensor; `twice` if one belongs to two elements.
std::set<const char*> bytes_of(const v2drop_tensor& t, bool* twice) {
  std::set<const char*> bytes;
  int64_t elements = 1;
  for (int d = 0; d < t.ndim; ++d) elements *= t.shape[d];
  for (int64_t i = 0; i < elements; ++i) {
    int64_t at = 0, rest = i;
    for (int d = 0; d < t.ndim; ++d) at += rest % t.shape[d] * t.stride[d], rest /= t.shape[d];
    for (int64_t byte = 0; byte < kDtypeBytes[t.dtype]; ++byte) {
      *twice |= !bytes.insert(static_cast<const char*>(t.data) + at * kDtypeBytes[t.dtype] + byte).second;
    }
  }
  return bytes;
}

std::string refusal(Regions& regions) {
  try {
    regions.check();
  } catch (const Error& error) {
    return error.message;
  }
  return "";
}

void test_pairs() {
  for (int call = 0; call < 20000; ++call) {
    const v2drop_tensor a = random_tensor(), b = random_tensor();
    bool twice = false, unused = false;
    const std::set<const char*> of_a = bytes_of(a, &twice), of_b = bytes_of(b, &unused);
    check(overlaps_itself(a) == twice, "overlaps itself", call);
    bool meet = false;
    for (const char* byte : of_a) meet |= of_b.count(byte) != 0;
    Regions one(2), both(2), none(2);
    one.read({"a", -1}, &a), one.written({"b", -1}, &b);
    both.written({"dst", 1}, &b), both.written({"a", -1}, &a);
    none.read({"a", -1}, &a), none.read({"b", -1}, &b);
    check(refusal(one) == (meet ? "b: shares memory with a, but a result must overlap neither an input nor another result" : ""),
          "an input and a result", call);
    check((refusal(both) != "") == meet, "two results", call);
    check(refusal(none) == "", "two inputs", call);
  }
}

// Of many tensors, in any order, the one pair that shares memory is found, also behind inputs that reach far.
void test_many() {
  static char memory[64 * 64];
  for (int call = 0; call < 200; ++call) {
    v2drop_tensor all[64];
    const int64_t wrong = random(0, 64), order = 2 * random(0, 31) + 1;
    Regions regions(65);
    v2drop_tensor wide = {};
    wide.dtype = V2DROP_BOOL, wide.ndim = 1, wide.shape[0] = 2, wide.stride[0] = 64 * 64 - 1, wide.data = memory;
    regions.read({"wide", -1}, &wide);
    for (int64_t i = 0; i < 64; ++i) {
      v2drop_tensor& t = all[i * order % 64];
      t = {};
      t.dtype = V2DROP_BOOL, t.ndim = 1, t.stride[0] = 1;
      const int64_t place = i * order % 64;
      t.data = memory + 64 * place + 1;
      t.shape[0] = place == wrong ? 65 : place == 63 ? 62 : 63;
      regions.written({"dst", place}, &t);
    }
    check((refusal(regions) != "") == (wrong < 64), "one of many", call);
  }
}

}  // namespace

int main() {
  test_pairs();
  test_many();
  std::printf("overlap: %s\n", failures ? "FAILED" : "ok");
  return failures != 0;
}
