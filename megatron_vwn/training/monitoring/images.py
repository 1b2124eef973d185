"""Pictures of a snapshot as [H, W, 3] arrays of bytes, near square because TensorBoard fits them into square cards.

Drawn with numpy and Pillow, which TensorBoard needs itself; matplotlib would take longer than a training step.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_vwn.training.monitoring.snapshot import Snapshot

# A card of TensorBoard is about 360 pixels wide and shrinks what is wider: pixels that a picture takes at least in
# width and, as far as whole cells allow, in one direction; and the largest cell of a matrix.
_SIZE, _CELL = 336, 28
_WHITE, _INK, _LINE, _NOTHING = (255, 255, 255), (40, 40, 40), (90, 90, 90), (226, 226, 226)
_RED, _BLUE, _VIOLET = (178, 24, 43), (33, 102, 172), (84, 39, 143)
_TEXT, _MARGIN, _GAP = 12, 8, 6
# Of a colour: more make files larger, whose checksum TensorBoard computes byte by byte.
_SHADES = 24


def images(snapshot: Snapshot) -> dict[str, np.ndarray]:
    """By tag: ``vwn/routing`` and, of dynamic connections, its static part and spread; ``vwn/segment_norms``; and
    ``vwn/depth_receptive_field`` of the trunk, with a suffix of every further prediction."""
    connections = snapshot.connections.values()
    m = next(iter(connections)).m
    labels = [f"mtp {p.depth}: {p.number}" if p.depth else str(p.number) for p in snapshot.connections]
    found = {"vwn/routing": mosaic([c.mean for c in connections], labels, m, "A_read | A_carry | B, token mean")}
    if any(c.spread.any() for c in connections):
        found["vwn/routing_static"] = mosaic([c.static for c in connections], labels, m, "the same, static part")
        found["vwn/routing_spread"] = mosaic(
            [c.spread for c in connections], labels, m, "the same, standard deviation over tokens", signed=False
        )
    norms = np.stack([c.segment_norms for c in connections])
    with np.errstate(invalid="ignore"):  # a run that diverges is shown too
        relative = norms / np.maximum(norms.mean(1, keepdims=True), 1e-30)
    found["vwn/segment_norms"] = heat_map(
        relative, labels, [str(j) for j in range(norms.shape[1])], "layer", "segment: norm over the layer's mean", 2.0
    )
    for depth, chain in snapshot.chains.items():
        suffix = f"_mtp_{depth}" if depth else ""
        field = snapshot.receptive_fields[depth].numpy()
        found[f"vwn/depth_receptive_field{suffix}"] = depth_map(field, [place.number for place in chain])
    return found


def mosaic(
    matrices: Sequence[np.ndarray], labels: Sequence[str], m: int, title: str, *, signed: bool = True
) -> np.ndarray:
    """All connections side by side, each an [n, m + n + m] picture with lines between read, carry and write.

    Args:
        matrices: per connection.
        labels: of the connections.
        m: fraction rate.
        title: what they are.
        signed: blue for -1, white for 0, red for 1, which is what a coefficient is born as; else white for 0 and
            violet for the largest of all.
    """
    rows, columns = np.shape(matrices[0])
    limit = 1.0 if signed else _largest(matrices)
    across = min(range(1, len(matrices) + 1), key=lambda k: _oblongness(len(matrices), k, rows + 2, columns + 1))
    down = math.ceil(len(matrices) / across)
    cell = _cell_size(max(down * (rows + 2), across * (columns + 1)))
    width, height = columns * cell + 2, rows * cell
    canvas = _Canvas(
        across * (width + _GAP) - _GAP, down * (height + _TEXT + 2 + _GAP) - _GAP, title, limit, signed=signed
    )
    for number, (matrix, label) in enumerate(zip(matrices, labels, strict=True)):
        x, y = number % across * (width + _GAP), number // across * (height + _TEXT + 2 + _GAP)
        canvas.text(x, y, label)
        y += _TEXT + 2
        parts = np.split(_coloured(np.asarray(matrix), limit, signed=signed), [m, columns - m], axis=1)
        for part, left in zip(parts, (0, m * cell + 1, (columns - m) * cell + 2), strict=True):
            canvas.paste(x + left, y, _enlarged(part, cell))
        for separator in (m * cell, (columns - m) * cell + 1):
            canvas.line(x + separator, y, height)
        canvas.frame(x, y, width, height)
    return canvas.pixels()


def heat_map(
    values: np.ndarray, row_labels: Sequence[str], column_labels: Sequence[str], rows: str, title: str, limit: float
) -> np.ndarray:
    """Non-negative values as shades of violet, white for 0; NaN is grey."""
    return _heat_map(values, row_labels, column_labels, f"{rows} / {title}", limit, split=None)


def depth_map(field: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """The lower triangle of ``receptive_field``: a row per reading layer; column 0 is the state before the first one,
    the others are what the layers before the last wrote.

    Args:
        field: [L, 1 + L].
        numbers: of the layers.
    """
    length = len(field)
    shown = np.where(np.tril(np.ones((length, length), dtype=bool)), field[:, :-1], np.nan)
    labels = [str(number) for number in numbers]
    columns = ["0", *labels[:-1]]
    return _heat_map(shown, labels, columns, "layer reads / from layer (0: first state)", _largest([field]), split=1)


def _heat_map(
    values: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str,
    limit: float,
    *,
    split: int | None,
) -> np.ndarray:
    rows, columns = values.shape
    # Oblong cells where the matrix is oblong, so that the picture is none.
    longest = max(rows, columns)
    cell = max(1, round(_SIZE / longest))
    high, wide = (max(cell, round(cell * longest / count)) for count in (rows, columns))
    left = 4 + max(_text_width(label) for label in row_labels)
    canvas = _Canvas(left + wide * columns, _TEXT + 4 + high * rows, title, limit, signed=False)
    for number in _ticks(rows, high):
        canvas.text(0, _TEXT + 4 + number * high + (high - _TEXT) // 2, row_labels[number])
    for number in _ticks(columns, wide / 2):
        canvas.text(left + number * wide + wide // 2, 0, column_labels[number], centred=True)
    canvas.paste(left, _TEXT + 4, _enlarged(_coloured(values, limit, signed=False), high, wide))
    if split is not None:
        canvas.line(left + split * wide, _TEXT + 4, high * rows)
    canvas.frame(left, _TEXT + 4, wide * columns, high * rows)
    return canvas.pixels()


class _Canvas:
    """A white picture with a title and a scale of colours above what is drawn."""

    def __init__(self, width: int, height: int, title: str, limit: float, *, signed: bool):
        self._font = _font()
        ends = ("-1", "1") if signed else ("0", f"{limit:.3g}")
        bar = 64
        scale = bar + sum(map(_text_width, ends)) + 8
        above = 2 * _TEXT + _GAP + 8
        width = max(width, _text_width(title), scale, _SIZE)
        self._image = Image.new("RGB", (width + 2 * _MARGIN, height + above + 2 * _MARGIN), _WHITE)
        self._draw = ImageDraw.Draw(self._image)
        self._x = self._y = _MARGIN
        self.text(0, -2, title)
        shades = np.linspace(-limit if signed else 0, limit, bar)[None].repeat(_TEXT - 2, axis=0)
        self.text(0, _TEXT + 3, ends[0])
        self.paste(_text_width(ends[0]) + 4, _TEXT + 5, _coloured(shades, limit, signed=signed))
        self.frame(_text_width(ends[0]) + 4, _TEXT + 5, bar, _TEXT - 2)
        self.text(_text_width(ends[0]) + bar + 8, _TEXT + 3, ends[1])
        self._y += above

    def text(self, x: int, y: int, text: str, *, centred: bool = False) -> None:
        if centred:
            x -= _text_width(text) // 2
        self._draw.text((self._x + x, self._y + y), text, fill=_INK, font=self._font)

    def paste(self, x: int, y: int, pixels: np.ndarray) -> None:
        self._image.paste(Image.fromarray(pixels), (self._x + x, self._y + y))

    def line(self, x: int, y: int, height: int) -> None:
        self._draw.line([(self._x + x, self._y + y), (self._x + x, self._y + y + height - 1)], fill=_INK)

    def frame(self, x: int, y: int, width: int, height: int) -> None:
        box = [self._x + x - 1, self._y + y - 1, self._x + x + width, self._y + y + height]
        self._draw.rectangle(box, outline=_LINE)

    def pixels(self) -> np.ndarray:
        return np.asarray(self._image)


@cache
def _font():
    return ImageFont.load_default(_TEXT)


def _text_width(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _coloured(values: np.ndarray, limit: float, *, signed: bool) -> np.ndarray:
    """[H, W] to [H, W, 3] bytes."""
    shades = _shades(signed)
    steps = np.clip(np.nan_to_num(np.asarray(values) / limit), -1, 1) * _SHADES
    return shades[np.where(np.isfinite(values), steps.round().astype(int) + _SHADES, len(shades) - 1)]


@cache
def _shades(signed: bool) -> np.ndarray:
    """[2 * _SHADES + 2, 3] bytes: from -1 to 1, and last what is no number."""
    strength = np.linspace(-1, 1, 2 * _SHADES + 1)[:, None]
    white, end = np.asarray(_WHITE), np.where(strength < 0, _BLUE, _RED) if signed else np.asarray(_VIOLET)[None]
    return np.concatenate([white + np.abs(strength) * (end - white), [_NOTHING]]).round().astype(np.uint8)


def _enlarged(pixels: np.ndarray, high: int, wide: int | None = None) -> np.ndarray:
    return pixels.repeat(high, axis=0).repeat(wide or high, axis=1)


def _largest(matrices: Sequence[np.ndarray]) -> float:
    """Of all finite values; 1 where there is nothing above zero."""
    values = np.concatenate([np.ravel(matrix) for matrix in matrices])
    return float(np.max(values, initial=0.0, where=np.isfinite(values))) or 1.0


def _oblongness(count: int, across: int, rows: int, columns: int) -> float:
    """How far from square a grid is, with what stays empty in its last row counted as well."""
    width, height = across * columns, math.ceil(count / across) * rows
    return abs(math.log(width / height)) + (width * height - count * rows * columns) / (width * height)


def _cell_size(cells: int) -> int:
    return max(1, min(_CELL, round(_SIZE / cells)))


def _ticks(count: int, size: float) -> range:
    """Which of so many labels fit."""
    return range(0, count, max(1, math.ceil((_TEXT + 2) / size)))
