"""Write a random model of a given config: `python -m models.training.random_model DIRECTORY [--seed N]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from models.training.parameters import initial_parameters, read_config, save_parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "directory", type=Path, help="model directory that has config.json, and to which model.safetensors is written"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    parameters = initial_parameters(read_config(arguments.directory), seed=arguments.seed, noise=0.2)
    save_parameters(parameters, arguments.directory / "model.safetensors")


if __name__ == "__main__":
    main()
