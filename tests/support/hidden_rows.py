"""The specification of drops in any model: its undropped forward, in which dropped rows are hidden from their layer on."""

from __future__ import annotations

import functools

import torch

from v2drop_kernels.core.counts import n_keep


class HiddenRows:
    """Hooks on the blocks of an undropped model; ``kept`` holds the droppable rows of every item that each stage kept.

    ``vision`` is bool ``[B, N]``. A stage ranks by the norm of what the block before it changed in a row, in float32, and of equal
    rows takes the first. Rows are hidden by the mask of every later forward too, so the model decodes from its own full cache.
    """

    def __init__(self, model, decoder, vision, schedule):
        self.schedule = {stage.layer: stage for stage in schedule.stages}
        self.per = schedule.per
        self.vision, self.gone, self.kept, self.change = vision, {}, [], None
        self.handles = []
        for index, layer in enumerate(decoder.layers):
            self.handles += [
                layer.register_forward_pre_hook(lambda m, args, kw, i=index: self.before(i, args, kw), with_kwargs=True),
                layer.register_forward_hook(lambda m, args, kw, out: self.after(args, kw, out), with_kwargs=True),
            ]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def after(self, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        output = output[0] if isinstance(output, tuple) else output
        self.change = (output.float() - hidden.float()).norm(dim=-1)

    def before(self, index, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        prompt = self.vision.shape[1]
        if hidden.shape[1] == prompt and index == 0:
            self.gone, self.kept = {0: torch.zeros_like(self.vision)}, []
        if hidden.shape[1] == prompt and index:
            self.gone[index] = self.gone[index - 1]
            if index in self.schedule:
                self.gone[index] = self.drop(self.schedule[index], self.gone[index])
        if not self.gone[index].any():
            return None
        mask = kwargs["attention_mask"]
        rows = hidden.shape[1]
        cache = kwargs.get("past_key_values")
        keys = rows if cache is None else cache.get_mask_sizes(rows, index)[0]
        total = prompt if rows == prompt else self.total(cache, rows, index)
        if mask is None:
            mask = torch.ones(rows, total, dtype=torch.bool).tril(total - rows)[None, None, :, total - keys :]
        gone = torch.nn.functional.pad(self.gone[index], (0, total - prompt))[:, total - keys :]
        own = torch.arange(total - rows, total)[:, None] == torch.arange(total - keys, total)
        hide = gone[:, None, None, :] & ~own
        empty = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.expand(hide.shape[0], -1, -1, -1).masked_fill(hide, empty)
        return args, {**kwargs, "attention_mask": mask}

    @staticmethod
    def total(cache, rows, index):
        return cache.layers[index].get_seq_length() + rows

    def drop(self, stage, gone):
        gone, kept = gone.clone(), []
        for item, row in enumerate(self.vision & ~gone):
            left, best = row.nonzero().flatten().tolist(), []
            starts = self.vision[item] & ~torch.nn.functional.pad(self.vision[item], (1, 0))[:-1]
            image = starts.cumsum(0).tolist() if self.per == "image" else [0] * len(row)
            for number in {image[r] for r in left}:
                mine = [r for r in left if image[r] == number]
                n = len(mine)
                count = min(n, stage.keep) if isinstance(stage.keep, int) else n_keep(n, stage.keep, stage.rounding, stage.at_least)
                best += sorted(mine, key=lambda r: (-float(self.change[item, r]), r))[:count]
            gone[item, [r for r in left if r not in best]] = True
            kept.append(sorted(best))
        self.kept.append(kept)
        return gone


class AbsentRows(HiddenRows):
    """The specification for blocks with a state: from the block of its drop on, a row is physically absent.

    Every block runs item by item on the rows that are left, without padding and without a cache; so tokens behind the prompt are
    given with it, and ``vision`` is False for them. ``real`` is bool ``[B, N]``.
    """

    def __init__(self, model, decoder, vision, schedule, real):
        super().__init__(model, decoder, vision, schedule)
        self.real, self.layers = real, decoder.layers
        for index, layer in enumerate(decoder.layers):
            layer.forward = functools.partial(self.forward, index, layer.forward)

    def __exit__(self, *error):
        super().__exit__(*error)
        for layer in self.layers:
            del layer.forward

    def forward(self, index, run, hidden, *args, **kwargs):
        out = hidden.clone()
        for item, gone in enumerate(self.gone[index]):
            rows = (self.real[item] & ~gone).nonzero().flatten()
            rope = tuple(x[item if len(x) > 1 else 0, rows][None] for x in kwargs["position_embeddings"])
            alone = kwargs | {"attention_mask": None, "position_ids": None, "past_key_values": None, "position_embeddings": rope}
            out[item, rows] = run(hidden[item : item + 1, rows], *args, **alone)[0]
        return out

    def before(self, index, args, kwargs):
        super().before(index, args, kwargs | {"attention_mask": None})
