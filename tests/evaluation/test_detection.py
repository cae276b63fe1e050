"""Detection: the model, its scores, and whole evaluations of tiny sets."""

import json

import numpy as np
import pytest
import torch
from dense_sets import KINDS, SIZE, make_detection_set, make_run
from support import mistake
from torchvision.ops import box_iou

from dmjd.cli.main import main
from dmjd.config.dense import DetectionConfig
from dmjd.data.dense_loader import ExampleBatch
from dmjd.data.sources.coco import Instances, open_coco
from dmjd.encoders.registry import create_encoder
from dmjd.engine.layer_decay import layer_groups
from dmjd.evaluation.results import read_evaluation
from dmjd.evaluation.run import evaluate
from dmjd.evaluation.supervised.detection import Detection, DetectionTask, predict
from dmjd.evaluation.tables import results_table
from dmjd.images.preprocess import Preprocess

pytest.importorskip("pycocotools")

QUICK = {"decoder_dim": 32, "batch_size": 4, "num_workers": 0, "device": "cpu", "num_evals": 0, "num_images": 2}
FLAGS = ("--decoder-dim", 32, "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--num-evals", 1)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return make_detection_set(tmp_path_factory.mktemp("boxes") / "set", {"train": 24, "test": 6})


def tiny(name: str = "vit_tiny_patch8", img_size=(64, 64)):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    if name.startswith("conv_vit"):
        sizes = {"embed_dims": (8, 16, 32), "depths": (1, 1, 1), "num_heads": 2}
    torch.manual_seed(0)
    encoder = create_encoder(name, img_size=img_size, **sizes)
    encoder.preprocess = Preprocess(img_size)
    return encoder


def task_of(encoder, masks: bool = False) -> DetectionTask:
    config = DetectionConfig(decoder_dim=32, img_size=encoder.img_size).resolve(encoder.img_size, 8)
    return DetectionTask(encoder, config, 2, masks)


def batch_of(masks: bool = False) -> ExampleBatch:
    found = torch.tensor([[4.0, 4.0, 24.0, 24.0], [30.0, 20.0, 60.0, 60.0]])
    instance_masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    instance_masks[0, 4:24, 4:24] = instance_masks[1, 20:60, 30:60] = 1
    one = Instances(found, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool), instance_masks if masks else None)
    nothing = one.keep(torch.zeros(2, dtype=torch.bool))
    return ExampleBatch(torch.rand(2, 3, 64, 64) * 255, [one, nothing])


# --- the model


