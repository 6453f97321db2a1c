"""From a CSV file to int8 predictions with uncertainty: python examples/table_to_int8.py"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

import bqnn
from bqnn.inference.answers import RegressionAnswer


def write_table(path: Path) -> None:
    """Write a table of made-up flats, whose prices follow a rule with noise."""
    rng = np.random.default_rng(0)
    area, rooms = rng.uniform(30, 150, 400), rng.integers(1, 6, 400)
    city = rng.choice(["Ghent", "Aalst"], 400)
    price = 50 + 3 * area + 10 * rooms + 40 * (city == "Ghent") + rng.normal(0, 15, 400)
    table = pd.DataFrame({"area": area, "rooms": rooms, "city": city, "price": price})
    table.round(1).to_csv(path, index=False)


def run(*command: str, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "bqnn", *command], cwd=folder, check=True)


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder / "flats.csv")
        run(
            *("train", "method=bbb", "task=table", "task.file=flats.csv", "task.target=price"),
            *("trainer.max_epochs=20", "logger=none", "hydra.run.dir=run"),
            folder=folder,
        )
        run("quantize", "checkpoint=run", "quant.mode=ptq", "hydra.run.dir=int8", folder=folder)
        model = bqnn.load(folder / "int8", numeric="int8")
        flats = pd.DataFrame({"area": [60.0, 120.0], "rooms": [2, 4], "city": ["Ghent", "Aalst"]})
        answer = model.predict(flats)
        assert isinstance(answer, RegressionAnswer)
        for mean, std in zip(answer.mean, answer.std, strict=True):
            print(f"price {mean:.0f} +- {std:.0f}")


if __name__ == "__main__":
    main()
