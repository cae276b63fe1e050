"""The model card of an encoder: a README.md that the hub shows. Names that come from users are code, never markup."""

import re
from collections.abc import Sequence

from dmjd import __version__
from dmjd.encoders.pooling_lines import invalid_settings, knows_invalid, timm_pooling
from dmjd.encoders.stored import Stored
from dmjd.encoders.training_facts import PARTS, TrainingFacts
from dmjd.text import shortened

HOME = "https://github.com/dmjd/dmjd"

USUAL = ("knn", "linear")  # evaluations that a card always has a row for

NOT_EVALUATED, NOT_RECORDED = "not evaluated", "not recorded"

_LONGEST = 120  # characters of a name


def code(text: object) -> str:
    """A text as code in a table of Markdown, in which nothing is markup; long ones are shortened."""
    shown = shortened(text, _LONGEST).strip() or "?"
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if "`" in shown else ""
    return f"{fence}{pad}{shown}{pad}{fence}".replace("|", "\\|")


def model_card(encoder: Stored, facts: TrainingFacts, usage: Sequence[str], library: str = "dmjd") -> str:
    """The card as Markdown, with metadata for the hub.

    Args:
        encoder: the encoder.
        facts: how it was trained.
        usage: lines of Markdown on how to load it.
        library: that loads it.
    """
    tags = ["masked-image-modeling", "self-supervised-learning", *(["timm"] if _is_timm(encoder, library) else [])]
    front = ["---", f"library_name: {library}", "pipeline_tag: image-feature-extraction", "tags:"]
    changed = ["", "The weights were changed after that training."] if facts.get("changed") else []
    head = ("evaluation", "score", "test images", "this encoder", "random initialization", "raw pixels")
    return "\n".join(
        [
            *front,
            *(f"- {tag}" for tag in tags),
            "---",
            "",
            f"# {encoder.name}",
            "",
            f"A vision encoder, trained without labels with [DMJD]({HOME}).",
            "",
            *_table(("encoder", ""), _encoder_rows(encoder)),
            "",
            "## Training",
            "",
            *_table(("training", ""), _training_rows(facts)),
            *changed,
            "",
            "## Evaluation",
            "",
            "Main score of each evaluation, in percent, beside its baselines.",
            "",
            *_table(head, _score_rows(facts)),
            "",
            "## Use",
            "",
            *usage,
        ]
    )


def usage_lines(encoder: Stored, repo: str | None) -> list[str]:
    """How to load an encoder from the repository ``repo`` of the hub, or from a folder."""
    source = f"hf-hub:{repo}" if repo is not None else "FOLDER"
    lines = [
        "```python",
        "import dmjd",
        "",
        f'encoder = dmjd.load_encoder("{source}")',
        'features = encoder.encode(encoder.preprocess(["image.jpg"]))  # [1, D]',
        "```",
    ]
    if _is_timm(encoder, "dmjd"):
        name, needs = (source, "") if repo is not None else ("local-dir:FOLDER", "  # 1.0.26 or newer")
        call = f'model = timm.create_model("{name}", pretrained=True, num_classes=0)'
        lines += ["", "Without DMJD:", "", "```python", f"import timm{needs}", "", call, *timm_pooling(encoder), "```"]
    return lines


def _is_timm(encoder: Stored, library: str) -> bool:
    """Whether timm loads the folder, too."""
    return library == "dmjd" and encoder.timm_model() is not None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _encoder_rows(encoder: Stored) -> list[tuple[str, str]]:
    weights = sum(tensor.numel() for tensor in encoder.state_dict().values())
    height, width = encoder.img_size
    rows = [
        ("architecture", code(encoder.name)),
        ("weights", f"{weights:,} numbers"),
        ("input", f"{height} x {width} pixels, {encoder.in_chans} channel(s)"),
        ("features", f"{encoder.embed_dim} numbers"),
    ]
    if (known := encoder.preprocess) is not None:
        mean, std = (", ".join(f"{value:.4g}" for value in values[:8]) for values in (known.mean, known.std))
        rows.append(("normalization", f"mean {mean}; standard deviation {std}"))
        if known.value_range is not None:
            low, high = known.value_range
            rows.append(("values", f"clipped to {low:g}..{high:g}, which become 0..1 before the normalization"))
        if knows_invalid(encoder):
            rows.append(("invalid pixels", f"{invalid_settings(known)}; they become the mean, and are not pooled"))
    return rows


def _training_rows(facts: TrainingFacts) -> list[tuple[str, str]]:
    size, seconds, epochs = facts.get("img_size"), facts.get("seconds"), facts.get("epochs")
    duration = [f"{facts['steps']:,} steps"] if "steps" in facts else []
    duration += [f"{epochs:.3g} epochs"] if epochs is not None else []
    duration += [time_text(seconds)] if seconds is not None else []
    start = "random" if "recipe" in facts else NOT_RECORDED
    return [
        ("data", code(facts["data"]) if "data" in facts else NOT_RECORDED),
        ("number of images", f"{facts['num_images']:,}" if "num_images" in facts else NOT_RECORDED),
        ("image size", f"{' x '.join(map(str, size))} pixels" if size else NOT_RECORDED),
        ("recipe", code(facts["recipe"]) if "recipe" in facts else NOT_RECORDED),
        ("starting weights", code(facts["init"]) if "init" in facts else start),
        ("duration", ", ".join(duration) or NOT_RECORDED),
        ("written by", f"dmjd {__version__}"),
    ]


def time_text(seconds: float) -> str:
    """A duration in words, e.g. "2.5 hours"."""
    for size, word in ((3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {word}"
    return f"{seconds:.1f} seconds"


def _score_rows(facts: TrainingFacts) -> list[list[str]]:
    evaluations = facts.get("evaluations", {})
    rows = []
    for task in dict.fromkeys([*USUAL, *evaluations]):
        if task not in evaluations:
            rows.append([code(task), "", "", *[NOT_EVALUATED] * len(PARTS)])
            continue
        found = evaluations[task]
        scores = [found["scores"].get(part) for part in PARTS]
        data = "" if found["data"] is None else code(found["data"])
        rows.append([code(task), code(found["metric"]), data, *(_percent(score) for score in scores)])
    return rows


def _percent(score: float | None) -> str:
    return NOT_EVALUATED if score is None else f"{100 * score:.1f}"
