import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib import colors
from PIL import Image

import dmjd.figures.render as painters
from dmjd.branches import Distillation, Reconstruction
from dmjd.config.pretrain import PretrainConfig
from dmjd.data.sources.registry import open_source
from dmjd.encoders.registry import create_encoder
from dmjd.encoders.weights import ENCODER_FILE, encoder_bytes, encoder_metadata
from dmjd.figures.curves import curves_figure
from dmjd.figures.grid import save_figure
from dmjd.figures.reconstruction import UNNORMALISED, mask_figure, reconstruction_figure, target_figure
from dmjd.figures.show import KINDS, save_reconstruction_figure, show
from dmjd.images.preprocess import Preprocess
from dmjd.masking import DisjointMasks, Masks, disjoint_masks
from dmjd.model import MaskedImageModel
from dmjd.runs.build import build_model
from dmjd.runs.checkpoint import RunFolder
from dmjd.targets import hog
from dmjd.targets.base import Target


def model_for(patch=8, size=(32, 32), chans=3, mim="hog", vis="hog", **masks) -> MaskedImageModel:
    torch.manual_seed(0)
    encoder = create_encoder(f"vit_tiny_patch{patch}", size, chans, embed_dim=32, depth=1, num_heads=2)
    encoder.preprocess = Preprocess(size, chans, (0.5,) * chans, (0.25,) * chans)
    return MaskedImageModel(
        encoder,
        DisjointMasks(**masks),
        mim and Reconstruction(mim, decoder_dim=32, decoder_depth=1, decoder_heads=2),
        vis and Distillation(vis, projector_dim=32),
    )


def images_of(size=(32, 32), chans=3, count=2) -> torch.Tensor:
    return torch.randint(0, 256, (count, chans, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def panels(figure) -> dict[str, list[np.ndarray]]:
    """Title of each column -> what its panels show."""
    axes = figure.axes
    columns = axes[0].get_gridspec().ncols
    return {
        axes[c].get_title(): [np.asarray(a.images[0].get_array()) for a in axes[c::columns]] for c in range(columns)
    }


def words(figure) -> str:
    return figure.get_supxlabel() + " ".join(axes.get_title() for axes in figure.axes)


# --- glyphs


def stroke_angle(glyph: torch.Tensor) -> float:
    """Degrees of a stroke from rightwards to downwards, from second moments: 0 lies flat, 90 stands upright."""
    rows, columns = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in glyph.shape), indexing="ij")
    rr, cc, rc = ((glyph * a * b).sum() for a, b in ((rows, rows), (columns, columns), (rows, columns)))
    return float(torch.rad2deg(0.5 * torch.atan2(2 * rc, cc - rr))) % 180


@pytest.mark.parametrize(
    ("image", "upright"),
    [
        (lambda y, x: x, 90),  # grows rightwards: edges stand upright
        (lambda y, x: y, 0),
        (lambda y, x: x + y, 135),  # edges run from bottom left to top right: up is -y
        (lambda y, x: x - y, 45),
    ],
)
def test_strokes_lie_along_the_edges_of_the_image(image, upright):
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    cells = hog(image(y, x)[None, None].float(), cell_size=8)[0, 0]  # 4, 4, bins
    glyphs = painters.hog_glyphs(cells / cells.max(), 25)
    middle = glyphs[25:50, 25:50]
    difference = abs((stroke_angle(middle) - upright + 90) % 180 - 90)
    assert difference <= 10.01  # half a bin
    assert middle[12, 12] == pytest.approx(1.0)


@pytest.mark.parametrize("bins", [1, 2, 9, 12])
@pytest.mark.parametrize("side", [13, 31])
def test_each_bin_has_its_own_stroke_and_brightness_is_the_weight(bins, side):
    weights = torch.zeros(2, 3, 4, bins)
    weights[1, 2, 3, bins - 1] = 0.5
    glyphs = painters.hog_glyphs(weights, side)
    assert glyphs.shape == (2, 3 * side, 4 * side)
    assert glyphs[0].max() == 0
    assert glyphs[1, -side:, -side:].max() == pytest.approx(0.5)
    assert glyphs[1, :-side].max() == glyphs[1, :, :-side].max() == 0
    assert painters.hog_glyphs(-weights, side).max() == 0


