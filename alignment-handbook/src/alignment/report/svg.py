"""Turns a figure into SVG to stand inside a page: sharp, in the page's colours and font, with a title on each point."""

import io
import re
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from alignment.report.axes import COLOURS, GREY, GRID

#: Colours of a figure, as matplotlib writes them, and the page's: its text colour, and variables for a dark page.
_PAGE = {"#000000": "currentColor", GREY: "var(--grey)", GRID: "var(--grid)", "#cccccc": "var(--grid)"} | {
    colour.lower(): f"var(--line-{i})" for i, colour in enumerate(COLOURS)
}
_FONT = re.compile(r"font-family: [^;]*;?|font: *")


def as_svg(figure: Figure, title: str, name: str) -> str:
    """The figure as an `<svg>` element.

    Args:
        figure: What the artists' points say is in its `texts_of_points`, see `alignment.report.axes.say`.
        title: Says what the figure shows, to those who cannot see it.
        name: Tells the ids in it from those of the page's other figures.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True)
    root = ElementTree.fromstring(written.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    texts = getattr(figure, "texts_of_points", {})
    for child in [*root]:  # metadata, and a style that would hold for the whole page
        if child.tag == "metadata" or child.find("style") is not None:
            root.remove(child)
    for element in root.iter():
        if element.get("id") in texts:
            _add_titles(element, texts[element.get("id")])
        element.attrib = _of_page(element.attrib, name, keep_id=element.tag in ("path", "clipPath"))
    box = root.get("viewBox")
    root.attrib = {"viewBox": box or "", "role": "img", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _add_titles(group: ElementTree.Element, texts: list[str]) -> None:
    """A title for each point of a group; for the whole of it, where it is one shape."""
    points = list(group.iter("use"))
    places = points if len(points) == len(texts) else [group] if len(texts) == 1 else []
    for place, text in zip(places, texts, strict=bool(places)):
        ElementTree.SubElement(place, "title").text = text
        place.set("class", "point")


def _of_page(attributes: dict[str, str], name: str, keep_id: bool) -> dict[str, str]:
    """Attributes without namespaces, with the page's colours and font, and with ids that are used alone."""
    found = {key.rpartition("}")[2]: value for key, value in attributes.items()}
    if not keep_id:
        found.pop("id", None)
    if "style" in found:
        style = _FONT.sub("", found["style"])
        found["style"] = re.sub(r"#[0-9a-f]{6}", lambda colour: _PAGE.get(colour[0], colour[0]), style)
    if "d" in found:
        found["d"] = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", found["d"]).replace("\n", "")
    if "id" in found:
        found["id"] = f"{name}-{found['id']}"
    for key in ("href", "clip-path"):
        if key in found:
            found[key] = found[key].replace("#", f"#{name}-")
    return found