def test_choices_do_not_depend_on_accumulation():
    task = task_of(tiny()).train()
    task.rcnn.roi_heads.fg_bg_sampler.batch_size_per_image = 8  # far fewer than there are proposals
    first, second = batch_of(), batch_of()
    images = torch.cat([first.images[:1], second.images[:1]])
    whole = task(ExampleBatch(images, [first.targets[0]] * 2, torch.tensor([5, 6])))
    parts = [task(ExampleBatch(images[i : i + 1], first.targets[:1], torch.tensor([5 + i]))) for i in (0, 1)]
    for name in ("loss_objectness", "loss_rpn_box_reg"):
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, whole[name], msg=name)
    again = task(ExampleBatch(images, [first.targets[0]] * 2, torch.tensor([5, 6])))
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    other = task(ExampleBatch(images, [first.targets[0]] * 2, torch.tensor([7, 8])))
    assert not torch.equal(other["loss_classifier"], whole["loss_classifier"])


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch16"])
def test_every_trained_parameter_gets_a_gradient(name, masks):
    task = task_of(tiny(name), masks).train()
    groups = layer_groups(task, 0.05, 0.5)
    losses = task(batch_of(masks))
    assert set(losses) >= {"loss", "loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    assert ("loss_mask" in losses) == masks
    parts = sum(value for name, value in losses.items() if name != "loss")
    torch.testing.assert_close(losses["loss"], parts)
    losses["loss"].backward()
    trained = [p for group in groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in task.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained)


def test_images_without_objects_give_a_loss():
    task = task_of(tiny()).train()
    batch = batch_of()
    batch.targets = [batch.targets[1]] * 2
    losses = task(batch)
    assert torch.isfinite(losses["loss"])
    assert losses["loss_objectness"].item() > 0


def test_anchors_match_their_cells_and_the_canvas():
    task = task_of(tiny(img_size=(64, 128))).eval()
    grids = [tuple(x.shape[-2:]) for x in task.rcnn.backbone(torch.randn(1, 3, 64, 128)).values()]
    assert [(64 / h, 128 / w) for h, w in grids] == [(s, s) for s in (4, 8, 16, 32, 64)]
    assert [size[0] for size in task.rcnn.rpn.anchor_generator.sizes] == [4, 8, 16, 32, 64]


@pytest.mark.parametrize("name", ["vit_tiny_patch8", "conv_vit_tiny_patch16"])
def test_an_object_is_cropped_from_the_finest_map_on_which_it_spans_14_to_28_cells(name):
    """The rule does not depend on the size of the canvas: objects on a smaller canvas are smaller."""
    pool = task_of(tiny(name, (64, 64))).rcnn.roi_heads.box_roi_pool
    maps = {str(i): torch.full((1, 1, 256 // s, 256 // s), float(s)) for i, s in enumerate((4, 8, 16, 32))}
    found = torch.tensor([[0.0, 0.0, side, side] for side in (16, 64, 111, 113, 225)])
    strides = pool(maps, [found], [(256, 256)]).mean((1, 2, 3)).tolist()
    assert strides == [4, 4, 4, 8, 16]


def test_heads_are_float32_under_bf16():
    task = task_of(tiny()).train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = task(batch_of())
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert torch.isfinite(losses["loss"])


def test_predictions_are_in_the_pixels_of_their_image():
    """In images that differ only in size, predictions are at the same relative positions."""
    task = task_of(tiny(), masks=True).eval()
    rows, columns = np.mgrid[:32, :48]
    small = np.stack([rows * 8, columns * 5, (rows + columns) * 3], axis=2).astype(np.uint8)
    large = small.repeat(3, 0).repeat(3, 1)
    with torch.no_grad():
        one, other = predict(task, [small, large])
    assert len(one["boxes"]) > 0
    for found, (height, width) in ((one, (32, 48)), (other, (96, 144))):
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"] <= torch.tensor([width, height, width, height])).all()
        assert found["masks"].shape[1:] == (height, width)
        assert set(found["labels"].tolist()) <= {0, 1}
    assert (box_iou(one["boxes"] * 3, other["boxes"]).amax(1) > 0.5).float().mean() > 0.5


# --- scores


def measured(source, found) -> dict:
    """Scores of given predictions, computed by the evaluation itself."""
    evaluation = object.__new__(Detection)
    evaluation.train = evaluation.test = source
    task = task_of(tiny())
    evaluation.config, evaluation.num_workers = task.config, 0
    task.detect = lambda images: [found.pop(0) for _ in images]
    return evaluation.measure(task, evaluation.test)


def perfect_predictions(source, scale: float) -> list[dict[str, torch.Tensor]]:
    """The ground truth as predictions, on canvases of ``scale`` times the image size."""
    predictions = []
    for i in range(len(source)):
        target = source.read_example(i)[1]
        scores = torch.linspace(0.9, 0.8, len(target.labels))
        predictions.append({"boxes": target.boxes * scale, "labels": target.labels, "scores": scores})
    return predictions


def test_the_ground_truth_scores_one_and_errors_cost(boxes):
    source = open_coco(boxes, "test")
    scale = 64 / SIZE[1]  # 48 x 64 fits onto the canvas of 64 x 64 unscaled
    perfect = measured(source, perfect_predictions(source, scale))
    assert perfect["ap"] == pytest.approx(1)
    assert perfect["ap50"] == pytest.approx(1)
    assert perfect["per_class"] == {name: pytest.approx(1) for name in KINDS}
    assert perfect["ap_large"] is None  # there are none
    swapped = perfect_predictions(source, scale)
    for one in swapped:
        one["labels"] = 1 - one["labels"]
    assert measured(source, swapped)["ap"] == 0
    half = perfect_predictions(source, scale)
    for one in half:
        for name in one:
            one[name] = one[name][:1]
    assert measured(source, half)["per_class"] == {KINDS[0]: pytest.approx(1), KINDS[1]: 0}
    shifted = perfect_predictions(source, scale)
    for one in shifted:
        one["boxes"][:, 3] -= 0.35 * (one["boxes"][:, 3] - one["boxes"][:, 1])  # 65 % of each box
    scores = measured(source, shifted)
    assert scores["ap50"] == pytest.approx(1)
    assert scores["ap75"] == 0


def test_a_test_set_of_crowds_has_no_score(tmp_path):
    root = make_detection_set(tmp_path, {"train": 1, "test": 1})
    content = json.loads((root / "test.json").read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    (root / "test.json").write_text(json.dumps(content))
    source = open_coco(root, "test")
    with pytest.raises(ValueError, match=r"no image of .*test\.json that can be read has an object, besides crowds"):
        measured(source, perfect_predictions(source, 1.0))


def test_sizes_of_objects_are_those_of_pycocotools(tmp_path, capsys):
    """It takes the areas of the JSON, which differ from those of the boxes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root = make_detection_set(tmp_path, {"train": 1, "val": 6}, seed=3)
    content = json.loads((root / "val.json").read_text())
    for i, annotation in enumerate(content["annotations"]):
        annotation["area"] = [500, 2000, 10_000][i % 3]
        annotation["id"] = i + 1  # pycocotools takes 0 for "not matched"
    (root / "val.json").write_text(json.dumps(content))
    source = open_coco(root, "test")
    predictions = perfect_predictions(source, 1.0)
    for i, one in enumerate(predictions):
        one["boxes"] = one["boxes"] + i  # of different quality
    scores = measured(source, list(predictions))
    found = []
    for i, one in enumerate(predictions):
        for box, label, score in zip(one["boxes"], one["labels"], one["scores"], strict=True):
            left, top, right, bottom = box.tolist()
            found.append({"image_id": i, "category_id": 10 * (int(label) + 1), "score": float(score)})
            found[-1]["bbox"] = [left, top, right - left, bottom - top]
    truth = COCO(str(root / "val.json"))
    reference = COCOeval(truth, truth.loadRes(found), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    capsys.readouterr()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    assert [scores[name] for name in names] == pytest.approx(reference.stats[:6].tolist(), abs=1e-6)
    assert None not in scores.values()


# --- whole evaluations


def test_a_few_steps_learn_the_shapes(boxes, tmp_path):
    run = make_run(tmp_path / "run", "conv_vit_tiny_patch8")
    options = {"steps": 12, "img_size": (48, 64), "blr": 0.06, "scale": (0.9, 1.1), "log_every": 5}
    result = evaluate("detection", run, data=boxes, **options, **QUICK)
    assert read_evaluation(run / "evaluation" / "detection.json") == result
    for start in ("result", "random_init"):
        lines = (run / result[start]["folder"] / "metrics.jsonl").read_text().splitlines()
        losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
        assert losses[-1] < 0.6 * losses[0]
        assert 0 <= result[start]["ap50"] <= 1
        assert set(result[start]["per_class"]) == set(KINDS)
        assert (run / result[start]["folder"] / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert result["data"]["num_objects"] == [48, 12]
    assert result["data"]["masks"] is False
    assert results_table({"detection": result}).row_count == 8


@pytest.fixture
def few_detections(monkeypatch):
    """An untrained model finds a hundred objects in every image, and each gets a mask."""
    make = DetectionTask.__init__

    def make_with_few(task, *arguments, **options):
        make(task, *arguments, **options)
        task.rcnn.roi_heads.detections_per_img = 8

    monkeypatch.setattr(DetectionTask, "__init__", make_with_few)


@pytest.mark.usefixtures("few_detections")
def test_masks_are_learned_if_every_object_has_one(tmp_path):
    data = make_detection_set(tmp_path / "data", {"train": 4, "val": 2}, instance_masks=True)
    run = make_run(tmp_path / "run")
    options = {"data": data, "steps": 1, "img_size": 32, **QUICK}
    result = evaluate("detection", run, **options)
    assert result["data"]["masks"] is True
    assert {"ap", "ap50", "mask"} <= set(result["result"])
    assert "ap50" in result["result"]["mask"]
    assert "mask" not in evaluate("detection", run, instance_masks=False, **options)["result"]
    again = evaluate("detection", run, **options)  # read, not trained
    assert again["result"] == result["result"]


def test_one_class_is_enough_also_in_bf16(tmp_path):
    data = make_detection_set(tmp_path / "data", {"train": 4, "test": 2})
    for part in ("train", "test"):
        content = json.loads((data / f"{part}.json").read_text())
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 10]
        content["categories"] = content["categories"][:1]
        (data / f"{part}.json").write_text(json.dumps(content))
    options = {"data": data, "steps": 2, "img_size": 32, "precision": "bf16", **QUICK}
    result = evaluate("detection", make_run(tmp_path / "run", in_chans=1), **options)
    assert result["configuration"]["precision"] == "bf16"
    assert result["result"]["ap50"] is not None
    assert list(result["result"]["per_class"]) == ["rectangle"]


def test_the_command_prints_a_table_and_corrections(capsys, tmp_path):
    run = make_run(tmp_path / "run")
    data = make_detection_set(tmp_path / "data", {"train": 3, "test": 2})
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["bbox"] = [-20, 0, 40, 30]
    (data / "train.json").write_text(json.dumps(content))
    command = ["evaluate", "detection", run, "--data", data, "--steps", 2, "--img-size", 32, *FLAGS]
    assert main([str(argument) for argument in command]) == 0
    printed = capsys.readouterr()
    assert "ap50" in printed.out
    assert "random initialization" in printed.out
    assert "1 of 6 boxes that reach out" in printed.err
    result = json.loads((run / "evaluation" / "detection.json").read_text())
    assert "1 of 6 boxes that reach out" in result["data"]["notes"][0]


def test_errors_are_raised_before_training(capsys, boxes, tmp_path, image_folder):
    run = make_run(tmp_path / "run")

    def message(*arguments) -> str:
        return mistake(capsys, "evaluate", "detection", *arguments, "--device", "cpu")

    assert "say which images and boxes: --data" in message(run)
    assert "holds no images with boxes" in message(run, "--data", image_folder)
    assert "there is no folder" in message(run, "--data", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no encoder.safetensors" in message(tmp_path / "empty", "--data", boxes)
    odd = make_run(tmp_path / "odd", "vit_tiny_patch14", img_size=28)
    assert "needs a patch of 2, 4, 8, 16" in message(odd, "--data", boxes)
    data = make_detection_set(tmp_path / "data", {"train": 2, "test": 2})
    content = json.loads((data / "train.json").read_text())
    (data / "train.json").write_text(json.dumps(content | {"categories": content["categories"][1:]}))
    assert "category_id 10, which 'categories' does not list" in message(run, "--data", data)
    (data / "train.json").write_text(json.dumps(content | {"annotations": []}))
    assert "has no boxes, besides crowds: there is nothing to learn" in message(run, "--data", data)
    (data / "train.json").write_text(json.dumps(content))
    tested = json.loads((data / "test.json").read_text())
    for annotations in ([], [annotation | {"iscrowd": 1} for annotation in tested["annotations"]]):
        (data / "test.json").write_text(json.dumps(tested | {"annotations": annotations}))
        assert "test.json has no boxes, besides crowds: there is nothing to test on" in message(run, "--data", data)
    assert not (run / "evaluation").exists()
