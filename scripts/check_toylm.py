"""Prints the check table of the bundled model: personas, held-out wordings and the dose sweep (a minute)."""

import tyro

from steer_heal.lm import load
from steer_heal.toylm.checks import check_table


def main(model: str = "data/toylm") -> None:
    """`model`: folder of a toy model."""
    print(check_table(load(model)).markdown())


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
