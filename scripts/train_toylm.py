"""Trains the bundled toy model from scratch and writes it, with its prompts and vignettes, to data/toylm.

Recipe and readings: docs/toylm.md.
"""

import tyro

from steer_heal.toylm.data import write_data
from steer_heal.toylm.training import ToyTrainCfg, train

if __name__ == "__main__":
    cfg = tyro.cli(ToyTrainCfg, description=__doc__)
    print(train(cfg))
    write_data(cfg.out)
