"""The packages, and the description for the package index. The rest of the metadata is in pyproject.toml.

The pictures and relative links of README.md lead nowhere on the index. The description has no pictures, and a link is
the path of its file. The folder data/ is installed as steer_heal/data.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

PATHS = "Paths such as `docs/results.md` are those of the source distribution.\n\n"
RELATIVE = r"\((?![a-z]+:)([^)#\s]+)[^)\s]*\)"


def description(readme: str) -> str:
    """README.md for the index. The first paragraph says where the files are."""
    text = re.sub(rf"^!\[[^\]]*\]{RELATIVE}\n+", "", readme, flags=re.MULTILINE)
    text = re.sub(rf"\[[^\]]+\]{RELATIVE}", r"`\1`", text)
    heading, _, rest = text.partition("\n\n")
    return f"{heading}\n\n{PATHS}{rest}"


setup(
    packages=[*find_packages("src"), "steer_heal.data"],
    package_dir={"": "src", "steer_heal.data": "data"},
    long_description=description((Path(__file__).parent / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
