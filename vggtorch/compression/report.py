"""What `compress` did, as a value and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from vggtorch.text import table


@dataclass(frozen=True)
class LayerChange:
    """What became of a layer.

    Attributes:
        name: of the layer; those in its place have its name too, with a suffix, but for the last.
        method: what was put in its place, or None where it stayed.
        ranks: channels between the layers in its place.
        before, after: what it costs for one image, in multiply-adds or seconds (`by`).
    """

    name: str
    method: str | None
    ranks: tuple[int, ...]
    before: float
    after: float


@dataclass(frozen=True)
class Compression:
    """What `compress` did and how well the result matches, on images that it wasn't fitted to.

    Attributes:
        by: what costs are: `multiply-adds` or `seconds`.
        before, after: what the whole network costs for one image.
        layers: what became of each layer that could have been replaced, in the order of the
            network.
        closed_form: cosine between the original's maps and the result's by layer name, the mean
            over held-out images, before the training.
        likeness: the same at the end.
        steps: optimizer steps taken.
        seconds: wall-clock time of the whole.
    """

    by: str
    before: float
    after: float
    layers: tuple[LayerChange, ...]
    closed_form: dict[str, float]
    likeness: dict[str, float]
    steps: int
    seconds: float

    @property
    def times(self) -> float:
        """How many times less the result costs."""
        return self.before / self.after

    def __str__(self) -> str:
        return self.as_text()

    def as_text(self, width: int | None = None) -> str:
        """A table that is at most so many characters wide, if need be with two lines a row."""
        unit, scale, digits = ("M", 1e-6, 1) if self.by == "multiply-adds" else ("ms", 1e3, 3)
        lines: list[tuple[str, ...]] = [
            ("layer", "in its place", "ranks", f"{self.by}, {unit}", "after", "")
        ]
        whole = LayerChange("whole network", None, (), self.before, self.after)
        for row in (*self.layers, whole):
            ratio = f"1/{row.before / row.after:.2f}" if 0 < row.after < row.before else ""
            cells = (f"{scale * n:,.{digits}f}" for n in (row.before, row.after))
            ranks = ", ".join(map(str, row.ranks))
            lines.append((row.name, row.method or "", ranks, *cells, ratio))
        text = [table(lines, 3, width)]
        text.append(f"cosine to the original's maps, after {self.steps} steps of training:")
        longest = max(map(len, self.likeness))
        for name, value in self.likeness.items():
            first = self.closed_form[name]
            text.append(f"  {name:{longest}}  {value:.4f}  (before them {first:.4f})")
        return "\n".join(text)
