"""The README's pictures of the page, from a real run: ``python -m tests.page.screenshots`` writes docs/page-*.png."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

from PIL import Image

from tests.page.visitor import Scheme, Visitor, chromium
from tests.service.processes import ServerProcess

DOCS = Path(__file__).parents[2] / "docs"
WINDOW = {"width": 1180, "height": 1120}
SCHEMES: tuple[Scheme, ...] = ("light", "dark")
COLOURS = 256
MOST_BYTES = 300_000


def shrunk(data: bytes) -> bytes:
    """The picture with a palette: nobody sees the difference in a README."""
    buffer = io.BytesIO()
    image = Image.open(io.BytesIO(data)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def main() -> None:
    """Draw, judge, and keep what is seen in both colour schemes."""
    with tempfile.TemporaryDirectory() as directory, chromium() as browser:
        server = ServerProcess(Path(directory) / "log")
        try:
            context = browser.new_context(viewport=WINDOW, device_scale_factor=1.25, reduced_motion="reduce")
            visitor = Visitor(context, server.wait_ready().url).is_ready()
            visitor.draw(label="Ankle boot", count=4, seed=7)
            visitor["[data-example='example-patched.png']"].click()
            visitor.is_judged()
            visitor.page.evaluate("document.activeElement.blur()")
            for scheme in SCHEMES:
                visitor.page.emulate_media(color_scheme=scheme)
                data = shrunk(visitor.page.screenshot())
                assert len(data) < MOST_BYTES, f"{len(data)} bytes are too many for a README"
                (DOCS / f"page-{scheme}.png").write_bytes(data)
            assert visitor.problems == [], visitor.problems
        finally:
            server.kill()


if __name__ == "__main__":
    main()
