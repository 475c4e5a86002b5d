// SPDX-License-Identifier: Apache-2.0
//
// The rules for single tensors that the checks of all entry points share. Each throws Error, whose message begins with `name`.
#ifndef V2DROP_CORE_CHECKS_H_
#define V2DROP_CORE_CHECKS_H_

#include "request.h"

namespace v2drop {

// Sound in itself: known dtype, sane rank and extents, data where there are elements, and all offsets within 64 bits.
void check_tensor(const char* name, const v2drop_tensor* tensor);
bool is_empty(const v2drop_tensor& tensor);
void check_dtype(const char* name, const v2drop_tensor& tensor, int32_t dtype, const char* dtype_name);
void check_float(const char* name, const v2drop_tensor& tensor);
// [batch, rows] or [rows], and with `has_dim` one more dimension of stride 1.
RowView check_rows(const char* name, const v2drop_tensor* tensor, bool has_dim);
void check_same_rows(const char* name, const RowView& view, const char* model_name, const RowView& model);
// A result must not overlap itself, or its rows would overwrite each other.
void check_writable(const char* name, const v2drop_tensor& tensor);
void check_contiguous(const char* name, const v2drop_tensor& tensor);

}  // namespace v2drop

#endif  // V2DROP_CORE_CHECKS_H_