def test_hog_cells_of_a_token_are_drawn_in_their_places():
    """Only the cell with the bright square has gradients."""
    model = model_for(patch=16, size=(32, 64), mask_ratio=0.5)
    raw = torch.zeros(1, 3, 32, 64)
    raw[..., 18:22, 42:46] = 255  # cell (2, 5) of the 4 x 8 cells of 8 pixels
    rgb = painters.paint_hog(model.target("mim")(raw, raw), model.target("mim"), model.encoder.grid)[0]
    side = rgb.shape[0] // 4
    lit = rgb.amax(-1).unflatten(0, (4, side)).unflatten(2, (8, side)).amax((1, 3)) > 0
    assert lit.nonzero().tolist() == [[2, 5]]


# --- painters


@pytest.mark.parametrize("chans", [1, 2, 3, 4, 5])
def test_images_of_any_channels_become_rgb(chans):
    images = images_of(chans=chans)
    rgb = painters.to_rgb(images)
    assert rgb.shape == (2, 32, 32, 3)
    red = images[:, 0] / 255
    assert torch.allclose(rgb[..., 0], red)
    assert torch.allclose(rgb[..., 2], images[:, 2] / 255 if chans >= 3 else red)


@pytest.mark.parametrize(("patch", "size", "chans"), [(4, (16, 32), 1), (8, (32, 32), 3), (16, (64, 48), 5)])
def test_true_pixel_targets_paint_the_very_image(patch, size, chans):
    model = model_for(patch, size, chans, "pixel", "pixel")
    images = images_of(size, chans)
    target = model.target("mim")(model.encoder.preprocess.normalize(images), images)
    painted = painters.paint_pixels(target, model.encoder, images)
    assert torch.allclose(painted, painters.to_rgb(images), atol=1e-4)


def test_hiding_covers_exactly_the_hidden_tokens():
    hidden = torch.tensor([[True, False, False, False, False, True]])
    rgb = painters.hide(torch.zeros(1, 8, 12, 3), hidden, (2, 3))[0, ..., 0]
    assert (rgb[:4, :4] == painters.GRAY).all()
    assert (rgb[4:, 8:] == painters.GRAY).all()
    assert (rgb == painters.GRAY).sum() == 32


