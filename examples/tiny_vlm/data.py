"""Pictures and questions of the tiny vision-language model, deterministic by seed.

A picture is 100 x 100 pixels, 10 x 10 patches of 10 x 10 pixels: noise, grey clutter, and nine handwritten digits (1 to 9, from
scikit-learn), one in each of 3 x 3 cells, each in another colour, each inside one patch that lies anywhere in its cell. The cells
are numbered like a telephone's keys: 1 2 3 / 4 5 6 / 7 8 9. Every question names a colour and needs the picture more than once.
`train` and `held-out` draw from disjoint sets of handwritten digits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "yellow": (1.0, 1.0, 0.1),
    "magenta": (1.0, 0.2, 1.0),
    "cyan": (0.1, 1.0, 1.0),
    "white": (1.0, 1.0, 1.0),
    "orange": (1.0, 0.55, 0.1),
    "purple": (0.55, 0.2, 0.8),
}
NAMES = tuple(COLOURS)
MOVES = {"right": (0, 1), "left": (0, -1), "below": (1, 0), "above": (-1, 0)}
WORDS = ("<pad>", "<bos>", "<eos>", "<image>", "?", *"123456789", *NAMES, *MOVES, "list", "row", "column", "trail", "next")
IDS = {word: i for i, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE, ASK = range(5)
PATCH, SIDE = 10, 10
PIXELS, TOKENS = PATCH * SIDE, SIDE * SIDE
# First patch row (or column) of each of the three bands of cells, and the end.
BANDS = (0, 3, 7, 10)
KINDS = ("list", "row", "column", "step", "steps", "trail", "hops")
SPLITS = ("train", "held-out")


class Scenes(NamedTuple):
    pixels: np.ndarray  # [B, 3, 100, 100] float32, about -0.3 to 1.3
    digits: np.ndarray  # [B, 9] 1 to 9, cell by cell
    colours: np.ndarray  # [B, 9] index into NAMES
    patches: np.ndarray  # [B, 9] patch (0 to 99) that holds the cell's digit


class Question(NamedTuple):
    kind: str
    words: tuple[str, ...]
    answer: tuple[int, ...]
    cells: tuple[int, ...]  # cells (0 to 8) that must be read, in the order of reading
    hints: tuple[int, ...]  # for each word the cell where the path stands after it, -1 if none; only training uses them


class Example(NamedTuple):
    pixels: np.ndarray  # [3, 100, 100]
    input_ids: tuple[int, ...]  # the prompt, image tokens included; the answer comes next
    answer: tuple[int, ...]
    question: Question
    order: str  # "after": the question stands after the image; "before"
    relevant: tuple[int, ...]  # patches that the question needs


@cache
def handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images [n, 8, 8] in 0 to 1 and labels [n] of one split; a quarter of scikit-learn's digits is held out."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    chosen = np.flatnonzero(labels > 0)[_is_held_out(split, int((labels > 0).sum()))]
    return images[chosen].reshape(-1, 8, 8).astype(np.float32) / 16, labels[chosen]


def _is_held_out(split: str, n: int) -> np.ndarray:
    # A fixed order of its own, so that no training seed can move a digit across the border.
    held_out = np.random.default_rng(20).permutation(n) % 4 == 0
    return held_out if split == "held-out" else ~held_out


def scenes(split: str, count: int, rng: np.random.Generator, *, warp: bool = False) -> Scenes:
    """`count` random pictures of a split; `warp` turns, scales and shears every digit a little, for training."""
    images, labels = handwriting(split)
    by_digit = [np.flatnonzero(labels == d) for d in range(10)]
    pixels = rng.normal(0.0, 0.05, (count, 3, PIXELS, PIXELS)).astype(np.float32)
    pixels += rng.uniform(0.0, 0.12, (count, 3, 1, 1)).astype(np.float32)
    digits = rng.integers(1, 10, (count, 9))
    colours = rng.permuted(np.tile(np.arange(9), (count, 1)), axis=1)
    patches = np.empty((count, 9), dtype=np.int64)
    items = np.arange(count)
    for cell in range(9):
        row, column = (rng.integers(BANDS[i], BANDS[i + 1], count) for i in divmod(cell, 3))
        patches[:, cell] = row * SIDE + column
        which = np.array([rng.choice(by_digit[d]) for d in digits[:, cell]])
        ink = np.asarray(list(COLOURS.values()), np.float32)[colours[:, cell]] * rng.uniform(0.85, 1.1, (count, 1)).astype(
            np.float32
        )
        marks = _warp(images[which], rng) if warp else images[which]
        _draw(pixels, items, patches[:, cell], marks, ink)
    # Clutter: as bright as a digit, but its pixels are shuffled and it is grey.
    for _ in range(6):
        where = rng.integers(0, TOKENS, count)
        free = ~(patches == where[:, None]).any(1)
        blots = rng.permuted(images[rng.integers(0, len(images), count)].reshape(count, 64), axis=1).reshape(count, 8, 8)
        grey = np.repeat(rng.uniform(0.35, 0.65, (count, 1)), 3, axis=1).astype(np.float32)
        _draw(pixels, items[free], where[free], blots[free], grey[free])
    return Scenes(pixels, digits, colours, patches)


def _draw(pixels: np.ndarray, items: np.ndarray, patch: np.ndarray, marks: np.ndarray, ink: np.ndarray) -> None:
    """Blend 8 x 8 `marks` of colour `ink` into the middle of their patches."""
    y = (patch // SIDE * PATCH)[:, None, None] + np.arange(1, 9)[:, None]
    x = (patch % SIDE * PATCH)[:, None, None] + np.arange(1, 9)
    for channel in range(3):
        at = items[:, None, None], channel, y, x
        pixels[at] = pixels[at] * (1 - marks) + marks * ink[:, channel, None, None]


def _warp(marks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each 8 x 8 mark under a random small affine map, bilinear."""
    count = len(marks)
    angle, shear = rng.uniform(-0.2, 0.2, count), rng.uniform(-0.2, 0.2, count)
    scale = rng.uniform(0.88, 1.12, (2, count))
    matrix = np.stack([np.cos(angle) * scale[0], -np.sin(angle) + shear, np.sin(angle), np.cos(angle) * scale[1]], axis=1).reshape(
        count, 2, 2
    )
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij")).reshape(2, 64) - 3.5
    at = matrix @ grid + 3.5 + rng.uniform(-0.4, 0.4, (count, 2, 1))
    low = np.floor(at).astype(np.int64)
    share = (at - low).astype(np.float32)
    padded = np.pad(marks, ((0, 0), (4, 4), (4, 4)))
    y, x = np.clip(low + 4, 0, 14).transpose(1, 0, 2)
    item = np.arange(count)[:, None]
    upper = padded[item, y, x] * (1 - share[:, 1]) + padded[item, y, x + 1] * share[:, 1]
    lower = padded[item, y + 1, x] * (1 - share[:, 1]) + padded[item, y + 1, x + 1] * share[:, 1]
    return (upper * (1 - share[:, 0]) + lower * share[:, 0]).reshape(count, 8, 8)


