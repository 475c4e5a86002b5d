"""The docstrings of the ops for NumPy and for JAX: one template per op, and what differs between the libraries.

``documented(WORDS)`` is a decorator that fills the template of the function's name with the words of a library.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from string import Template
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def documented(words: Mapping[str, str]) -> Callable[[F], F]:
    """A decorator that gives a function the docstring of its name, in the words of a library."""

    def decorate(function: F) -> F:
        text = inspect.cleandoc(_TEMPLATES[function.__name__]).replace("\n$threads", words["threads"])
        function.__doc__ = Template(Template(text).substitute(words)).substitute(words)
        return function

    return decorate


NUMPY = {
    "library": "NumPy",
    "array": "array",
    "integers": "integer array",
    "index": "int64",
    "errors": "ValueError, TypeError, RuntimeError",
    "threads": "\nthreads : int\n    CPU threads that the call may use; 0 means all. The result does not depend on it.",
    "strides": "\n    Any strides; an array whose last dimension is not contiguous is copied once.",
    "cu_seqlens": " They are read on the host; an array on a GPU is copied there first.",
    "devices": ", devices",
    "unbuilt": "\nRuntimeError\n    The native library is not built, or it is built without CUDA and the arrays are in GPU memory.",
    "traced": "",
    "bad_row": "A row of ``keep`` outside the input also raises on a CPU; on a GPU it gives an empty row.",
    "layout": "``layout`` is the ``droppable=`` of the next stage.",
    "score_gradient": "",
    "topk_gradient": "",
    "compact_gradient": "The bytes of every array are copied unchanged.",
    "drop_gradient": "",
    "plain_score": 'np.linalg.norm(h_cur.astype("f4") - h_prev.astype("f4"), axis=-1)',
    "plain_topk": 'np.sort(np.argsort(-scores, axis=-1, kind="stable")[:, :k])',
    "plain_compact": "np.take_along_axis(hidden, keep[..., None], axis=1)",
    "plain_drop": "s = np.linalg.norm(h_cur[0, a:b] - h_prev[0, a:b], axis=-1)``,\n"
    '``i = a + np.sort(np.argsort(-s, kind="stable")[:k])``, ``keep = np.r_[:a, i, b:N]',
    "np": "np",
}
JAX = {
    "library": "JAX",
    "array": "Array",
    "integers": "integer Array",
    "index": "int32",
    "errors": "ValueError, TypeError",
    "threads": "",
    "strides": "",
    "cu_seqlens": "",
    "devices": "",
    "unbuilt": "",
    "traced": ";\n    an argument that must be known on the host is traced",
    "bad_row": "A row of ``keep`` outside the input is an error of the XLA runtime on a CPU; on a GPU it gives an empty row.",
    "layout": "``layout`` is None, because a jitted function cannot\n    return one; use ``TokenLayout.after(k)`` instead.",
    "score_gradient": " Differentiable in both hidden states; the subgradient at score 0 is 0.",
    "topk_gradient": " The values carry the gradient of ``scores``.",
    "compact_gradient": "Differentiable in ``hidden``, ``kv`` and ``rope``.",
    "drop_gradient": " Gradients reach ``h_cur`` through the kept rows,\n``kv`` and ``rope``; the choice of rows has none.",
    "plain_score": 'jnp.linalg.norm(h_cur.astype("f4") - h_prev.astype("f4"), axis=-1)',
    "plain_topk": "jnp.sort(jax.lax.top_k(scores, k)[1])",
    "plain_compact": "jnp.take_along_axis(hidden, keep[..., None], axis=1)",
    "plain_drop": "s = jnp.linalg.norm(h_cur[0, a:b] - h_prev[0, a:b], axis=-1)``,\n"
    "``i = a + jnp.sort(jax.lax.top_k(s, k)[1])``, ``keep = jnp.concatenate([jnp.arange(a), i, jnp.arange(b, N)])",
    "np": "jnp",
}

_TEMPLATES = {
    "variation_score": """
        Score every token by the change that one decoder layer made to it.

        Parameters
        ----------
        h_prev, h_cur : $array
            Hidden states before and after the layer, ``[B, N, D]`` or packed ``[T, D]``; float32, float16 or bfloat16.$strides
        metric : {"l2", "l1", "cosine"}
            The norm of ``h_cur - h_prev``, or ``1 - cos(h_prev, h_cur)``.
        score_dtype : dtype, optional
            Round the difference and the score to this dtype, which may also be given by its name. Default: float32 throughout.
        $threads

        Returns
        -------
        $array
            float32 ``[B, N]`` or ``[T]``.

        Raises
        ------
        ValueError, TypeError
            Shapes$devices or dtypes differ, or the metric is unknown; the message names the argument.$unbuilt

        Notes
        -----
        Sums are float32.$score_gradient Equivalent plain $library:
        ``$plain_score``.

        Examples
        --------
        >>> variation_score($np.zeros((1, 2, 4), $np.float32), $np.ones((1, 2, 4), $np.float32)).tolist()
        [[2.0, 2.0]]
        """,
    "segmented_topk": """
        Keep the k highest scores of every segment.

        Parameters
        ----------
        scores : $array
            ``[B, N]``, or packed ``[T]`` with ``cu_seqlens``; float32, float16 or bfloat16.
        k : int | list of int | integer array
            Tokens to keep: one count for all segments, or one per segment. 0 is allowed; a segment with fewer than ``k``
            tokens is kept whole.
        cu_seqlens : sequence of int | integer array, optional
            ``[B + 1]`` offsets of a packed batch.$cu_seqlens
        droppable : optional
            Which tokens compete: None for all, one ``(start, stop)`` for every item, a list with the spans of each item (every
            span is a segment), or a :class:`TokenLayout` of spans.
        order : {"position", "score"}
            Indices ascend, or follow the score.
        $threads

        Returns
        -------
        TopK
            ``values`` and $index ``indices`` ``[G, K]``, one row per segment: positions along ``N`` (padded) or rows of ``T``
            (packed). A segment that keeps fewer than ``K`` is filled at its end with value -inf and index -1.

        Raises
        ------
        $errors
            As in :func:`variation_score`; the spans, offsets or counts are invalid$traced.

        Notes
        -----
        The order is (score descending, index ascending): NaN ranks above +inf, -0.0 equals 0.0.$topk_gradient
        Equivalent plain $library for one budget and no NaN: ``$plain_topk``.

        Examples
        --------
        >>> segmented_topk($np.array([[1, 3, 2]], $np.float32), 2).indices.tolist()
        [[1, 2]]
        """,
    "variation_topk": """
        Keep the k tokens of every segment that one decoder layer changed most; score and select in one call.

        Parameters
        ----------
        h_prev, h_cur, metric, score_dtype
            As in :func:`variation_score`.
        k, cu_seqlens, droppable, order
            As in :func:`segmented_topk`.
        $threads

        Returns
        -------
        TopK
            As :func:`segmented_topk`; values are float32.

        Raises
        ------
        $errors
            As both.

        Notes
        -----
        Equivalent: ``segmented_topk(variation_score(h_prev, h_cur), k)``.$topk_gradient

        Examples
        --------
        >>> h = $np.zeros((1, 3, 4), $np.float32)
        >>> variation_topk(h, h + $np.array([[[1], [3], [2]]], $np.float32), 2).indices.tolist()
        [[1, 2]]
        """,
    "compact": """
        Gather the kept rows of everything that belongs to a batch, in one pass.

        Parameters
        ----------
        keep : $integers | TopK
            Rows that survive: ``[B, S]`` positions along ``N``, or ``[T']`` rows of ``T`` for a packed batch; -1 is an empty row
            (padding). Any order; each row at most once.
        hidden : $array
            ``[B, N, ...]``, or packed ``[T, ...]`` with ``cu_seqlens``; any dtype.
        position_ids : $array, optional
            ``[B, N]``, ``[1, N]`` or M-RoPE's ``[3, B, N]`` (packed ``[T]`` or ``[3, T]``).
        kv : $array or nested tuples/lists, optional
            K and V of any number of layers, ``[B, H, N, D]`` or ``[B, N, H, D]`` (packed without ``B``); any dtype.
        kv_layout : {"BHSD", "BSHD"}
            Which of the two the arrays of ``kv`` have.
        attention_mask : $array, optional
            ``[B, N]``, any dtype. Padding of the result is 0.
        rope : tuple of $array, optional
            (cos, sin) tables ``[B, N, R]``, ``[1, N, R]``, ``[N, R]`` or ``[3, B, N, R]``.
        labels : $array, optional
            ``[B, N]`` signed integers. Padding of the result is -100.
        cu_seqlens
            As in :func:`segmented_topk`.
        $threads

        Returns
        -------
        Compacted
            Every given array with the kept rows only.

        Raises
        ------
        $errors
            As in :func:`variation_score`. $bad_row

        Notes
        -----
        $compact_gradient Equivalent plain $library: ``$plain_compact``.

        Examples
        --------
        >>> compact($np.array([[0, 2]]), $np.arange(6.0).reshape(1, 3, 2)).hidden.tolist()
        [[[0.0, 1.0], [4.0, 5.0]]]
        """,
    "drop_tokens": """
        Drop all but the k droppable tokens of every segment that the last layer changed most, and compact the rest.

        Parameters
        ----------
        h_prev, h_cur : $array
            Hidden states before and after the layer, ``[B, N, D]`` or packed ``[T, D]``; the rows of ``h_cur`` are returned.
        k, droppable, cu_seqlens
            As in :func:`segmented_topk`; tokens that are not droppable (text, system prompt) are all kept.
        scores : $array, optional
            Floating point ``[B, N]`` (packed ``[T]``): rank by these instead; ``h_prev`` may then be None.
        position_ids, kv, kv_layout, attention_mask, rope, labels
            As in :func:`compact`; kept tokens keep their position ids.
        metric, score_dtype
            As in :func:`variation_score`.
        $threads

        Returns
        -------
        Dropped
            ``hidden`` ``[B, S, D]``, ``keep`` ``[B, S]`` (input rows, ascending, -1 for padding), and everything else that was
            given. $layout

        Raises
        ------
        $errors
            As in :func:`variation_score`; the arrays do not agree, or the spans or counts are invalid$traced.

        Notes
        -----
        Order and ties are those of :func:`segmented_topk`.$drop_gradient
        Equivalent plain $library for one item and one span ``[a, b)``: ``$plain_drop``,
        then ``h_cur[:, keep]`` and the same for every other array.

        Examples
        --------
        >>> h = $np.zeros((1, 5, 4), $np.float32)
        >>> grown = h + $np.array([0, 1, 3, 2, 0], $np.float32)[None, :, None]
        >>> drop_tokens(h, grown, 2, droppable=(1, 4)).keep.tolist()
        [[0, 2, 3, 4]]
        """,
}