# --- figures


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(
    ("grid", "size", "chans"), [((4, 4), (32, 32), 3), ((2, 6), (16, 48), 1), ((6, 2), (48, 16), 5)]
)
def test_mask_figure_shows_each_view_and_how_often_tokens_are_masked(views, grid, size, chans):
    masks = disjoint_masks(2, grid, views, 0.5, keys=torch.arange(2))
    columns = panels(mask_figure(images_of(size, chans), masks, grid))
    assert len(columns) == views + 2
    for k, shown in enumerate(list(columns.values())[1:-1]):
        for b in range(2):
            tokens = shown[b][:: size[0] // grid[0], :: size[1] // grid[1]]
            gray = np.isclose(tokens, painters.GRAY).all(-1)
            assert (gray.ravel() == masks.mask[k, b].numpy()).all()
    heat = columns["times masked"][1][:: size[0] // grid[0], :: size[1] // grid[1], 0].ravel()
    times = masks.mask[:, 1].sum(0).numpy()
    assert (np.argsort(-heat, kind="stable") == np.argsort(times, kind="stable")).all()


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize(
    ("patch", "size", "chans", "target"),
    [(4, (16, 24), 1, "hog"), (8, (32, 32), 3, "hog"), (16, (32, 64), 5, "hog"), (8, (48, 32), 3, "pixel")],
)
def test_reconstruction_figure_has_a_row_for_each_view(views, patch, size, chans, target):
    model = model_for(patch, size, chans, target, target, num_views=views, mask_ratio=0.5)
    figure = reconstruction_figure(model, images_of(size, chans))
    columns = panels(figure)
    assert len(columns) == 5
    assert all(len(rows) == 2 * views for rows in columns.values())
    assert all(np.isfinite(panel).all() for rows in columns.values() for panel in rows)
    labels = [axes.get_ylabel() for axes in figure.axes[1::5]]
    assert labels == [f"view {k + 1}" for k in range(views)] * 2 if views > 1 else ["", ""]
    assert (UNNORMALISED in words(figure)) == (target == "pixel")


def test_predictions_stand_in_the_masked_places_and_the_image_in_the_others():
    model = model_for(mim="pixel", vis="pixel", num_views=2)
    images, masks = images_of(), model.draw_masks(torch.arange(2))
    columns = panels(reconstruction_figure(model, images, masks=masks))
    pasted = columns["reconstruction\nof masked tokens"]
    distilled = columns["distillation\nof visible tokens"]
    truth = painters.to_rgb(images).numpy()
    for b in range(2):
        for k in range(2):
            masked = painters.spread(masks.mask[k], (4, 4), torch.zeros(1, 32, 32, 3))[b].numpy()
            row = 2 * b + k
            assert np.allclose(pasted[row][~masked], truth[b][~masked], atol=1e-4)
            assert not np.allclose(pasted[row][masked], truth[b][masked], atol=0.05)
            assert np.allclose(distilled[row][masked], painters.GRAY)
            assert not np.allclose(distilled[row][~masked], truth[b][~masked], atol=0.05)


def test_known_hog_tokens_are_tinted():
    model = model_for()
    masks = model.draw_masks(torch.arange(2))
    shown = panels(reconstruction_figure(model, images_of(), masks=masks))["reconstruction\nof masked tokens"][0]
    masked = painters.spread(masks.mask[0], (4, 4), torch.zeros(1, *shown.shape))[0].numpy()
    hue = colors.rgb_to_hsv(np.clip(shown, 0, 1))
    lit = shown.max(-1) > 0.05
    assert (abs(hue[lit & ~masked][:, 0] - 0.615) < 0.02).all()


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({"vis": None}, ["target 'hog'\nof mim", "reconstruction\nof masked tokens"]),
        ({"mim": None}, ["target 'hog'\nof vis", "distillation\nof visible tokens"]),
        (
            {"mim": "pixel", "vis": "hog"},
            [
                "target 'pixel'\nof mim",
                "reconstruction\nof masked tokens",
                "target 'hog'\nof vis",
                "distillation\nof visible tokens",
            ],
        ),
    ],
)
def test_only_the_branches_that_are_on_are_shown(options, titles):
    columns = panels(reconstruction_figure(model_for(**options), images_of()))
    assert list(columns) == ["image", "visible tokens", *titles]


def test_a_callers_own_masks_are_shown():
    masks = Masks.from_visible(torch.tensor([[[0, 5], [1, 2]]]), num_tokens=16)
    columns = panels(reconstruction_figure(model_for(), images_of(), masks=masks))
    assert (columns["visible tokens"][1] != painters.GRAY).any(-1).mean() == pytest.approx(2 / 16, abs=0.01)


class Edges(Target):
    """A target the package knows nothing of."""

    name, dim = "edges", 5

    def forward(self, normalized, raw):
        tokens = torch.nn.functional.avg_pool2d(raw.float(), 8).flatten(2).transpose(1, 2)
        return torch.cat([tokens, tokens[..., :2] ** 2], dim=-1)


def test_a_new_target_is_shown_by_its_principal_components():
    edges = Edges()
    figure = reconstruction_figure(model_for(mim=edges, vis=edges), images_of())
    assert "principal components" in words(figure)
    assert panels(figure)["target 'edges'"][0].shape == (4, 4, 3)


def test_figures_leave_the_model_as_it_was():
    model = model_for().train()
    model.branches["mim"].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    reconstruction_figure(model, images_of())
    target_figure(model, images_of())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    images = images_of()
    model(model.encoder.preprocess.normalize(images), images.float())["loss"].backward()  # still trains


def test_conv_vit_models_are_drawn_too():
    torch.manual_seed(0)
    encoder = create_encoder("conv_vit_tiny_patch8", 32, embed_dims=(16, 32, 48), depths=(1, 1, 1), num_heads=3)
    encoder.preprocess = Preprocess((32, 32))
    model = MaskedImageModel(encoder)
    assert len(panels(reconstruction_figure(model, images_of()))) == 5


