"""The convergence study: every variant builds, the published order is reproduced, tables read curves correctly."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "convergence"))
import crossing_figure
import halving
import make_teacher
import sharing_figure
import sweeps_figure
from convergence import COMMON
from convergence_agreement import contrast
from convergence_jobs import with_once
from convergence_masks import Windows
from convergence_models import make_model
from convergence_probe import Probe, ProbeHook, split
from convergence_report import curves_figure, result_table, summarize, time_to_reach
from convergence_sets import ENCODERS, SETS, variants_of, with_share
from convergence_variant import Variant

from dmjd.config import recipes
from dmjd.data.sources.registry import open_source
from dmjd.encoders.stored import encoder_bytes
from dmjd.engine.loop import Report, TrainState
from dmjd.masking import DisjointMasks
from dmjd.nn.tokens import gather_views
from dmjd.targets.base import whitened_mean
from dmjd.targets.hog import HogTarget

# Fewer channels than in the study, of as many blocks: targets are taken from some of them.
SMALL = {
    "vit_lite": {"embed_dim": 32, "decoder_dim": 32},
    "conv_lite": {"embed_dim": (8, 16, 32), "decoder_dim": 32},
}


def config(variant: Variant, encoder: str, init: Path | None = None):
    overrides = {key: value for key, value in variant.overrides.items() if value != "teacher"}
    if "init" in overrides:
        overrides["init"] = str(init)
    return recipes.get_recipe(variant.recipe)(steps=1).replace(
        **COMMON | {"img_size": 32} | ENCODERS[encoder] | SMALL[encoder] | overrides
    )


@pytest.mark.parametrize("encoder", ["vit_lite", "conv_lite"])
@pytest.mark.parametrize("name", SETS)
def test_every_variant_can_be_built(name, encoder, tmp_path):
    variants = variants_of(name, encoder.startswith("conv"))
    given = tmp_path / "encoder.safetensors"
    given.write_bytes(encoder_bytes(make_model(Variant("dmjd"), config(Variant("dmjd"), encoder)).encoder))
    models = {key: make_model(variant, config(variant, encoder, given)) for key, variant in variants.items()}
    assert len({str(vars(variant)) for variant in variants.values()}) == len(variants)  # no variant twice
    for variant in variants.values():
        assert variant.blr_of is None or variant.blr_of in {*variants, "dmjd"}
        assert variant.teacher is None or variant.teacher in variants
    assert models


def test_the_weight_of_colors_is_theirs_alone():
    variants = variants_of("colors", False)
    raw = torch.randint(0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    found = []
    for name in ("hog_color", "weight_2"):
        model = make_model(variants[name], config(variants[name], "vit_lite"))
        (target,) = {module for module in model.modules() if isinstance(module, HogTarget)}
        found.append(target(raw / 255, raw))
    one, two = found
    assert torch.equal(one[..., : target.edges_dim], two[..., : target.edges_dim])
    assert torch.equal(2 * one[..., target.edges_dim :], two[..., target.edges_dim :])


def test_the_mean_of_blocks_that_are_normalized_over_the_image():
    variant = variants_of("ema", False)["both_instance"]
    model = make_model(variant, config(variant, "vit_lite"))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blocks = []
    for block in model.encoder.block_outputs(images, 4):
        deviation, mean = torch.std_mean(block, dim=1, correction=0, keepdim=True)
        blocks.append((block - mean) / deviation)
    found = model.targets(images, images)
    assert torch.allclose(found["mim"], whitened_mean(blocks), atol=1e-2)
    assert found["vis"] is found["mim"]


@pytest.mark.parametrize(("grid", "ratio"), [((8, 8), 0.85), ((5, 12), 0.75), ((2, 50), 0.6), ((3, 64), 0.5)])
def test_windows_show_one_part_of_the_image_rolled_around_its_edges(grid, ratio):
    sampler = Windows(DisjointMasks(2, ratio, block_size=1))
    masks = sampler.draw(torch.arange(200), grid)
    V, M, _ = sampler.counts(grid)
    assert masks.visible.shape == (2, 200, V)
    assert masks.masked.shape == (2, 200, M)
    for visible in (~masks.mask).flatten(0, 1).unflatten(1, grid):
        sides = [extent(visible.any(dim=dim)) for dim in (1, 0)]
        assert 0 <= sides[0] * sides[1] - V < sides[1]
    shares = (~masks.mask).float().mean(dim=(0, 1))
    assert shares.min() > 0.5 * shares.mean()
    assert masks.mask.any(dim=0).float().mean() > 0.9


def test_a_variant_trains_on_windows():
    windows, plain = (variants_of("colors", False)[name] for name in ("windows", "hog_color"))
    models = [make_model(each, config(each, "vit_lite")) for each in (windows, plain)]
    assert [isinstance(model.masks, Windows) for model in models] == [True, False]


def extent(occupied: torch.Tensor) -> int:
    """Length of the shortest stretch of a ring that holds all occupied places."""
    return min(int(occupied.roll(shift).nonzero()[-1]) + 1 for shift in range(len(occupied)))


def test_the_published_order_differs_in_the_visible_branch_alone():
    variant = variants_of("alignment", False)["dmjd_misaligned"]
    settings = config(variant, "vit_lite")
    aligned, published = (make_model(v, settings) for v in (Variant("dmjd"), variant))
    published.load_state_dict(aligned.state_dict())
    raw = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    keys = torch.arange(4)
    ours, theirs = (model(raw / 128 - 1, raw, keys=keys) for model in (aligned, published))
    torch.testing.assert_close(ours["mim"], theirs["mim"])
    assert (ours["vis"] - theirs["vis"]).abs().item() > 1e-4
    masks, plain = published.draw_masks(keys), aligned.draw_masks(keys)
    assert torch.equal(masks.visible.sort().values, plain.visible)
    assert not torch.equal(masks.visible, plain.visible)
    assert torch.equal(masks.visible, published.draw_masks(keys).visible)  # a function of the keys
    prediction = published.predict(raw / 128 - 1, masks)["vis"]
    target = gather_views(published.targets(raw / 128 - 1, raw)["vis"], plain.visible.flatten(0, 1))
    expected = torch.nn.functional.smooth_l1_loss(prediction, target, beta=2.0)
    torch.testing.assert_close(theirs["vis"], expected)


def test_views_agree_if_they_are_those_of_one_image():
    K, B = 2, 8
    image = torch.nn.functional.normalize(torch.randn(B, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    agreeing, torn = (
        contrast(views.flatten(0, 1), K) for views in (image.expand(K, B, -1), torch.stack([image, -image]))
    )
    assert agreeing < 0.2 < torn
    similarity = image @ image.T / 0.2  # each of a row's pair against the views of other images
    others = similarity.masked_fill(torch.eye(B).bool(), -torch.inf).repeat(1, K).logsumexp(dim=1)
    expected = torch.logaddexp(similarity.diagonal(), others) - similarity.diagonal()
    torch.testing.assert_close(agreeing, expected.mean())


def test_losses_on_pooled_features_are_added():
    plain, spread = (variants_of("agreement", False)[name] for name in ("mixed", "spread_0.3"))
    raw = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    ours, more = (
        make_model(v, config(v, "vit_lite"))(raw / 128 - 1, raw, keys=torch.arange(4)) for v in (plain, spread)
    )
    assert torch.equal(ours["mim"], more["mim"])  # the same weights and masks
    torch.testing.assert_close(more["loss"], ours["loss"] + 0.3 * more["agreement"])
    assert 0 < more["agreement"] <= 1


def test_shorter_schedules():
    available = variants_of("speed", False)
    assert with_share("dmjd@10/37", available).share == pytest.approx(1 / 3.7)
    assert with_share("mae@1/2", available) == Variant("mae", share=0.5, blr_of="mae")
    assert with_share("mae", available) == Variant("mae")
    with pytest.raises(ValueError, match="no variant 'may' in this set"):
        with_share("may@1/2", available)


def test_time_to_reach_a_level():
    assert time_to_reach([0, 2, 4], [0.1, 0.3, 0.5], 0.4) == pytest.approx(3)
    assert time_to_reach([0, 2, 4], [0.1, 0.3, 0.2], 0.4) is None
    assert time_to_reach([1, 2], [0.5, 0.6], 0.4) == 1


def run(variant: str, seed: int, values: list[float], minutes: float, **changes) -> dict:
    probes = [
        {"share": i / 2, "step": i, "images": i, "epochs": i, "minutes": minutes * i / 2, "knn": v, "linear": v}
        for i, v in enumerate(values)
    ]
    return {"variant": variant, "seed": seed, "blr": 1e-3, "diverged": False, "probes": probes} | changes


def test_the_table_compares_with_the_baselines_end():
    runs = [run("mae", s, [0.1, 0.2, 0.3 + s / 10], 8.0) for s in (0, 1)]
    scores = {who: {"top1": value} for who, value in (("result", 0.5), ("random_init", 0.2), ("raw_pixels", 0.3))}
    tested = {"test": {"knn": scores, "linear": scores}}
    runs += [run("dmjd", 0, [0.1, 0.4, 0.5], 8.0, **tested), run("bad", 0, [0.1], 8.0, diverged=True)]
    rows = summarize(runs, "mae")
    assert rows["mae"]["held_out"]["linear"] == pytest.approx({"mean": 0.35, "std": 0.0707}, abs=1e-3)
    assert rows["mae"]["minutes_to_baseline_linear"] == pytest.approx(8.0)
    assert rows["dmjd"]["minutes_to_baseline_linear"] == pytest.approx(4 * 0.25 / 0.3)
    assert rows["bad"] == {"seeds": 0, "diverged": True}
    table = result_table(rows, "mae").splitlines()
    assert len(table) == 7
    assert table[5].split("|")[9:11] == [" 20.0 ", " 20.0 "]  # random weights
    assert len({line.count("|") for line in table}) == 1
    assert table[3].endswith("| 50.0 | 50.0 | 3.33 | 2.40 |")  # 8 minutes against 3.33
    assert len(curves_figure(runs, "x").axes) == 6


def test_sweeps_are_grouped_by_the_recipe_they_start_from(tmp_path, monkeypatch):
    files = []
    for number, override in enumerate([{}, {}, {"theta": 4}]):
        runs = [run(name, 0, [0.1, 0.2, value], 2.0) for name, value in (("dmjd", 0.4), (f"change_{number}", 0.5))]
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(json.dumps({"settings": {"override": override}, "baseline": "dmjd", "runs": runs}))

    def draw(*titles: str) -> None:
        arguments = [*map(str, files), "--titles", *titles, "--out", str(tmp_path / "sweeps.png")]
        monkeypatch.setattr(sys, "argv", ["sweeps_figure.py", *arguments])
        sweeps_figure.main()

    with pytest.raises(SystemExit, match="error: 2 panels, 1 titles"):
        draw("one")
    draw("DMJD", "DMJD, theta 4")
    assert (tmp_path / "sweeps.png").stat().st_size > 5000


def test_probes_after_an_interruption_are_repeated(tmp_path):
    probed = []

    def probe(encoder):
        probed.append(1)
        return {"knn": 0.5, "linear": 0.5}

    def hook() -> ProbeHook:
        measures = lambda: {"effective_rank": 9.0}  # noqa: E731
        return ProbeHook(None, probe, [0.25, 0.5, 1.0], tmp_path / "lines.jsonl", measures)

    first = hook()
    first.write(0.0, TrainState())
    for step in range(1, 7):
        first(Report(TrainState(step, step, step), step / 10, None))
    assert [line["step"] for line in first.lines] == [0, 3, 5]
    again = hook()  # from a checkpoint at step 3
    for step in range(4, 11):
        again(Report(TrainState(step, step, step), step / 10, None))
    assert [line["step"] for line in again.lines] == [0, 3, 5, 10]
    assert hook().lines == again.lines
    assert len(probed) == 5


def test_a_held_out_part_may_lack_classes(tmp_path, image_folder):
    """Its labels are still those of the training images."""
    part = tmp_path / "val"
    last = sorted(path for path in image_folder.iterdir() if path.is_dir())[-1]
    shutil.copytree(last, part / last.name)
    split(str(image_folder), tmp_path / "data", 0.25, str(part))
    probe = Probe(tmp_path / "data", 32, 24, 24, torch.device("cpu"), "fp32")
    train, test = probe.sets
    assert len(train.labels) == 24
    assert test.labels.unique().tolist() == [train.labels.max()]


def test_held_out_images_are_disjoint_from_the_training_images(tmp_path, image_folder):
    split(str(image_folder), tmp_path / "data", 0.25)
    train, test = (open_source(str(tmp_path / "data"), split=part, labels="column") for part in ("train", "test"))
    assert (len(train), len(test)) == (18, 6)
    assert sorted(test.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    seen = [source.stored(i) for source in (train, test) for i in range(len(source))]
    assert sorted(seen) == sorted(path.read_bytes() for path in image_folder.rglob("*.png"))  # unchanged


def test_the_teacher_is_a_folder_that_timm_reads(tmp_path):
    """From tensors of the package's order, under other names."""
    model = timm.create_model(make_teacher.NAME).eval()
    state = {f"_layer{i}.{name}": value for i, (name, value) in enumerate(model.state_dict().items())}
    make_teacher.write(state, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    state[next(iter(state))] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"conv_stem.weight has another shape"):
        make_teacher.to_timm(state)


