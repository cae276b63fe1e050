"""Train a scikit-learn classifier on the features of every image.

python examples/features_to_sklearn.py runs/mine --data ~/labeled --labels folder
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import dmjd


def load(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, D] and labels [n] of a table that ``dmjd.embed`` wrote."""
    table = pq.read_table(file)
    return np.stack(table["features"].to_numpy()), table["label"].to_numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of dmjd pretrain")
    parser.add_argument("--data", help="labeled images with train/ and test/; default the run's own")
    parser.add_argument("--labels", choices=("folder", "column"), help="source of the labels; default as in the run")
    parser.add_argument("--out", type=Path, default=Path("features"), help="folder for the tables")
    given = parser.parse_args()

    files = {}
    for split in ("train", "test"):
        files[split] = given.out / f"{split}.parquet"
        if not files[split].exists():
            dmjd.embed(given.run, data=given.data, labels=given.labels, split=split, out=files[split])
    x, y = load(files["train"])
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, y)
    print(f"logistic regression on {len(x)} features: top-1 {model.score(*load(files['test'])):.1%}")


if __name__ == "__main__":
    main()
