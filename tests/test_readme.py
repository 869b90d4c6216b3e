"""The README keeps its word: its settings table is config.py's, its recipes run as printed.

    python -m pytest tests/test_readme.py

The recipes for grad-cam, shap, streamlit and flask run where those packages are installed, and are skipped elsewhere.
"""
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
import data_loader
import models
import utils
from conftest import ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def recipe(word):
    found = [text for text in RECIPES if word in text]
    assert len(found) == 1, f"one recipe with {word!r}, not {len(found)}"
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with checkpoints/best_model.pth of an untrained B0 and a picture, as a colleague has it."""
    folder = tmp_path_factory.mktemp("colleague")
    args = utils.parse_args("baseline", "", ["--quick"])
    data = data_loader.open_dataset(args)
    model = models.build_model("efficientnet_b0", 10)
    model.classifier.weight.data *= 3e5  # so that, untrained, it is as sure of what it sees as a trained one
    info = models.describe("baseline", model, "efficientnet_b0", data, args)
    utils.save_best(folder / "checkpoints" / "best_model.pth", model, info, {"epoch": 1, "val_accuracy": 0.1})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / "picture.png")
    return folder


def run(text, folder, *flags):
    """Run a recipe as a person would: as a script of its own, beside the project's modules."""
    (folder / "recipe.py").write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "recipe.py", *flags], cwd=folder, capture_output=True, text=True, encoding="utf-8",
                          env={**__import__("os").environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_are_short():
    assert len(RECIPES) == 8 and all(len(text.strip().splitlines()) <= 10 for text in RECIPES)


def test_recipe_without_the_project(folder):
    """It says of a picture just what the project says."""
    line = run(recipe("timm.create_model"), folder).strip()
    model, info = models.load_model(folder / "checkpoints" / "best_model.pth")
    p, i = model(data_loader.build_transform(info)(data_loader.read_image(folder / "picture.png"))[None]).softmax(1)[0].max(0)
    assert line == f"{p:.1%} {info['class_names'][i]}"


def test_recipe_with_the_project(folder):
    lines = run(recipe("topk(3)):\n    print"), folder).splitlines()
    assert len(lines) == 3 and all(re.fullmatch(r"\d+\.\d% \d", line) for line in lines)
    assert lines[0] == run(recipe("timm.create_model"), folder).strip()


@pytest.mark.parametrize("package, word, output", [("pytorch_grad_cam", "GradCAM", "gradcam.png"), ("shap", "shap.image", "shap.png")])
def test_recipes_of_the_explainability_team(folder, package, word, output):
    pytest.importorskip(package)
    run(recipe(word), folder)
    with Image.open(folder / output) as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_search_recipe(folder):
    """Two settings of the search on tiny models: run, ranked by validation accuracy, none lost."""
    train = [str(ROOT / "train_baseline.py"), "--quick", "--student-model", "test_resnet", "--num-epochs", "6", "--checkpoint-dir", "teacher"]
    assert subprocess.run([sys.executable, *train], cwd=folder, capture_output=True).returncode == 0
    text = recipe("itertools").replace('"train_distillation.py"', repr(str(ROOT / "train_distillation.py"))).replace("(2, 4, 8)", "(4,)").replace('"--num-epochs", "2"', '"--num-epochs", "1"')
    lines = run(text, folder, "--quick", *TINY, "--teacher-checkpoint", "teacher/quick/baseline/best_model.pth").splitlines()
    ranked = [re.fullmatch(r"(\d+\.\d\d)%  (.*)", line).groups() for line in lines[-2:]]
    assert {place for _, place in ranked} == {str(Path("results", "search", f"T4_alpha{alpha}", "quick")) for alpha in (0.7, 0.9)}
    best = [utils.load_file(folder / place.replace("results", "checkpoints", 1) / "distilled" / "best_model.pth") for _, place in ranked]
    assert [f"{info['val_accuracy']:.2%}"[:-1] for info in best] == [accuracy for accuracy, _ in ranked]
    assert best[0]["val_accuracy"] >= best[1]["val_accuracy"]


def test_cifar_folder_recipe(folder, monkeypatch):
    """On 450 small images of two classes: of each the first 100 into train, from the 400th on into test."""
    class Cifar(list):
        classes = ["apple", "bear"]
    images = Cifar((Image.new("RGB", (32, 32), (i // 2 % 256, i % 2 * 255, 0)), i % 2) for i in range(900))
    monkeypatch.setattr("torchvision.datasets.CIFAR100", lambda root, download: images)
    monkeypatch.chdir(folder)
    exec(recipe("torchvision"), {})
    for part, places in (("train", range(100)), ("test", range(400, 450))):
        for name, second in (("apple", 0), ("bear", 255)):
            files = sorted(Path("data", "cifar100", part, name).iterdir())
            assert [Image.open(file).getpixel((0, 0)) for file in files] == [(place % 256, second, 0) for place in places]


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_commands_parse(folder, monkeypatch):
    """Every call of the scripts in a bash block, as bash reads it, is legal use; files that it names are taken to exist."""
    blocks = [block for block in re.findall(r"```(?:bash|text)\n(.*?)```", README, re.DOTALL) if "python " in block and "pip" not in block]
    spy = "python() { printf '%s\\x1f' \"$@\"; echo; }; cp() { :; }; mkdir() { :; }\n"
    done = subprocess.run(["bash", "-eu"], input=spy + "\n".join(blocks), capture_output=True, text=True, cwd=folder)
    calls = [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]
    assert not done.stderr and sum(len(re.findall(r"^python ", block, re.MULTILINE)) for block in blocks) <= len(calls) and len(calls) > 20
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "is_dir", lambda path: True)
    for script, *flags in calls:
        if script != "tests/benchmark_training.py":
            utils.parse_args({"train_baseline.py": "baseline", "train_distillation.py": "distillation", "evaluate.py": "evaluate"}[script], "", flags)


def odd_pictures():
    """(name, file content, whether it can be read) of what people upload."""
    random = np.random.default_rng(0)
    grey, colour = random.integers(0, 256, (40, 60), dtype=np.uint8), random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {"grey": Image.fromarray(grey), "rgba": Image.fromarray(np.dstack([colour, grey])), "dot": Image.new("RGB", (1, 1)),
              "palette": Image.fromarray(colour).quantize(16), "deep": Image.fromarray(grey.astype(np.uint16) * 257),
              "turned": Image.fromarray(colour), "line": Image.new("RGB", (1, 500)), "black and white": Image.fromarray(grey > 99)}
    for name, image in images.items():
        stream = io.BytesIO()
        image.save(stream, "PNG", **({"exif": turned} if name == "turned" else {}))
        yield name, stream.getvalue(), True
    whole = io.BytesIO()
    Image.fromarray(colour).save(whole, "JPEG")
    yield "truncated", whole.getvalue()[:-700], False
    yield "text", b"no picture", False
    yield "empty", b"", False


@pytest.mark.parametrize("name, content, readable", list(odd_pictures()))
def test_odd_pictures_get_a_prediction_or_one_sentence(folder, name, content, readable):
    model, info = models.load_model(folder / "checkpoints" / "best_model.pth")
    file = folder / f"{name}.png"
    file.write_bytes(content)
    if readable:
        assert model(data_loader.build_transform(info)(data_loader.read_image(file))[None]).shape == (1, 10)
        assert model(data_loader.build_transform(info)(Image.open(file))[None]).shape == (1, 10)
    else:
        with pytest.raises(utils.UserError, match=f"{name}.png cannot be read as a picture") as error:
            data_loader.read_image(file)
        assert "\n" not in str(error.value)


def test_streamlit_recipe(folder, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1")
    monkeypatch.chdir(folder)
    (folder / "page.py").write_text(recipe("streamlit"), encoding="utf-8")
    page = testing.AppTest.from_file(str(folder / "page.py"), default_timeout=60).run()
    assert not page.exception
    page.file_uploader[0].upload("picture.png", (folder / "picture.png").read_bytes(), "image/png").run()
    assert not page.exception and not page.error and page.main.children
    page.file_uploader[0].upload("broken.png", b"no picture", "image/png").run()
    assert not page.exception and "broken.png cannot be read as a picture" in page.error[0].value


def test_flask_recipe(folder, monkeypatch):
    pytest.importorskip("flask")
    monkeypatch.chdir(folder)
    scope = {"__name__": "server"}
    exec(compile(recipe("flask"), "server.py", "exec"), scope)
    for name, content, readable in odd_pictures():
        answer = scope["app"].test_client().post("/", data={"picture": (io.BytesIO(content), name)})
        if readable:
            assert answer.status_code == 200 and answer.json["class"] in map(str, range(10)) and 0 < answer.json["probability"] <= 1
        else:
            assert answer.status_code == 400 and answer.text.startswith(f"{name} cannot be read as a picture")


def test_settings_table_is_config(request):
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| `(.*?)` \|", README, re.MULTILINE))
    assert table == {name: str(getattr(config, name)) for name in utils.SETTINGS}
    rows = re.findall(r"^\| `([A-Z_]+)` \| `.*?` \| (.*?) \|$", README, re.MULTILINE)
    assert dict(rows) == {name: text for name, (_, _, text) in utils.SETTINGS.items()}


def test_links_and_parameter_counts():
    for target in re.findall(r"\]\(([^)#h][^)]*)\)", README):
        assert (ROOT / target).exists(), target
    counts = [sum(p.numel() for p in models.build_model(name, classes).parameters()) / 1e6
              for name in ("efficientnet_b0", "efficientnet_b2") for classes in (1000, 100)]
    assert [f"{count:.1f} million" for count in counts] == re.findall(r"[\d.]+ million", README)[:4]


def test_ci_runs_the_command_of_the_readme():
    command = next(line for line in README.splitlines() if line.endswith("python -m pytest tests"))
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