# --- files


def test_curves_show_what_was_logged_and_pass_over_half_a_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 1 / s, "mim": 0.6 / s, "lr": 1e-3 * s, "images_per_s": 9.0} for s in range(1, 30)]
    lines.insert(10, {"step": 10, "knn_top1": 0.4})
    file.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 30, "lo')
    figure = curves_figure(file)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "learning rate", "online kNN, top-1"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["loss", "mim"]
    assert figure.axes[2].lines[0].get_xydata().tolist() == [[10, 0.4]]


def test_curves_of_nothing_are_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no curves yet"):
        curves_figure(tmp_path / "metrics.jsonl")


def test_figures_are_saved_whole_in_the_format_of_their_name(tmp_path):
    figure = mask_figure(images_of(), disjoint_masks(2, (4, 4), 2, 0.5, keys=torch.arange(2)), (4, 4))
    with Image.open(save_figure(figure, tmp_path / "new folder" / "ä.png")) as png:
        assert png.format == "PNG"
    with Image.open(save_figure(figure, tmp_path / "a.jpg")) as jpeg:
        assert jpeg.format == "JPEG"
    with pytest.raises(ValueError, match=r"end it in \.png"):
        save_figure(figure, tmp_path / "a.xyz")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not write"):
        save_figure(figure, tmp_path / "file" / "a.png")
    assert {p.name for p in tmp_path.iterdir()} == {"new folder", "a.jpg", "file"}


@pytest.fixture
def run(tmp_path, image_folder):
    config = PretrainConfig(
        data=str(image_folder), img_size=(32, 48), encoder="vit_tiny_patch8", embed_dim=(32,), depth=(1,), num_heads=2,
        decoder_dim=32, decoder_depth=1, decoder_heads=2,
    )  # fmt: skip
    model = build_model(config)
    model.encoder.preprocess = Preprocess((32, 48))
    folder = RunFolder(tmp_path / "run")
    folder.settle(config)
    state = {
        "progress": {"step": 3, "images": 9, "seconds": 1.0},
        "encoder": encoder_metadata(model.encoder),
        "config": json.loads(config.to_json()),
    }
    folder.save(3, {f"model.{key}": value for key, value in model.state_dict().items()}, state)
    folder.close()
    (tmp_path / "run" / ENCODER_FILE).write_bytes(encoder_bytes(model.encoder))
    return tmp_path / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_show_draws_a_run_again_and_again_the_same(run, kind, tmp_path):
    first = show(kind, run, out=tmp_path / "a.png", num_images=3)
    again = show(kind, run, out=tmp_path / "b.png", num_images=3)
    other = show(kind, run, out=tmp_path / "c.png", num_images=3, seed=1)
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()


def test_show_passes_over_unreadable_images(run, image_folder, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(20):
        (few / f"bad{i}.jpg").write_text("no image")
    with pytest.raises(ValueError, match="no image"):
        show("masks", run, data=few, out=tmp_path / "a.png")
    shutil.copy(next(image_folder.rglob("*.png")), few / "good.png")
    assert show("masks", run, data=few, out=tmp_path / "a.png").exists()


def test_wrong_calls_say_what_to_do(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for call, message in [
        (lambda: show("mask", run), "did you mean 'masks'"),
        (lambda: show("masks", tmp_path / "empty"), "is no run folder"),
        (lambda: show("masks", run, num_images=0), "num_images"),
        (lambda: show("neighbors", run, num_candidates=1), "num_candidates"),
        (lambda: show("attention", tmp_path / "empty"), "holds no encoder.safetensors"),
        (lambda: show("attention", run / ENCODER_FILE), "pass --data"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        show("masks", run)


def test_a_run_draws_itself(image_folder, tmp_path):
    model = model_for()
    path = save_reconstruction_figure(model, open_source(image_folder), tmp_path / "images" / "step.png", num_images=3)
    with Image.open(path) as image:
        assert min(image.size) > 300
