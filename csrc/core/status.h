// SPDX-License-Identifier: Apache-2.0
//
// How errors cross the C interface: inside the library a failed check throws Error; every entry point runs inside guard(), which turns
// exceptions into a status and a thread-local message. Messages live in fixed arrays, so that reporting a lack of memory needs none.
#ifndef V2DROP_CORE_STATUS_H_
#define V2DROP_CORE_STATUS_H_

#include <cstdarg>
#include <cstdio>
#include <exception>
#include <new>

#include "v2drop/v2drop.h"

namespace v2drop {

struct Error {
  v2drop_status status;
  char message[256];
};

// Reports a bad argument. The message begins with the argument's name.
[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  Error error = {V2DROP_ERROR_ARGUMENT, ""};
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error.message, sizeof error.message, format, arguments);
  va_end(arguments);
  throw error;
}

// Reports anything else.
[[noreturn, gnu::format(printf, 2, 3)]] inline void fail_with(v2drop_status status, const char* format, ...) {
  Error error = {status, ""};
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error.message, sizeof error.message, format, arguments);
  va_end(arguments);
  throw error;
}

v2drop_status record(v2drop_status status, const char* message) noexcept;  // keeps the message for v2drop_last_error()

template <class Body>
v2drop_status guard(const Body& body) noexcept {
  try {
    body();
    return V2DROP_OK;
  } catch (const Error& error) {
    return record(error.status, error.message);
  } catch (const std::bad_alloc&) {
    return record(V2DROP_ERROR_MEMORY, "out of memory for scratch space");
  } catch (const std::exception& error) {
    return record(V2DROP_ERROR_INTERNAL, error.what());
  } catch (...) {
    return record(V2DROP_ERROR_INTERNAL, "unknown exception");
  }
}

}  // namespace v2drop

#endif  // V2DROP_CORE_STATUS_H_