def test_what_an_image_costs_once_is_added_to_every_step():
    measured, images = {"one_view": 0.1, "two_views": 0.16, "four_views_16": 0.1}, {"one_view": 64, "two_views": 64}
    images["four_views_16"] = 16
    assert with_once(measured, "one_view", 0.0, images) == measured
    added = with_once(measured, "one_view", 0.75, images)
    assert added == pytest.approx({"one_view": 0.4, "two_views": 0.46, "four_views_16": 0.175})  # 0.3 of 64 images


def test_the_figure_of_shared_images_has_views_and_images(tmp_path, monkeypatch, capsys):
    runs = [run("one_view", 0, [0.4], 1), run("one_view", 1, [0.44], 1), run("four_views_16", 0, [0.5], 1)]
    runs.append(run("two_independent", 0, [0.45], 1))
    settings = {"once_share": 0.5, "batch_size": 64}
    result = {"settings": settings, "baseline": "one_view", "summary": summarize(runs, "one_view")}
    file, figure = tmp_path / "result.json", tmp_path / "sharing.png"
    file.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["sharing_figure.py", str(file), "--out", str(figure)])
    sharing_figure.main()
    table = capsys.readouterr().out.splitlines()[2:]
    views = [line.split(" | ")[1:3] for line in table]
    assert views == [["64", "1"], ["64", "2, independent"], ["16", "4, disjoint"]]
    assert table[0].endswith("| 42.0 ± 2.8 |")
    assert figure.stat().st_size > 1000


