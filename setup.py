"""The description for the package index, where the pictures and relative links of README.md lead nowhere: it has no
pictures, and for a link the path of its file. The rest of the metadata is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

PATHS = "Paths such as `docs/results.md` are those of the source distribution.\n\n"
RELATIVE = r"\((?![a-z]+:)([^)#\s]+)[^)\s]*\)"


def description(readme: str) -> str:
    """README.md for the index. The first paragraph says where the files are."""
    text = re.sub(rf"^!\[[^\]]*\]{RELATIVE}\n+", "", readme, flags=re.MULTILINE)
    text = re.sub(rf"\[[^\]]+\]{RELATIVE}", r"`\1`", text)
    heading, _, rest = text.partition("\n\n")
    return f"{heading}\n\n{PATHS}{rest}"


setup(
    long_description=description((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
