"""The four README files are true: recipes run, commands parse, links lead somewhere.

    python -m pytest tests/test_readme.py

Recipes for packages that are not installed (grad-cam, shap, streamlit, flask, onnx) are skipped.
"""
import csv
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import data_loader
import evaluate
import models
import train_baseline
import train_distillation
import utils
from conftest import ROOT, STUDENT, TEACHER, save_best

FILES = ("README.md", "results/README.md", "checkpoints/README.md", "tests/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
README = TEXTS["README.md"]
RESULTS = TEXTS["results/README.md"]
CHECKPOINTS = TEXTS["checkpoints/README.md"]
EXAMPLE = ROOT / "results" / "example"

FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [block for text in TEXTS.values() for block in FENCE.findall(text)]

SECTIONS = ["Project Structure", "Setup", "Usage", "Configuration", "Model Sizes",
            "Knowledge Distillation", "Results", "Troubleshooting", "For Your Colleagues",
            "References"]
MAIN_SETTINGS = ["DATASET_NAME", "TEACHER_MODEL", "STUDENT_MODEL", "TEMPERATURE", "ALPHA",
                 "BATCH_SIZE", "NUM_EPOCHS"]
CI_COMMAND = next(line for line in README.splitlines() if line.endswith("python -m pytest tests"))


# Recipes ------------------------------------------------------------------------------------------

def recipe(heading, text=CHECKPOINTS):
    """The Python block below a heading of a README (as Markdown, so without the #)."""
    section = re.split(r"^#+ ", text.split(f"# {heading}\n", 1)[1], flags=re.MULTILINE)[0]
    blocks = [block for language, block in FENCE.findall(section) if language == "python"]
    assert len(blocks) == 1, f"{len(blocks)} recipes below {heading!r}"
    return blocks[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A colleague's folder: an untrained B0 as the best student, and a picture."""
    folder = tmp_path_factory.mktemp("colleague")
    args = config.parse_args("baseline", "", ["--quick"])
    data = data_loader.open_dataset(args)
    model = models.build_model("efficientnet_b0", len(data.class_names))
    model.classifier.weight.data *= 3e5  # untrained, it is as sure of what it sees as a trained one
    info = models.build_info("baseline", model, "efficientnet_b0", data, args,
                             gradcam_layer=models.gradcam_layer(model, args.image_size))
    save_best(folder / "checkpoints" / "baseline" / "best_model.pth", model, info)
    models.export_best_student(folder / "checkpoints", info)

    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def run(text, folder, *flags):
    """Run a recipe as a person would: as a script of its own, beside the project's modules."""
    (folder / "recipe.py").write_text(text, encoding="utf-8")
    return run_file(folder / "recipe.py", folder, *flags)


def run_file(file, folder, *flags):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, str(file), *flags], cwd=folder, env=environment,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def prediction(folder, picture):
    """The line that the recipes print, by the project's own functions."""
    model, info = models.load_model(folder / "checkpoints" / "best_model.pth")
    image = data_loader.read_image(folder / picture)
    probability, index = model(data_loader.build_transform(info)(image)[None]).softmax(1)[0].max(0)
    return f"{probability:.1%} {info['class_names'][index]}"


@pytest.mark.slow
def test_recipe_for_a_picture_of_the_quick_run(tmp_path):
    first_recipe = next(text for language, text in FENCE.findall(CHECKPOINTS)
                        if language == "python")
    run(first_recipe, tmp_path)
    with Image.open(tmp_path / "picture.png") as image:
        assert image.width == image.height


@pytest.mark.slow
def test_recipe_of_the_readme(folder):
    show = "print(model.training, len(model.blocks))"
    printed = run(recipe("For Your Colleagues", README) + show, folder)
    assert printed.split() == ["False", "7"]


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["With timm alone", "From the single file"])
@pytest.mark.parametrize("kind", ["plain", "grey", "black and white", "rgba", "palette", "turned"])
def test_recipes_without_the_project_see_the_same_pixels(folder, heading, kind):
    content = dict(uploads())[kind]
    (folder / "picture.png").write_bytes(content)
    assert run(recipe(heading), folder).strip() == prediction(folder, "picture.png")


@pytest.mark.slow
def test_recipe_with_the_project(folder):
    lines = run(recipe("With the project"), folder).splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r"\d+\.\d% \S+", line) for line in lines)
    assert lines[0] == prediction(folder, "picture.png")


