"""Trains the bundled toy model from scratch and writes it to data/toylm (see docs/toylm.md)."""

import tyro

from steer_heal.toylm.training import ToyTrainCfg, train

if __name__ == "__main__":
    print(train(tyro.cli(ToyTrainCfg, description=__doc__)))
