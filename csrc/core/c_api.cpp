// SPDX-License-Identifier: Apache-2.0
//
// What every entry point shares: version, instruction set, last error. The entry points themselves stand in the file of their op.
#include <cstring>

#include "kernels.h"
#include "status.h"

namespace v2drop {
namespace {

thread_local char last_error[sizeof(Error::message)] = "";

}  // namespace

v2drop_status record(v2drop_status status, const char* message) noexcept {
  std::strncpy(last_error, message, sizeof last_error - 1);
  return status;
}

}  // namespace v2drop

extern "C" {

int32_t v2drop_version(void) { return V2DROP_VERSION; }
const char* v2drop_isa(void) { return v2drop::kernels().isa; }
const char* v2drop_last_error(void) { return v2drop::last_error; }

}  // extern "C"
