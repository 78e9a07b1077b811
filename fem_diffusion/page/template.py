"""Pages from templates: whole HTML texts that escape all that is put in and need no network."""

from datetime import datetime
from pathlib import Path
from typing import Any

from fem_diffusion.errors import InstallError
from fem_diffusion.page import words

__all__ = ["check_template", "render"]


def render(path: Path, page: dict[str, Any]) -> str:
    """The text of a page from a template, which may extend ``base.html.j2``.

    InstallError if Jinja2 is not installed.
    """
    environment = _environment(path.parent)
    return environment.get_template(path.name).render({"date": datetime.now().strftime("%d %B %Y").lstrip("0")} | page)


def check_template() -> None:
    """Raise InstallError where pages cannot be written, before any work."""
    _environment(Path(__file__).parent)


def _environment(folder: Path) -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise InstallError("The report needs Jinja2: pip install 'fem_diffusion[report]'.") from error
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters.update({name: getattr(words, name) for name in words.__all__})
    return environment
