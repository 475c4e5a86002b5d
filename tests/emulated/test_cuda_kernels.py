"""The tests of the ops, run for the CUDA backend on CPU tensors."""

# ruff: noqa: F403
from test_array import cupy, test_arrays_in_two_places, test_arrays_on_a_gpu  # noqa: F401
from test_attention_score import *
from test_autograd import *
from test_compact import *
from test_compact_inplace import *
from test_cuda import *
from test_determinism import *
from test_device_lengths import *
from test_drop_tokens import *
from test_errors import test_compact_reads_rows_out_of_range_as_empty  # noqa: F401
from test_large_offsets import *
from test_out import *
from test_poison import *
from test_properties import *
from test_segmented_topk import *
from test_similarity import *
from test_variation_score import *
from test_variation_topk import *
