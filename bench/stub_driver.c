// A CUDA driver that does nothing, for Triton's launcher on a machine without a GPU: what is left of a launch is its host time.
// Built and used by bench/stub_driver.py. Only what that launcher calls is here; every call succeeds.
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;
typedef void* Handle;

static long launches;

long stub_launches(void) { return launches; }

CUresult cuInit(unsigned flags) { return (void)flags, 0; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, 0; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, 0; }
CUresult cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
CUresult cuDevicePrimaryCtxRetain(Handle* context, int device) { return (void)device, *context = (Handle)1, 0; }
CUresult cuCtxGetCurrent(Handle* context) { return *context = (Handle)1, 0; }
CUresult cuCtxSetCurrent(Handle context) { return (void)context, 0; }
CUresult cuCtxGetDevice(int* device) { return *device = 0, 0; }
CUresult cuCtxGetLimit(size_t* value, int limit) { return (void)limit, *value = 0, 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, 0; }
CUresult cuStreamIsCapturing(Handle stream, int* status) { return (void)stream, *status = 0, 0; }
CUresult cuModuleLoadData(Handle* module, const void* image) { return (void)image, *module = (Handle)1, 0; }
CUresult cuModuleUnload(Handle module) { return (void)module, 0; }
CUresult cuModuleGetFunction(Handle* function, Handle module, const char* name) {
  return (void)module, (void)name, *function = (Handle)1, 0;
}
// Attribute 0 is the most threads of a block; the others are registers and bytes of memory.
CUresult cuFuncGetAttribute(int* value, int attribute, Handle function) { return (void)function, *value = attribute ? 0 : 1024, 0; }
CUresult cuFuncSetAttribute(Handle function, int attribute, int value) { return (void)function, (void)attribute, (void)value, 0; }
CUresult cuFuncSetCacheConfig(Handle function, int config) { return (void)function, (void)config, 0; }
CUresult cuOccupancyMaxActiveClusters(int* clusters, Handle function, const void* config) {
  return (void)function, (void)config, *clusters = 1, 0;
}
CUresult cuTensorMapEncodeTiled(void) { return 0; }
CUresult cuTensorMapEncodeIm2col(void) { return 0; }
CUresult cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) { return (void)attribute, *(uint64_t*)data = pointer, 0; }
CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** data, uint64_t pointer) {
  return (void)count, (void)attributes, (void)data, (void)pointer, 0;
}
CUresult cuLaunchKernelEx(const void* config, Handle function, void** parameters, void** extra) {
  return (void)config, (void)function, (void)parameters, (void)extra, ++launches, 0;
}
CUresult cuGetErrorString(CUresult error, const char** text) { return (void)error, *text = "no error", 0; }

// Of an H200: compute capability, multiprocessors, registers, shared memory; 1 for what nobody decides by.
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 75:
      return *value = 9, 0;
    case 76:
      return *value = 0, 0;
    case 16:
      return *value = 132, 0;
    case 12:
      return *value = 65536, 0;
    case 10:
      return *value = 32, 0;
    case 97:
      return *value = 232448, 0;
    default:
      return *value = 1, 0;
  }
}