@pytest.mark.slow
def test_recipe_that_classifies_a_folder(folder):
    pictures = folder / "pictures" / "some"
    pictures.mkdir(parents=True)
    shutil.copy(folder / "picture.png", pictures / "b.png")
    (pictures / "a.txt").write_text("no picture")

    printed = run(recipe("Classify a folder"), folder)
    with open(folder / "predictions.csv", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    probability, name = prediction(folder, "picture.png").split()
    assert [line["file"] for line in lines] == ["pictures/some/b.png"]
    assert lines[0]["class"] == name
    assert f"{float(lines[0]['probability']):.0%}" == f"{float(probability[:-1]):.0f}%"
    assert "a.txt" in printed


@pytest.mark.slow
@pytest.mark.parametrize("package, heading, output", [
    ("pytorch_grad_cam", "GradCAM", "gradcam.png"), ("shap", "SHAP", "shap.png")])
def test_recipes_of_the_explainability_team(folder, package, heading, output):
    pytest.importorskip(package)
    explanation = "heat" if heading == "GradCAM" else "values / limit"
    printed = run(recipe(heading) + f"print(({explanation}).std())\n", folder)
    assert float(printed) > 0.05  # of 0 to 1; a blank explanation says nothing
    with Image.open(folder / output) as image:
        assert image.width > 600
        assert image.height > 300


@pytest.mark.slow
def test_onnx_recipe(folder):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    printed = run(recipe("ONNX"), folder)
    model, info = models.load_model(folder / "checkpoints" / "best_model.pth")
    image = data_loader.read_image(folder / "picture.png")
    largest_logit = model(data_loader.build_transform(info)(image)[None]).abs().max().item()
    assert float(printed.split()[-1]) < 1e-4 * largest_logit

    import onnxruntime
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    size = info["image_size"]
    for batch_size in (1, 3):
        images = np.zeros((batch_size, 3, size, size), dtype=np.float32)
        logits = session.run(["logits"], {"images": images})[0]
        assert logits.shape == (batch_size, info["num_classes"])


def uploads():
    """(name, file content) of pictures as people have them, all of which can be read."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (40, 60), dtype=np.uint8)
    colour = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    images = {
        "plain": Image.fromarray(colour),
        "grey": Image.fromarray(grey),
        "black and white": Image.fromarray(grey > 99),
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
        "rgba": Image.fromarray(np.dstack([colour, grey])),
        "palette": Image.fromarray(colour).quantize(16),
        "turned": Image.fromarray(colour),
        "dot": Image.new("RGB", (1, 1)),
        "line": Image.new("RGB", (1, 500)),
    }
    for name, image in images.items():
        stream = io.BytesIO()
        image.save(stream, "PNG", **({"exif": exif} if name == "turned" else {}))
        yield name, stream.getvalue()


def broken_uploads():
    """(name, file content) of files that are no pictures, or not whole."""
    stream = io.BytesIO()
    Image.new("RGB", (60, 40), "red").save(stream, "JPEG")
    yield "truncated", stream.getvalue()[:-200]
    yield "text", b"no picture"
    yield "empty", b""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in uploads()])
def test_any_picture_gets_a_prediction(folder, name):
    model, info = models.load_model(folder / "checkpoints" / "best_model.pth")
    transform = data_loader.build_transform(info)
    file = folder / f"{name}.png"
    file.write_bytes(dict(uploads())[name])
    for image in (data_loader.read_image(file), Image.open(file)):
        assert model(transform(image)[None]).shape == (1, info["num_classes"])


@pytest.mark.parametrize("name", [name for name, _ in broken_uploads()])
def test_a_broken_picture_is_named(folder, name):
    file = folder / f"{name}.png"
    file.write_bytes(dict(broken_uploads())[name])
    with pytest.raises(utils.UserError, match=f"{name}.png .*picture"):
        data_loader.read_image(file)


@pytest.mark.slow
def test_streamlit_recipe(folder, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1")
    monkeypatch.chdir(folder)
    (folder / "page.py").write_text(recipe("Streamlit"), encoding="utf-8")
    page = testing.AppTest.from_file(str(folder / "page.py"), default_timeout=60).run()
    assert not page.exception

    picture = (folder / "picture.png").read_bytes()
    page.file_uploader[0].upload("picture.png", picture, "image/png").run()
    assert not page.exception
    assert not page.error
    probabilities = [bar.proto.value for bar in page.get("progress")]
    assert len(probabilities) == 3
    assert probabilities == sorted(probabilities, reverse=True)

    page.file_uploader[0].upload("broken.png", b"no picture", "image/png").run()
    assert not page.exception
    assert "broken.png" in page.error[0].value


def test_flask_recipe(folder, monkeypatch):
    pytest.importorskip("flask")
    monkeypatch.chdir(folder)
    scope = {"__name__": "server"}
    exec(compile(recipe("Flask"), "server.py", "exec"), scope)
    client = scope["app"].test_client()

    page = client.get("/")
    assert page.status_code == 200
    assert 'type="file"' in page.text

    for name, content in uploads():
        answer = client.post("/", data={"picture": (io.BytesIO(content), name)})
        assert answer.status_code == 200
        assert 0 < answer.json["probability"] <= 1
    assert answer.json["class"] in models.load_model("checkpoints/best_model.pth")[1]["class_names"]

    # Every fault is answered in the same form.
    for name, content in broken_uploads():
        answer = client.post("/", data={"picture": (io.BytesIO(content), name)})
        assert answer.status_code == 400
        assert name in answer.json["error"]
    faults = {
        400: client.post("/", data={"image": "x"}),
        404: client.get("/elsewhere"),
        405: client.delete("/"),
        413: client.post("/", data={"picture": (io.BytesIO(bytes(33 * 2**20)), "large")}),
    }
    for status, answer in faults.items():
        assert answer.status_code == status
        assert list(answer.json) == ["error"]


# Scripts of results/example -----------------------------------------------------------------------

def load_script(name):
    """A script of results/example as a module; its main part does not run."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_control_shuffles_the_wrong_classes_only(monkeypatch):
    """Each image keeps its true class's logit and, in another order, all the others."""
    control = load_script("control")
    logits = torch.randn(64, 10)
    labels = torch.arange(64) % 10
    shuffled = control.shuffle_wrong_classes(logits, labels)

    assert torch.equal(shuffled.gather(1, labels[:, None]), logits.gather(1, labels[:, None]))
    assert torch.equal(shuffled.sort(1).values, logits.sort(1).values)
    moved = (shuffled != logits).float().mean()  # of 9 wrong classes 8 move, on average
    assert abs(moved - 0.8) < 0.1
    assert not torch.equal(shuffled, control.shuffle_wrong_classes(logits, labels))


@pytest.mark.slow
def test_control_trains_with_the_shuffled_teacher(arguments, monkeypatch):
    """The loop's distillation loss gets the teacher's logits shuffled by that step's own labels."""
    control = load_script("control")
    monkeypatch.setattr(models, "min_useful_accuracy", lambda chance: 0.0)
    monkeypatch.setattr(models, "cross_entropy", models.cross_entropy)  # control replaces both
    monkeypatch.setattr(models, "distill_loss", models.distill_loss)

    seen = []

    def shuffle(logits, labels):
        seen.append((logits.argmax(1), labels))
        return logits

    monkeypatch.setattr(control, "shuffle_wrong_classes", shuffle)
    args = arguments("distillation", "--num-epochs", "1", "--warmup-epochs", "0",
                     "--teacher-epochs", "5", "--batch-size", "64")
    control.main(args)
    teacher_accuracy = [(predicted == labels).float().mean().item() for predicted, labels in seen]
    assert len(seen) > 10
    assert np.mean(teacher_accuracy) > 0.3  # far above chance level: these labels are the step's


@pytest.mark.slow
def test_search_ranks_by_validation_accuracy(folder, monkeypatch):
    """Two settings on tiny models: both run, and the better one is printed first."""
    train = [sys.executable, str(ROOT / "train_baseline.py"), "--quick", "--student-model",
             "test_resnet", "--num-epochs", "6", "--checkpoint-dir", "teacher"]
    train += ["--seed", "0"]
    assert subprocess.run(train, cwd=folder, capture_output=True).returncode == 0
    teacher = next(folder.glob("teacher/quick/baseline/**/best_model.pth"))

    text = (EXAMPLE / "search.py").read_text(encoding="utf-8")
    for printed, small in (("(2, 4, 8)", "(4,)"), ("NUM_EPOCHS = 2", "NUM_EPOCHS = 1"),
                           ("Path(__file__).resolve().parents[2]", f"Path({str(ROOT)!r})")):
        assert printed in text
        text = text.replace(printed, small)
    flags = ["--quick", "--seed", "0", "--warmup-epochs", "0", *STUDENT, *TEACHER]
    flags += ["--teacher-checkpoint", str(teacher)]
    lines = run(text, folder, *flags).splitlines()

    ranked = [re.fullmatch(r"(\d+\.\d\d)%  (.*)", line).groups() for line in lines[-2:]]
    assert {Path(place).parts[2] for _, place in ranked} == {"T4_alpha0.7", "T4_alpha0.9"}
    accuracies = [float(accuracy) for accuracy, _ in ranked]
    assert accuracies == sorted(accuracies, reverse=True)
    for accuracy, place in ranked:
        run_folder = folder / place.replace("results", "checkpoints", 1)
        checkpoint = next(run_folder.glob("distilled/**/best_model.pth"), None)
        checkpoint = checkpoint or next(run_folder.parent.glob("distilled/**/best_model.pth"))
        assert f"{utils.load_checkpoint(checkpoint)['val_accuracy']:.2%}" == f"{accuracy}%"


@pytest.mark.slow
def test_figure_of_lengths(tmp_path):
    for folder, gain in (("length_10", 0.01), ("length_kd_10", 0.0), ("length_50", 0.03)):
        report = {
            "dataset": {"name": "CIFAR-100"},
            "seeds": [0],
            "models": {"baseline": {"top1": 0.6},
                       "distilled": {"top1": 0.6 + gain, "model_name": "student"},
                       "teacher": {"top1": 0.65, "model_name": "teacher"}},
            "comparison": {"gain": gain, "ci_over_images": [gain - 0.01, gain + 0.01]},
        }
        file = tmp_path / "results" / folder / "comparison.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(report), encoding="utf-8")

    show = "\nprint([list(bar[0].get_xydata()[0]) for bar in axes[1].containers])\n"
    text = (EXAMPLE / "length.py").read_text(encoding="utf-8")
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", run(text + show, tmp_path))]
    assert numbers == [9.0, 0.0, 11.0, 1.0, 51.0, 3.0]  # epochs, shifted by loss; gain in points
    assert (tmp_path / "results" / "length.png").stat().st_size > 10_000


def test_cifar_folder_is_always_the_same_choice(tmp_path, monkeypatch):
    class Cifar(list):
        classes = ["apple", "bear"]

        def __init__(self, root, train, download):
            self.targets = [i % 2 for i in range(500 if train else 300)]
            super().__init__((Image.new("RGB", (32, 32), (i // 2, label * 255, train * 9)), label)
                             for i, label in enumerate(self.targets))

    monkeypatch.setattr("torchvision.datasets.CIFAR100", Cifar)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        load_script("cifar_folder")
    for part, blue in (("train", 9), ("test", 0)):
        for name, green in (("apple", 0), ("bear", 255)):
            files = sorted(Path("data", "CIFAR-100", part, name).iterdir())
            indices = [int(file.stem) for file in files]
            assert len(files) == 100
            assert max(indices) > 220  # not the first ones
            colours = [Image.open(file).getpixel((0, 0)) for file in files]
            assert colours == [(i // 2, green, blue) for i in indices]


@pytest.mark.slow
def test_timm_loop_trains_both_students(arguments, monkeypatch):
    timm_loop = load_script("timm_loop")
    for script in (train_baseline, train_distillation):
        monkeypatch.setattr(script, "train", script.train)  # timm_loop replaces both
    have_teacher = []
    timm_trainer = timm_loop.benchmark_training.timm_trainer

    def noting_trainer(student, teacher, *rest):
        have_teacher.append(teacher is not None)
        return timm_trainer(student, teacher, *rest)

    monkeypatch.setattr(timm_loop.benchmark_training, "timm_trainer", noting_trainer)
    flags = ["--num-epochs", "4", "--learning-rate", "3e-3", "--augmentation", "flip_crop"]
    args = arguments("baseline", *flags)
    timm_loop.main(args)
    baseline = utils.run_folder("baseline", args) / "best_model.pth"
    flags += ["--teacher-checkpoint", str(baseline)]
    args = arguments("distillation", *flags)
    timm_loop.main(args)
    assert have_teacher == [False, True]

    for run in ("baseline", "distilled"):
        model, info = models.load_model(utils.run_folder(run, args) / "best_model.pth")
        assert info["run"] == run
        assert info["val_accuracy"] > 0.4  # by chance: 0.1
        data = data_loader.open_dataset(args)
        loader = data_loader.EvaluationLoader(data.val, info, args, torch.device("cpu"))
        assert train_baseline.validate(model, loader)["val_accuracy"] == info["val_accuracy"]

    with pytest.raises(utils.UsageError, match="--distillation-loss"):
        timm_loop.main(arguments("distillation", *flags, "--distillation-loss", "lskd"))


# Commands -----------------------------------------------------------------------------------------

SCRIPTS = {
    "train_baseline.py": "baseline",
    "train_distillation.py": "distillation",
    "evaluate.py": "evaluate",
    "results/example/search.py": "distillation",   # these three pass their flags on
    "results/example/control.py": "distillation",
    "results/example/timm_loop.py": "distillation",
}
WITHOUT_FLAGS = ("tests/check_gpu.py", "results/example/length.py",
                 "results/example/cifar_folder.py")
BENCHMARK = "tests/benchmark_training.py"


@pytest.fixture
def calls(tmp_path):
    """The arguments of every python command in the bash blocks of the four files and in
    reports.sh, as bash reads them."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    blocks = "\n".join(text for language, text in BLOCKS if language == "bash")
    spies = ["""python() { printf '%s\\x1f' "$@"; echo; }""",
             f"""bash() {{ source '{ROOT.as_posix()}'/"$1"; }}"""]
    spies += [f"{name}() {{ :; }}" for name in ("python3", "pip", "cp", "mkdir", ".")]
    script = "\n".join([*spies, blocks])
    done = subprocess.run(["bash", "-eu"], input=script, capture_output=True, text=True,
                          encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    found = [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]
    assert len(found) > 60
    return found


def test_commands_of_the_scripts_parse(calls, tmp_path, monkeypatch):
    """Each is legal use where the files it names exist."""
    monkeypatch.chdir(tmp_path)
    for script, *flags in calls:
        for flag, name in itertools.pairwise(flags):
            if flag in ("--student-weights", "--teacher-weights", "--teacher-checkpoint"):
                Path(name).parent.mkdir(parents=True, exist_ok=True)
                Path(name).touch()
            if flag == "--dataset-dir":
                Path(name).mkdir(parents=True, exist_ok=True)
        if script in SCRIPTS:
            config.parse_args(SCRIPTS[script], "", flags)
        elif script in WITHOUT_FLAGS:
            assert not flags
        else:
            assert script in ("-m", "-c", BENCHMARK)


@pytest.mark.slow
def test_scripts_named_in_commands_exist(calls, request):
    markers = {line.split(":")[0] for line in request.config.getini("markers")}
    benchmark = subprocess.run([sys.executable, str(ROOT / BENCHMARK), "--help"],
                               capture_output=True, text=True, encoding="utf-8").stdout
    for script, *arguments_ in calls:
        if script == "-c":
            compile(arguments_[0], "command", "exec")
        elif script == "-m":
            assert arguments_[0] == "pytest"
            assert (ROOT / arguments_[1]).exists()
            if "-m" in arguments_:
                assert arguments_[arguments_.index("-m") + 1].removeprefix("not ") in markers
        else:
            assert (ROOT / script).is_file()
        if script == BENCHMARK:
            assert all(f"{flag} " in benchmark for flag in arguments_ if flag.startswith("--"))


@pytest.mark.slow
def test_verify_gpu_recipe(calls):
    command = next(arguments_ for script, *arguments_ in calls if script == "-c")
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.strip()


@pytest.mark.slow
def test_flags_named_in_the_text_exist(capsys):
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            config.parse_args(script, "", ["--help"])
    check_gpu = subprocess.run([sys.executable, str(ROOT / "tests" / "check_gpu.py"), "--help"],
                               capture_output=True, text=True, encoding="utf-8").stdout
    known = {*re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out + check_gpu),
             "--app",  # flask's
             "--standalone", "--nproc-per-node"}  # torchrun's
    for name, text in TEXTS.items():
        for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code)) <= known, f"{name}: {code}"


def test_ci_runs_the_command_of_the_readme():
    assert CI_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


# Links and names ----------------------------------------------------------------------------------

def headings(file):
    """The anchors that GitHub makes of a Markdown file's headings."""
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [*FILES, ".github/CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def test_readme_has_its_sections_in_order():
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == SECTIONS


def test_git_ignores_what_the_scripts_write():
    def ignored(path):
        command = ["git", "-C", str(ROOT), "check-ignore", "-q", "--no-index", path]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("needs git and a repository")
    committed = [*FILES, "data/.gitkeep", "results/example/comparison_report.txt"]
    written = ["checkpoints/best_model.pth", "checkpoints/baseline/last.pth",
               "results/quick/x.png", "results/comparison.json", "data/cifar-100-python.tar.gz"]
    assert not any(ignored(path) for path in committed)
    assert all(ignored(path) for path in written)


# Facts --------------------------------------------------------------------------------------------

def rows(text, heading):
    """The cells of the first table below a heading, without its two rows of head."""
    below = text[text.index(f"# {heading}\n"):]
    table = re.search(r"(?:^\|.*\n)+", below, re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")]
            for line in table.splitlines()[2:]]


def names(table):
    return [name for row in table for name in re.findall(r"`(.*?)`", row[0])]


def test_structure_is_that_of_the_folder():
    tree = next(text for language, text in FENCE.findall(README)
                if language == "text" and "requirements.txt" in text)
    listed = {line.split()[0] for line in tree.splitlines()}
    assert all((ROOT / name).exists() for name in listed)
    modules = {file.name for file in ROOT.glob("*.py")}
    assert listed == modules | {"requirements.txt", "tests/", "checkpoints/", "results/", "data/"}


def test_settings_are_those_of_config():
    table = rows(README, "Configuration")
    assert names(table)[:len(MAIN_SETTINGS)] == MAIN_SETTINGS
    for row in table:
        assert row[1] == f"`{getattr(config, names([row])[0])}`"


@pytest.mark.slow
def test_model_sizes():
    from torch.utils.flop_counter import FlopCounterMode
    for row, name in zip(rows(README, "Model Sizes"), ("efficientnet_b0", "efficientnet_b2"),
                         strict=True):
        parameters = {}
        for classes in (1000, 100):
            model = models.build_model(name, classes).eval()
            parameters[classes] = sum(p.numel() for p in model.parameters())
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, 224, 224))
        megabytes = sum(tensor.nbytes for tensor in model.state_dict().values()) / 1e6
        assert row[1] == f"{parameters[1000] / 1e6:.1f} million"
        assert row[2] == f"{parameters[100] / 1e6:.1f} million"
        assert row[3] == f"{counter.get_total_flops() / 2e9:.2f} billion"
        assert abs(float(row[4].split()[0]) - megabytes) < 1


def test_first_table_is_the_examples():
    example = json.loads((EXAMPLE / "comparison.json").read_text(encoding="utf-8"))
    title = README.splitlines()[0].removeprefix("# ")
    table = {}
    for row in rows(README, title):
        table.setdefault(row[0].split(",")[0], row)  # the first of several distilled students
    for role in ("teacher", "baseline", "distilled"):
        scores = example["models"][role]
        spread = f" ± {100 * scores['sd']['top1']:.2f}" if scores["sd"] else ""
        assert table[role][1] == f"{100 * scores['top1']:.2f}{spread} %"

    comparison = example["comparison"]
    low, high = comparison[f"ci_over_{comparison['verdict_ci']}"]
    expected = f"{100 * comparison['gain']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    assert table["distilled"][2].strip("*") == expected


def test_keys_of_a_checkpoint(folder):
    checkpoint = utils.load_checkpoint(folder / "checkpoints" / "best_model.pth")
    listed = names(rows(CHECKPOINTS, "What best_model.pth holds"))
    assert sorted(listed) == sorted({*checkpoint, "teacher"})


def test_columns_of_a_history():
    assert names(rows(RESULTS, "What a history holds")) == list(utils.HISTORY_COLUMNS)


@pytest.mark.slow
def test_keys_of_the_comparison(train, arguments):
    """Every key that evaluate.py writes is explained, and each explained section is written."""
    train("baseline")
    train("distillation")
    args = arguments("evaluate", "--no-timing")
    evaluate.main(args)
    content = (Path(args.results_dir) / "comparison.json").read_text(encoding="utf-8")
    comparison = json.loads(content)

    section = RESULTS.split("### What `comparison.json` holds")[1].split("###")[0]
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`(.*?)`", section))))
    explained = words | set(comparison["models"]) | set(comparison["teacher_effect"])
    for path in key_paths(comparison):
        assert path[-1].removesuffix("_spread") in explained, path

    sections = {name.split(".")[0] for name in names(rows(RESULTS, "What `comparison.json` holds"))}
    assert sections - {"superclasses"} == set(comparison)  # these are CIFAR-100's


OF_CLASSES = ("per_class_accuracy", "images_per_class", "class_changes", "versions")


def key_paths(numbers, path=()):
    """The path of every key in a nested dict, without the names of classes and packages."""
    for key, value in numbers.items():
        yield (*path, key)
        items = value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, dict) and key not in OF_CLASSES:
                yield from key_paths(item, (*path, key))
