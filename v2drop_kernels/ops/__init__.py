"""One folder per op: the public function, its plain-PyTorch reference, its Triton kernels, its native call, its torch op."""
