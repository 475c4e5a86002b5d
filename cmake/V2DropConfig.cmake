# SPDX-License-Identifier: Apache-2.0
#
# find_package(V2Drop) gives the target V2Drop::v2drop. The library carries all that it needs, so there is nothing else to find.
include("${CMAKE_CURRENT_LIST_DIR}/V2DropTargets.cmake")
