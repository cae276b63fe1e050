"""The results of the GPU kit as Markdown tables.

python benchmarks/gpu/report.py
"""

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import RESULTS


def read(folder: Path, part: str) -> dict[str, Any] | None:
    """The file of a part."""
    file = folder / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def speed_table(content: dict[str, Any]) -> str:
    """Each case with its speed, memory, MFU and share of the floor."""
    rows = []
    for name, entry in content["entries"].items():
        card, *case = name.split(" | ")
        if case == ["rates"]:
            rows.append([card, "matrix products, bf16", "", f"{entry['matmul_bf16'] / 1e12:.0f} TFLOP/s", "", "", ""])
        elif "images_per_s" in entry:
            memory = f"{entry['memory_gb']:.1f} GB" if entry.get("memory_gb") else ""
            speeds = (f"{entry['images_per_s']:.0f}", f"{100 * entry['mfu']:.0f} %", memory)
            rows.append(
                [
                    card,
                    ", ".join(case[:3]),
                    f"{case[3]}, {entry['batch']} images",
                    *speeds,
                    f"{100 * entry['share_of_floor']:.0f} %",
                ]
            )
        else:
            rows.append([card, ", ".join(case[:3]), case[3], entry.get("error", "not measured")[:60], "", "", ""])
    return table(["card", "side", "mode", "images/s", "MFU", "memory", "of the floor"], rows)


# what, over what: the part of a case's name between the card and the batch
RATIOS = {
    "ConvViT-B, DMJD over the dense reference (goal 1.6)": (
        "ConvViT-B, DMJD | dmjd | ",
        "ConvViT-B, DMJD | dense reference | ",
    ),
    "ViT-B, MAE over transformers (goal 1.2)": ("ViT-B, MAE | dmjd | ", "ViT-B, MAE | transformers | "),
}


def rate(entries: dict[str, Any], start: str, mode: str, batch: str) -> float | None:
    """The fastest case of a side in one mode and at one batch size."""
    rates = [
        entry["images_per_s"]
        for name, entry in entries.items()
        if name.startswith(start) and name.endswith(f"| {mode} | {batch}") and "images_per_s" in entry
    ]
    return max(rates, default=None)


def ratio_lines(content: dict[str, Any]) -> str:
    """Ours over theirs, in the same mode, at the same batch size, on the same card."""
    entries, lines = content["entries"], []
    cards = dict.fromkeys(name.split(" | ")[0] for name in entries)
    for card, (title, (ours, theirs)) in itertools.product(cards, RATIOS.items()):
        for mode, batch in dict.fromkeys(tuple(n.split(" | ")[-2:]) for n in entries if f"{card} | {theirs}" in n):
            pair = [rate(entries, f"{card} | {start}", mode, batch) for start in (ours, theirs)]
            if pair[0] and pair[1]:
                lines.append(f"- {card}, {mode}, {batch} images a step: {title}: {pair[0] / pair[1]:.2f} times\n")
    return "".join(lines)


def loader_table(content: dict[str, Any]) -> str:
    """Images/s by number of workers."""
    return table(
        ["machine, workers", "images/s"],
        ([name.replace(" | ", ", "), f"{entry['images_per_s']:.0f}"] for name, entry in content["entries"].items()),
    )


def print_tables(folder: Path) -> None:
    """All tables of the parts that were run."""
    if check := read(folder, "check"):
        outcomes = Counter(entry["outcome"] for entry in check["entries"].values())
        print(f"## check\n\n{dict(outcomes)}, {check['machine']['gpu']}\n")
    if speed := read(folder, "speed"):
        print(f"## speed\n\n{speed_table(speed)}\n{ratio_lines(speed)}")
    if loader := read(folder, "loader"):
        print(f"## loader\n\n{loader_table(loader)}")
    if similarity := read(folder, "similarity"):
        rows = ([name.replace(" | ", ", "), f"{entry['seconds']:.1f}"] for name, entry in similarity["entries"].items())
        print(f"## similarity\n\n{table(['card, task, features', 's'], rows)}")
    if (study := folder / "study.md").exists():
        print(f"## study: CIFAR-10, JPEG-coded\n\n{study.read_text(encoding='utf-8')}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print_tables(parser.parse_args().results)
