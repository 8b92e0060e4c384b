"""The command edit, with exact networks of normal distributions: what it writes, and what it refuses."""

import json
import re

import exact_runs
import jax.numpy as jnp
import numpy as np
import pytest
from exact_runs import LABEL, MEANS, SPREAD, classifier_config, config_of, make_run, write_data
from PIL import Image

import jaxdiff as jd
from jaxdiff import cli
from jaxdiff.commands import problems
from jaxdiff.data import inputs
from jaxdiff.data.transforms import to_uint8
from jaxdiff.settings import EditSettings

pytestmark = pytest.mark.standard_promotion
SHAPE = 8, 4, 3


@pytest.fixture(scope="module", autouse=True)
def networks():
  with exact_runs.networks():
    yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Runs of images in colours, and images: of class 2, the clean one, and what others have made of it."""
  folder = tmp_path_factory.mktemp("edits")
  data = write_data(folder / "data.npz", SHAPE)
  ddim = {"sampler": {"type": "ddim", "grid": {"steps": 12}, "denoise": True}}
  make_run(folder / "labels", config_of(data, LABEL) | ddim)
  make_run(folder / "plain", config_of(data) | ddim)
  make_run(folder / "steadfast", config_of(data, LABEL, drop=0.0) | ddim)
  make_run(folder / "classifier", classifier_config(data))
  make_run(folder / "adaptive", config_of(data) | {"sampler": {"type": "probability_flow", "rtol": 0.1, "atol": 0.1}})
  make_run(folder / "grey", config_of(write_data(folder / "grey.npz", (4, 4, 1))) | ddim)
  clean = image_of(MEANS[2])
  Image.fromarray(clean).save(folder / "clean.png")
  Image.fromarray(clean).convert("L").save(folder / "grey.png")
  Image.fromarray(clean).resize((2, 4), Image.Resampling.BOX).save(folder / "small.png")
  Image.fromarray(clean).resize((40, 80), Image.Resampling.NEAREST).save(folder / "large.png")
  mask = np.zeros(SHAPE[:2], np.uint8)
  mask[:, 2:] = 255
  Image.fromarray(mask).save(folder / "mask.png")
  Image.fromarray(0 * mask).save(folder / "black.png")
  Image.fromarray(mask).resize((40, 80), Image.Resampling.NEAREST).save(folder / "large_mask.png")
  spoiled = clean.copy()
  spoiled[:, 2:] = 7
  (folder / "several").mkdir()
  Image.fromarray(clean).save(folder / "several" / "a.png")
  Image.fromarray(spoiled).save(folder / "several" / "b.png")
  return folder


def image_of(mean):
  """An 8-bit image of a class, with its spread."""
  noise = SPREAD * np.random.default_rng(0).normal(size=SHAPE)
  return np.asarray(to_uint8(jnp.asarray(mean * exact_runs.pattern(jnp.zeros((1, *SHAPE)))[..., 0] + noise)))


def edit(workdir, *arguments):
  cli.main(["edit", f"--workdir={workdir}", *arguments])
  with np.load(workdir / "edit.npz", allow_pickle=False) as written, Image.open(workdir / "edit.png") as picture:
    return dict(written), np.asarray(picture)


def tiles(picture, columns):
  """The images of a grid, [rows, columns, h, w, ...]."""
  h, w = SHAPE[:2]
  factor = round(picture.shape[1] / (columns * (w + 1) + 1))
  small = picture[::factor, ::factor]
  rows = (len(small) - 1) // (h + 1)
  cut = lambda i, j: small[i * (h + 1) + 1 : (i + 1) * (h + 1), j * (w + 1) + 1 : (j + 1) * (w + 1)]
  return np.array([[cut(i, j) for j in range(columns)] for i in range(rows)])


def test_inpainting_keeps_what_is_known_and_does_not_see_what_is_hidden(folder, capsys):
  """What it paints is of the class that the known pixels are of."""
  flags = ["--task=inpaint", f"--mask={folder / 'mask.png'}", "--num=8"]
  written, picture = edit(folder / "plain", f"--input={folder / 'several'}", *flags)
  known = np.broadcast_to(written["known"][0], SHAPE)
  assert written["known"].shape == (2, *SHAPE[:2], 1)
  for result in written["x"].reshape(-1, *SHAPE):
    np.testing.assert_array_equal(result[known], written["input"][0][known])
  np.testing.assert_array_equal(written["measurement"][0], written["measurement"][1])
  painted = written["x"][:, :, :, 2:]
  pattern = exact_runs.pattern(jnp.zeros((1, *SHAPE)))[:, 2:, :, 0]
  np.testing.assert_allclose(painted.mean(axis=(0, 1)), MEANS[2] * pattern, atol=0.3)  # others are 0.6 and 1.3 away
  assert painted.std(axis=(0, 1)).mean() == pytest.approx(SPREAD, rel=0.3)
  assert written["nfe"].tolist() == [[13] * 8] * 2
  shown = tiles(picture, 10)
  clean = np.asarray(Image.open(folder / "clean.png"))
  np.testing.assert_array_equal(shown[0, 0], clean)
  np.testing.assert_array_equal(shown[:, 1, :, :2], np.stack([clean[:, :2]] * 2))
  assert set(shown[:, 1, :, 2:].ravel().tolist()) == {128}
  np.testing.assert_array_equal(shown[1, 2:], np.asarray(to_uint8(jnp.asarray(written["x"][1]))))
  out, err = capsys.readouterr()
  assert err.splitlines() == [
    *("inpaint of 2 images from step 0 by ddim", "13 network evaluations a result"),
    "edit.png, a row for each image: input, what is known, 8 results",
  ]
  settings = json.loads(str(written["settings"]))
  assert [settings[name] for name in ("task", "method", "seed", "noise")] == ["inpaint", "pigdm", 0, 0.0]
  assert "strength" not in settings
  assert out.splitlines() == [str(folder / "plain" / "edit.png"), str(folder / "plain" / "edit.npz")]
  spoiled, _ = edit(folder / "plain", f"--input={folder / 'several' / 'b.png'}", *flags)
  np.testing.assert_allclose(spoiled["x"][0], written["x"][0], atol=1e-5)  # by the noise of the first image


@pytest.mark.parametrize(
  ("flags", "columns"),
  [
    (["--task=colorize", "--input={}/grey.png"], 6),
    (["--task=superres", "--input={}/small.png"], 5),
    (["--task=superres", "--input={}/clean.png", "--degrade"], 6),
    (["--task=deblur", "--input={}/clean.png", "--degrade", "--noise=0.01", "--blur=0.8"], 6),
  ],
  ids=lambda value: str(value)[2:30],
)
def test_restored_images_measure_what_was_given(folder, flags, columns):
  written, picture = edit(folder / "labels", *(flag.format(folder) for flag in flags), "--label=2")
  x, y, clean = written["x"][0], written["measurement"][0], np.asarray(Image.open(folder / "clean.png"))
  assert written["x"].shape == (1, 4, *SHAPE)
  assert written["label"].tolist() == [2] * 4
  task = flags[0].removeprefix("--task=")
  measure = {
    "colorize": lambda x: x @ np.array([[0.299], [0.587], [0.114]]),
    "superres": lambda x: x.reshape(-1, 4, 2, 2, 2, 3).mean(axis=(2, 4)),
    "deblur": lambda x: np.asarray(jd.inverse.blur(problems.gaussian_kernel(0.8, 4)).apply(jnp.asarray(x))),
  }[task]
  np.testing.assert_allclose(measure(x), np.broadcast_to(y, (4, *y.shape)), atol=0.06 if task == "deblur" else 2e-6)
  truth = (clean + 0.5) / 128 - 1
  error = measure(truth[None].astype(np.float32))[0] - y
  if task == "deblur":
    assert error.std() == pytest.approx(0.01, rel=0.3)  # of 96 numbers, standard error 0.07
  elif task == "superres":
    assert np.abs(error).max() < 1 / 128
  assert 0.01 < x.std(axis=0).mean() < SPREAD
  assert np.abs(x - truth).mean() < SPREAD  # nearer to it than two samples of a class, 1.13 SPREAD
  assert tiles(picture, columns).shape[:2] == (1, columns)


def test_sdedit_keeps_what_the_noise_does_not_hide(folder, capsys):
  """At a small strength near the input; at the whole a sample, whatever the input was."""
  flags = ["--task=sdedit", "--label=0", "--num=8"]
  near, _ = edit(folder / "labels", *flags, f"--input={folder / 'several'}", "--strength=0.25")
  assert "noised to sigma / alpha = " in capsys.readouterr().err
  whole, picture = edit(folder / "labels", *flags, f"--input={folder / 'clean.png'}", "--strength=1")
  distance = lambda written: np.abs(written["x"] - written["input"][:, None]).mean()
  assert 0 < distance(near) < 0.1 < 1 < distance(whole)
  np.testing.assert_allclose(whole["x"].mean(), MEANS[0], atol=5 * SPREAD / np.sqrt(8 * 96))
  assert near["nfe"].tolist() == [[4] * 8] * 2
  assert whole["nfe"].tolist() == [[13] * 8]
  assert sorted(near) == ["input", "label", "nfe", "settings", "x"]
  np.testing.assert_array_equal(tiles(picture, 9)[0, 0], np.asarray(Image.open(folder / "clean.png")))


def test_labels_and_guidance_lead_edits(folder):
  """Result k has label k mod n; a classifier leads an unconditional model as its labels lead a conditional one."""
  flags = ["--task=sdedit", f"--input={folder / 'several'}", "--strength=1", "--label=0,1,2", "--num=3"]
  told, _ = edit(folder / "labels", *flags)
  led, _ = edit(folder / "plain", *flags, f"--classifier={folder / 'classifier'}")
  np.testing.assert_allclose(told["x"].mean(axis=(0, 2, 3, 4)), MEANS, atol=5 * SPREAD / np.sqrt(2 * 96))
  np.testing.assert_allclose(led["x"], told["x"], rtol=1e-3, atol=5e-4)
  assert led["nfe"].tolist() == [[26] * 3] * 2
  assert told["label"].tolist() == [0, 1, 2]


def test_images_of_another_size_are_resized_with_their_masks(folder):
  flags = ["--task=inpaint", "--num=1", "--steps=2"]
  plain, _ = edit(folder / "plain", *flags, f"--input={folder / 'clean.png'}", f"--mask={folder / 'mask.png'}")
  large = [f"--input={folder / 'large.png'}", f"--mask={folder / 'large_mask.png'}", "--resize"]
  resized, _ = edit(folder / "plain", *flags, *large)
  for name in ("input", "known", "x"):
    np.testing.assert_array_equal(resized[name], plain[name])


def test_results_far_outside_of_images_are_told_with_a_remedy(folder, capsys):
  """Stripes were never blurred by so much: what would look so after a blur has far larger values."""
  stripes = np.where(np.arange(4) % 2, 255, 0).astype(np.uint8) * np.ones(SHAPE, np.uint8).transpose(0, 2, 1)
  Image.fromarray(stripes.transpose(0, 2, 1)).save(folder / "stripes.png")
  flags = ["--task=deblur", "--blur=1.5", f"--input={folder / 'stripes.png'}", "--num=1", "--noise=0"]
  edit(folder / "plain", *flags)
  error = capsys.readouterr().err
  assert re.search(r"jaxdiff: warning: \d+% of the values lie outside \[-1.5, 1.5\]", error)
  assert "the input is probably not blurred by so much; try a lower --blur than 1.5" in error
  cli.main(["sample", f"--workdir={folder / 'labels'}", "--label=2", "--guidance=1000"])
  assert re.search(r"warning: \d+% of the values .* try a lower --guidance, or", capsys.readouterr().err)


def test_the_blur_is_gaussian_and_the_rounding_of_its_result_is_noise(folder):
  kernel = problems.gaussian_kernel(1.5, 99)
  assert kernel.sum() == pytest.approx(1.0, abs=1e-6)
  across = kernel.sum(axis=0) @ (np.arange(len(kernel)) - len(kernel) // 2) ** 2
  assert across == pytest.approx(1.5**2, rel=0.05)  # cut off at three standard deviations
  assert problems.gaussian_kernel(1.5, 8).shape == (7, 7)
  settings = lambda **more: EditSettings(task="deblur", input=str(folder / "clean.png"), **more)
  assert [problems.read(settings(**more), SHAPE, 16).noise for more in ({}, {"noise": 0.0})] == [1 / 255, 0.0]


BAD = [
  ("plain", "--task=paint --input={}/clean.png", "config.edit.task must be 'inpaint' or 'colorize' or"),
  ("plain", "--task=sdedit", "edit needs --input=PATH, images to start from"),
  ("plain", "--input={}/clean.png", "edit needs --task=inpaint, colorize, superres, deblur or sdedit"),
  ("plain", "", "superres, deblur or sdedit and --input=PATH"),
  ("plain", "--task=inpaint --input={}/clean.png", "--task=inpaint needs --mask=PATH"),
  ("plain", "--task=deblur --input={0}/clean.png --mask={0}/mask.png", "config.edit.mask is of --task=inpaint"),
  ("plain", "--task=deblur --input={}/clean.png --strength=0.5", "config.edit.strength is of --task=sdedit"),
  ("plain", "--task=sdedit --input={}/clean.png --strength=0", "config.edit.strength must be in (0, 1]"),
  ("plain", "--task=sdedit --input={}/clean.png --strength=1.5", "config.edit.strength must be in (0, 1]"),
  ("plain", "--task=sdedit --input={}/clean.png --strength=half", "config.edit.strength must be a number, got 'half'"),
  ("plain", "--task=sdedit --input={}/clean.png --noise=0.1", "config.edit.noise is of tasks with a measurement"),
  ("plain", "--task=sdedit --input={}/clean.png --num=0", "config.edit.num must be at least 1, got 0"),
  ("plain", "--task=deblur --input={}/clean.png --noise=-1", "config.edit.noise must be at least 0"),
  ("plain", "--task=deblur --input={}/clean.png --blur=0", "config.edit.blur must be positive"),
  ("plain", "--task=deblur --input={}/clean.png --method=magic", "config.edit.method must be 'pigdm' or"),
  ("plain", "--task=superres --input={}/clean.png --factor=2", "config.edit.factor is of --degrade"),
  ("plain", "--task=superres --input={}/clean.png --factor=3 --degrade", "factor = 3 does not divide the 4x8 pixels"),
  ("plain", "--task=superres --input={}/clean.png", "are not larger by a whole factor: give a smaller one"),
  ("plain", "--task=superres --input={}/small.png --resize", "--resize with --task=superres needs --degrade"),
  ("plain", "--task=deblur --input={}/nothing.png", "nothing.png does not exist: give an image, a folder of images or"),
  ("plain", "--task=deblur --input={}/data.npz", "data.npz must hold numbers x [n, h, w, c], and holds no x"),
  ("plain", "--task=deblur --input={}/labels/config.json", "config.json cannot be read as an image"),
  (
    "plain",
    "--task=deblur --input={}/plain/checkpoints",
    "checkpoints holds no images: give a folder of PNG",
  ),
  (
    "plain",
    "--task=deblur --input={}/small.png",
    "small.png has 2x4 pixels, images of the model have 4x8: give one of",
  ),
  ("plain", "--task=inpaint --input={0}/clean.png --mask={0}/small.png", "must be black and white, 0 and 255"),
  ("plain", "--task=inpaint --input={0}/clean.png --mask={0}/large_mask.png", "has 40x80 pixels and"),
  (
    "plain",
    "--task=inpaint --input={0}/large.png --mask={0}/mask.png --resize",
    "give a mask of the size that the input has",
  ),
  ("grey", "--task=colorize --input={}/clean.png --resize", "--task=colorize is for models of RGB images"),
  (
    "steadfast",
    "--task=deblur --input={}/clean.png",
    "the model is always told label (config.train.drop_cond",
  ),
  (
    "labels",
    "--task=deblur --input={}/clean.png --guidance=2",
    "config.guidance.scale leads to what the model is told",
  ),
  ("labels", "--task=deblur --input={}/clean.png --label=3", "config.sample.label = 3 is no class of the model"),
  ("classifier", "--task=deblur --input={}/clean.png", "edit is for models that generate"),
  ("adaptive", "--task=sdedit --input={}/clean.png", "has no grid of steps, in the middle of which sdedit starts"),
  ("adaptive", "--task=deblur --input={}/clean.png --method=repaint", "needs a sampler on a grid of steps"),
  ("plain", "--task=deblur --input={}/clean.png --method=projection", "takes no noise, and --noise is 1/255 where it"),
  ("plain", "--task=sdedit --input={}/clean.png --strength=0.05", "of 12 steps is less than one: take at least 0.0834"),
  ("plain", "--task=inpaint --input={0}/clean.png --mask={0}/no.png", "exist: give an image or a folder of images\n"),
  ("plain", "--task=inpaint --input={0}/clean.png --mask={0}/data.npz", "a mask is an image, white where to paint"),
  ("plain", "--task=inpaint --input={0}/clean.png --mask={0}/black.png", "black.png is all black: white is painted"),
  ("plain", "--task=inpaint --input={0}/large.png --mask={0}/black.png --resize", "has in its file, before --resize"),
  ("plain", "--task=deblur --input={}/clean.png --gif", "unexpected argument '--gif'"),
]


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("run", "flags", "message"), BAD, ids=lambda value: str(value)[:60])
def test_what_cannot_be_edited_is_refused(folder, capsys, run, flags, message):
  with pytest.raises(SystemExit) as exit:
    cli.main(["edit", f"--workdir={folder / run}", *flags.format(folder).split()])
  assert exit.value.code == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.startswith("jaxdiff: ")


def test_arrays_and_images_are_read_as_the_model_sees_them(tmp_path):
  """Integers at the centres of their levels, real numbers as they are, 8 bits as pictures write them."""
  levels = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
  np.savez(tmp_path / "levels.npz", x=levels)
  np.savez(tmp_path / "real.npz", x=np.full((2, 2, 2, 3), 0.25))
  (read,) = inputs.read_inputs(tmp_path / "levels.npz", 1, 4)
  np.testing.assert_allclose(read.image.ravel(), [-0.75, -0.25, 0.25, 0.75])
  assert [image.image.shape for image in inputs.read_inputs(tmp_path / "real.npz", 3, None)] == [(2, 2, 3)] * 2
  pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
  Image.fromarray(pixels).save(tmp_path / "image.png")
  (read,) = inputs.read_inputs(tmp_path / "image.png", 1, 256)
  np.testing.assert_array_equal(to_uint8(jnp.asarray(read.image))[..., 0], pixels)
  np.testing.assert_allclose(read.image.ravel()[[0, -1]], [-255 / 256, 255 / 256])  # the centres of the outer levels
  seen = Image.fromarray(np.dstack([pixels] * 3 + [np.zeros_like(pixels)]), "RGBA")
  seen.save(tmp_path / "clear.png")
  assert (inputs.read_inputs(tmp_path / "clear.png", 3, 256)[0].image > 0.99).all()  # on white
  for name, x, few, message in (
    ("wide", np.zeros((1, 2, 2, 4)), 4, "holds images of 4 channels, the model has 1"),
    ("high", levels + 1, 4, "holds integers from 1 to 4, the model has 0 to 3: scale them to"),
    ("whole", levels, None, "holds integers, and the model is of real numbers"),
    ("far", np.full((1, 2, 2), 1.5), 4, r"must hold finite numbers in \[-1, 1\]"),
    ("nan", np.full((1, 2, 2), np.nan), None, "must hold finite numbers"),
    ("flat", np.zeros(3), 4, "must hold numbers x"),
  ):
    np.savez(tmp_path / f"{name}.npz", x=x)
    with pytest.raises(ValueError, match=message):
      inputs.read_inputs(tmp_path / f"{name}.npz", 1, few)