def test_the_share_of_an_image_follows_from_the_times_of_steps_and_more_views_are_compared_with_the_best_single_view():
    runs = [run("one_view", seed, [score], 1) for seed, score in enumerate((0.40, 0.44))]
    runs += [run("one_view_16", seed, [score], 1) for seed, score in enumerate((0.46, 0.48))]
    others = {"two_views_32": (0.45,), "four_views_16": (0.5, 0.5), "four_independent_16": (0.9, 0.9)}
    runs += [run(name, seed, [score], 1) for name, scores in others.items() for seed, score in enumerate(scores)]
    summary = summarize(runs, "one_view")
    sizes = {"one_view": (1, 64), "one_view_16": (1, 16), "two_views_32": (2, 32), "four_views_16": (4, 16)}
    seconds = {name: 0.05 + images * (0.004 + 0.001 * views) for name, (views, images) in sizes.items()}
    result = {"set": "sharing", "settings": {"batch_size": 64}, "summary": summary, "seconds_per_step": seconds}
    assert crossing_figure.sizes_of(result) == sizes  # independent views are another question
    assert crossing_figure.once_share(result) == pytest.approx(64 * 0.004 / seconds["one_view"])
    two, four = (crossing_figure.gain(result, views) for views in (2, 4))
    assert (two.points, four.points) == pytest.approx((-2.0, 3.0))
    assert four.error == pytest.approx(1.0)  # the standard error of two seeds, 46 and 48
    assert math.isnan(two.error)  # two_views_32 has one seed
    lines = crossing_figure.table({"a": 0.6, "b": 0.2}, {"a": {2: two, 4: four}, "b": {2: two, 4: four}}).splitlines()
    axes = crossing_figure.draw({"a": 0.6}, {"a": {2: two, 4: four}}).axes[0]
    assert [line.get_ydata()[0] for line, *_ in axes.containers] == pytest.approx([-2.0, 3.0])
    assert lines[2:] == ["| b | 20 % | -2.0 ± nan | +3.0 ± 1.0 |", "| a | 60 % | -2.0 ± nan | +3.0 ± 1.0 |"]


def test_the_best_of_a_round_go_on():
    runs = [run(name, 0, [score], 1) for name, score in (("a", 0.3), ("b", 0.5), ("c", 0.4))]
    runs.append(run("d", 0, [0.9], 1, diverged=True))
    assert halving.survivors(summarize(runs, "a"), 2) == ["b", "c"]
