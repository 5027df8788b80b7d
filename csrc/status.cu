#include "common.cuh"

#ifndef S2D_ARCHITECTURES  // CMakeLists.txt's list
#define S2D_ARCHITECTURES "unknown"
#endif

int s2d_abi_version(void) { return S2D_ABI_VERSION; }

const char* s2d_architectures(void) { return S2D_ARCHITECTURES; }

const char* s2d_status_string(int status) {
  switch (status) {
    case S2D_OK:
      return "ok";
    case S2D_BAD_ARGUMENT:
      return "bad argument: a negative size, a null or misaligned pointer, overlapping rows, an unknown dtype or a "
             "rank out of range";
    case S2D_BAD_WORKSPACE:
      return "the workspace is smaller than its query says, or not 256-byte aligned";
    case S2D_UNSUPPORTED:
      return "these sizes are not supported on this device";
    case S2D_NO_KERNEL:
      return "the library holds no code for this device";
    case S2D_LAUNCH_FAILED:
      return "the kernel could not be launched";
    default:
#ifndef S2D_EMULATED
      if (status >= S2D_CUDA_ERROR) return cudaGetErrorString(static_cast<cudaError_t>(status - S2D_CUDA_ERROR));
#endif
      return "unknown status";
  }
}

int s2d_check_device(void) {
  for (const auto load : {s2d::load_penalty_grad, s2d::load_topk_svd, s2d::load_adamw, s2d::load_capture,
                          s2d::load_quantize, s2d::load_integer_gemm}) {
    if (const int status = load()) return status;
  }
  return S2D_OK;
}