def ask(digits: np.ndarray, colours: np.ndarray, kind: str, rng: np.random.Generator) -> Question:
    """A question of a kind about one picture (`digits` [9], `colours` [9]) and its answer.

    list red blue cyan: the three digits. row red, column red: the three digits of red's row (left to right) or column (downwards).
    red right: the digit right of red. red below right: the digit right of the one below red. trail red: red's digit names a cell,
    the digit there names the next one, and so on; three digits found so. red next next: only the last digit of a trail of two.
    """
    cells = rng.permutation(9)
    start = int(cells[0])
    name = NAMES[colours[start]]
    row, column = divmod(start, 3)
    if kind == "list":
        read = cells[:3].tolist()
        return Question(
            kind,
            ("list", *(NAMES[colours[c]] for c in read)),
            tuple(int(digits[c]) for c in read),
            tuple(read),
            (-1, *read),
        )
    if kind in ("row", "column"):
        read = [row * 3 + i for i in range(3)] if kind == "row" else [i * 3 + column for i in range(3)]
        return Question(kind, (kind, name), tuple(int(digits[c]) for c in read), (start, *read), (-1, start))
    if kind in ("step", "steps"):
        moves: list[str] = []
        path = [start]
        for _ in range(1 if kind == "step" else 2):
            row, column = divmod(path[-1], 3)
            inside = [m for m, (down, right) in MOVES.items() if 0 <= row + down < 3 and 0 <= column + right < 3]
            # A step straight back would make the question a plain look-up.
            inside = [m for m in inside if (row + MOVES[m][0]) * 3 + column + MOVES[m][1] not in path]
            moves.append(inside[rng.integers(len(inside))])
            path.append((row + MOVES[moves[-1]][0]) * 3 + column + MOVES[moves[-1]][1])
        return Question(kind, (name, *moves), (int(digits[path[-1]]),), tuple(path), tuple(path))
    if kind in ("trail", "hops"):
        hops = 3 if kind == "trail" else 2
        paths = [_trail(digits, int(c), hops) for c in cells]
        # A trail that comes back to a cell tells less; few pictures have no other.
        path = next((p for p in paths if len(set(p)) == len(p)), paths[0])
        name = NAMES[colours[path[0]]]
        found = tuple(int(digits[c]) for c in path[1:])
        if kind == "trail":
            return Question(kind, ("trail", name), found, tuple(path), (-1, path[0]))
        return Question(kind, (name, "next", "next"), found[-1:], tuple(path), tuple(path))
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")


def _trail(digits: np.ndarray, start: int, hops: int) -> list[int]:
    path = [start]
    for _ in range(hops):
        path.append(int(digits[path[-1]]) - 1)
    return path


def prompt(words: tuple[str, ...], order: str = "after") -> tuple[int, ...]:
    """Token ids of a question with its image tokens; `order` places the question before or after the picture."""
    if order not in ("after", "before"):
        raise ValueError(f"order must be 'after' or 'before', got {order!r}")
    unknown = [word for word in words if word not in IDS]
    if unknown:
        raise ValueError(f"words must come from data.WORDS, got {unknown[0]!r}")
    ids, image = tuple(IDS[word] for word in words), (IMAGE,) * TOKENS
    return (BOS, *image, *ids, ASK) if order == "after" else (BOS, *ids, *image, ASK)


def decode(ids: list[int] | tuple[int, ...]) -> tuple[int, ...]:
    """Digits of generated token ids, up to the end token; a word that is no digit is kept as 0."""
    digits = []
    for token in ids:
        if token in (EOS, PAD):
            break
        digits.append(int(WORDS[token]) if WORDS[token].isdigit() else 0)
    return tuple(digits)


def examples(
    split: str, count: int, *, seed: int = 0, kinds: tuple[str, ...] = KINDS, orders: tuple[str, ...] = ("after", "before")
) -> list[Example]:
    """`count` questions, each about another picture; kinds and orders alternate."""
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    made = scenes(split, count, rng)
    found = []
    for i in range(count):
        question = ask(made.digits[i], made.colours[i], kinds[i % len(kinds)], rng)
        order = orders[i // len(kinds) % len(orders)]
        relevant = tuple(int(made.patches[i, c]) for c in dict.fromkeys(question.cells))
        found.append(Example(made.pixels[i], prompt(question.words, order), question.answer, question, order, relevant))
    return found
