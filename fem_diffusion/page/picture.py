"""Pictures of a page, as text that it holds inline: vector graphics in which meshes are raster images."""

import base64
import io
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

__all__ = ["Picture", "new_figure", "picture_of"]

_DPI = 110      # of what is raster


@dataclass(frozen=True)
class Picture:
    """An image as a data address, its title, and what it shows in words; wide ones take a row of their own."""

    source: str
    title: str
    words: str
    wide: bool = False


def new_figure(width: float = 4.6, height: float = 3.9) -> Figure:
    """A figure that pyplot does not know of: users' own figures and settings stay as they are."""
    return Figure(figsize=(width, height), layout="constrained")


def picture_of(figure: Figure, title: str, words: str, wide: bool = False) -> Picture:
    """A figure as a picture, the same bytes whenever it is drawn."""
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fem_diffusion", "svg.fonttype": "path"}):
        figure.savefig(image, format="svg", dpi=_DPI, bbox_inches="tight", pad_inches=0.03,
                       metadata={"Date": None, "Creator": None})
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(image.getvalue()).decode()}", title, words, wide)
