"""The tests of the ops, run for the Triton backend on CPU tensors: the same functions, a thinner matrix (see
``cases.cross``)."""

# ruff: noqa: F403
from test_attention_score import *
from test_autograd import *
from test_compact import *
from test_compact_inplace import *
from test_determinism import *
from test_device_lengths import *
from test_drop_tokens import *
from test_large_offsets import *
from test_poison import *
from test_properties import *
from test_segmented_topk import *
from test_similarity import *
from test_variation_score import *
from test_variation_topk import *
