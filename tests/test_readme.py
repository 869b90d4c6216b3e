"""The four README files keep their word: recipes run, commands parse, links lead somewhere.

    python -m pytest tests/test_readme.py

The recipes for grad-cam, shap, streamlit and flask run where those packages are installed, and are
skipped elsewhere.
"""
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
import models
import utils
from conftest import ROOT, STUDENT, TEACHER, save_best

FILES = ("README.md", "results/README.md", "checkpoints/README.md", "tests/README.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
README, RESULTS, CHECKPOINTS, _ = TEXTS.values()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = [block for text in TEXTS.values() for block in FENCE.findall(text)]
RECIPES = [text for language, text in BLOCKS if language == "python"]
SECTIONS = ["Project Structure", "Setup", "Usage", "Configuration", "Model Sizes",
            "Knowledge Distillation", "Results", "Troubleshooting", "For Your Colleagues",
            "References"]
MAIN_SETTINGS = ["DATASET_NAME", "TEACHER_MODEL", "STUDENT_MODEL", "TEMPERATURE", "ALPHA",
                 "BATCH_SIZE", "NUM_EPOCHS"]
CI_COMMAND = next(line for line in README.splitlines() if line.endswith("python -m pytest tests"))


# Recipes ------------------------------------------------------------------------------------------

def recipe(word):
    found = [text for text in RECIPES if word in text]
    assert len(found) == 1, f"one recipe with {word!r}, not {len(found)}"
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A colleague's folder: an untrained B0 as the best student, and a picture."""
    folder = tmp_path_factory.mktemp("colleague")
    args = config.parse_args("baseline", "", ["--quick"])
    data = data_loader.open_dataset(args)
    model = models.build_model("efficientnet_b0", 10)
    model.classifier.weight.data *= 3e5  # untrained, it is as sure of what it sees as a trained one
    info = models.build_info("baseline", model, "efficientnet_b0", data, args)
    save_best(folder / "checkpoints" / "baseline" / "best_model.pth", model, info)
    models.export_best_student(folder / "checkpoints", info)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def run(text, folder, *flags):
    """Run a recipe as a person would: as a script of its own, beside the project's modules."""
    (folder / "recipe.py").write_text(text, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, "recipe.py", *flags], cwd=folder, env=environment,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_are_short():
    assert len(RECIPES) == 12
    assert all(len(text.strip().splitlines()) <= 11 for text in RECIPES)


def test_recipe_for_a_picture_of_the_quick_run(tmp_path):
    run(recipe('"Digits"'), tmp_path)
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size == (8, 8)


@pytest.mark.parametrize("word", ["local-dir", "weights_only"])
def test_recipes_without_the_project(folder, word):
    """They say of a picture just what the project says."""
    line = run(recipe(word), folder).strip()
    model, info = models.load_model(folder / "checkpoints" / "best_model.pth")
    image = data_loader.read_image(folder / "picture.png")
    p, i = model(data_loader.build_transform(info)(image)[None]).softmax(1)[0].max(0)
    assert line == f"{p:.1%} {info['class_names'][i]}"


def test_recipe_with_the_project(folder):
    lines = run(recipe("topk(3)):\n    print"), folder).splitlines()
    assert len(lines) == 3
    assert all(re.fullmatch(r"\d+\.\d% \d", line) for line in lines)
    assert lines[0] == run(recipe("local-dir"), folder).strip()


@pytest.mark.parametrize("package, word, output", [
    ("pytorch_grad_cam", "GradCAM", "gradcam.png"), ("shap", "shap.image", "shap.png")])
def test_recipes_of_the_explainability_team(folder, package, word, output):
    pytest.importorskip(package)
    told = run(recipe(word) + ("print(heat.std())\n" if word == "GradCAM" else ""), folder)
    assert word != "GradCAM" or float(told) > 0.05  # of 0 to 1; a blank stamp says nothing
    with Image.open(folder / output) as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_search_recipe(folder):
    """Two settings of the search on tiny models: run, ranked by validation accuracy, none lost."""
    train = [sys.executable, str(ROOT / "train_baseline.py"), "--quick", "--student-model",
             "test_resnet", "--num-epochs", "6", "--checkpoint-dir", "teacher"]
    assert subprocess.run(train, cwd=folder, capture_output=True).returncode == 0
    text = recipe("itertools")
    for printed, small in (('"train_distillation.py"', repr(str(ROOT / "train_distillation.py"))),
                           ("(2, 4, 8)", "(4,)"), ("--num-epochs 2", "--num-epochs 1")):
        assert printed in text
        text = text.replace(printed, small)
    teacher = "teacher/quick/baseline/best_model.pth"
    lines = run(text, folder, "--quick", *STUDENT, *TEACHER, "--teacher-checkpoint", teacher)
    lines = lines.splitlines()
    ranked = [re.fullmatch(r"(\d+\.\d\d)%  (.*)", line).groups() for line in lines[-2:]]
    places = {str(Path("results", "search", f"T4_alpha{alpha}", "quick")) for alpha in (0.7, 0.9)}
    assert {place for _, place in ranked} == places
    best = []
    for _, place in ranked:
        checkpoints = folder / place.replace("results", "checkpoints", 1)
        best.append(utils.load_checkpoint(checkpoints / "distilled" / "best_model.pth")["val_accuracy"])
    assert [f"{accuracy:.2%}"[:-1] for accuracy in best] == [accuracy for accuracy, _ in ranked]
    assert best[0] >= best[1]


def test_control_recipe_shuffles_the_wrong_classes_alone(monkeypatch):
    """Each image keeps its true class's logit and, in another order, all the others."""
    monkeypatch.setattr(sys, "argv", ["control.py", "--quick"])
    monkeypatch.setattr(models, "distillation_loss", lambda student, teacher, *_: teacher)
    monkeypatch.setattr(utils, "run_script", lambda main, args: None)
    scope = {}
    with pytest.raises(SystemExit):
        exec(recipe("argsort"), scope)
    assert models.distillation_loss is scope["shuffled"]
    logits, labels = torch.randn(64, 10), torch.arange(64) % 10
    seen = models.distillation_loss(torch.zeros(64, 10), logits, labels, None)
    assert torch.equal(seen.gather(1, labels[:, None]), logits.gather(1, labels[:, None]))
    assert torch.equal(seen.sort(1).values, logits.sort(1).values)
    moved = (seen != logits).float().mean(1)  # of 9 wrong classes 8 on average, by chance
    assert abs(moved.mean() - 0.8) < 0.1 and not torch.equal(seen, scope["shuffled"](
        torch.zeros(64, 10), logits, labels, None))


def test_figure_of_lengths_recipe(tmp_path):
    """The dots lie where the three reports have them: higher gains, higher dots."""
    example = json.loads((ROOT / "results/example/comparison.json").read_text(encoding="utf-8"))
    for epochs in (10, 25, 50):
        example["comparison"] |= {"difference": epochs / 1000, "interval_over_images": [0, 0.06]}
        place = tmp_path / "results" / f"length_{epochs}"
        place.mkdir(parents=True)
        (place / "comparison.json").write_text(json.dumps(example), encoding="utf-8")
    told = run(recipe("errorbar") + "print(*(bar[0].get_xydata() for bar in axes.containers))\n",
               tmp_path)
    assert re.findall(r"[\d.]+", told) == ["10.", "1.", "25.", "2.5", "50.", "5."]
    with Image.open(tmp_path / "results" / "length.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_cifar_folder_recipe(folder, monkeypatch):
    """Of each part's two classes 100 images by chance, the same ones each time."""
    class Cifar(list):
        classes = ["apple", "bear"]

        def __init__(self, root, train, download):
            self.targets = [i % 2 for i in range(500 if train else 300)]
            super().__init__((Image.new("RGB", (32, 32), (i // 2, label * 255, train * 9)), label)
                             for i, label in enumerate(self.targets))
    monkeypatch.setattr("torchvision.datasets.CIFAR100", Cifar)
    monkeypatch.chdir(folder)
    for _ in range(2):
        exec(recipe("torchvision"), {})
    for part, blue in (("train", 9), ("test", 0)):
        for name, green in (("apple", 0), ("bear", 255)):
            files = sorted(Path("data", "CIFAR-100", part, name).iterdir())
            places = [int(file.stem) for file in files]
            assert len(files) == 100 and max(places) > 220  # not the first ones
            colours = [Image.open(file).getpixel((0, 0)) for file in files]
            assert colours == [(place // 2, green, blue) for place in places]


def odd_pictures():
    """(name, file content, whether it can be read) of what people upload."""
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (40, 60), dtype=np.uint8)
    colour = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    images = {
        "grey": Image.fromarray(grey), "black and white": Image.fromarray(grey > 99),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "rgba": Image.fromarray(np.dstack([colour, grey])),
        "palette": Image.fromarray(colour).quantize(16), "turned": Image.fromarray(colour),
        "dot": Image.new("RGB", (1, 1)), "line": Image.new("RGB", (1, 500))}
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
    transform = data_loader.build_transform(info)
    file = folder / f"{name}.png"
    file.write_bytes(content)
    if readable:
        for image in (data_loader.read_image(file), Image.open(file)):
            assert model(transform(image)[None]).shape == (1, 10)
    else:
        with pytest.raises(utils.UserError) as error:
            data_loader.read_image(file)
        message = str(error.value)
        assert f"{name}.png cannot be read as a picture" in message and "\n" not in message


def test_streamlit_recipe(folder, monkeypatch):
    testing = pytest.importorskip("streamlit.testing.v1")
    monkeypatch.chdir(folder)
    (folder / "page.py").write_text(recipe("streamlit"), encoding="utf-8")
    page = testing.AppTest.from_file(str(folder / "page.py"), default_timeout=60).run()
    assert not page.exception
    picture = (folder / "picture.png").read_bytes()
    page.file_uploader[0].upload("picture.png", picture, "image/png").run()
    assert not page.exception and not page.error and page.main.children
    page.file_uploader[0].upload("broken.png", b"no picture", "image/png").run()
    assert not page.exception
    assert "broken.png cannot be read as a picture" in page.error[0].value


def test_flask_recipe(folder, monkeypatch):
    pytest.importorskip("flask")
    monkeypatch.chdir(folder)
    scope = {"__name__": "server"}
    exec(compile(recipe("flask"), "server.py", "exec"), scope)
    client = scope["app"].test_client()
    answer = client.post("/", data={"image": "x"})
    assert answer.status_code == 400 and "no form field named picture" in answer.text
    for name, content, readable in odd_pictures():
        answer = client.post("/", data={"picture": (io.BytesIO(content), name)})
        if readable:
            assert answer.status_code == 200
            assert answer.json["class"] in map(str, range(10))
            assert 0 < answer.json["probability"] <= 1
        else:
            assert answer.status_code == 400
            assert answer.text.startswith(f"{name} cannot be read as a picture")


# Commands -----------------------------------------------------------------------------------------

SCRIPTS = {"train_baseline.py": "baseline", "train_distillation.py": "distillation",
           "evaluate.py": "evaluate", "search.py": "distillation",
           "control.py": "distillation"}  # search.py and control.py pass their flags on
BENCHMARK = "tests/benchmark_training.py"
CHECK, FIGURE = "tests/check_gpu.py", "length.py"  # neither has a flag


@pytest.fixture
def calls(tmp_path):
    """The arguments of every python in a bash block of the four files, as bash reads them."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    blocks = "\n".join(text for language, text in BLOCKS if language == "bash")
    spies = "python() { printf '%s\\x1f' \"$@\"; echo; }\n"
    spies += "\n".join(f"{name}() {{ :; }}" for name in ("python3", "pip", "cp", "mkdir", "."))
    done = subprocess.run(["bash", "-eu"], input=f"{spies}\n{blocks}", capture_output=True,
                          text=True, encoding="utf-8", cwd=tmp_path)
    assert not done.stderr and done.returncode == 0
    found = [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]
    assert len(found) >= len(re.findall(r"\bpython ", blocks)) > 20
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
        if script not in ("-m", BENCHMARK, CHECK, FIGURE):
            config.parse_args(SCRIPTS[script], "", flags)
    assert {script for script, *_ in calls} == {*SCRIPTS, "-m", BENCHMARK, CHECK, FIGURE}


def test_commands_of_pytest_and_the_benchmark_exist(calls, request):
    markers = {line.split(":")[0] for line in request.config.getini("markers")}
    benchmark = subprocess.run([sys.executable, str(ROOT / BENCHMARK), "--help"],
                               capture_output=True, text=True, encoding="utf-8").stdout
    for script, *arguments in calls:
        if script == "-m":
            assert arguments[0] == "pytest" and (ROOT / arguments[1]).exists()
            assert set(" ".join(arguments[2:]).split()) <= markers | {"-m", "not"}
        if script == CHECK:
            assert (ROOT / CHECK).exists() and not arguments
        if script == BENCHMARK:
            assert all(f"{flag} " in benchmark for flag in arguments if flag.startswith("--"))


def test_flags_named_in_the_text_exist(capsys):
    for script in SCRIPTS.values():
        with pytest.raises(SystemExit):
            config.parse_args(script, "", ["--help"])
    known = {*re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out), "--app",  # flask's
             "--standalone", "--nproc-per-node"}  # torchrun's
    for name, text in TEXTS.items():
        for code in re.findall(r"`([^`]+)`", FENCE.sub("", text)):
            assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code)) <= known, f"{name}: {code}"


def test_ci_runs_the_command_of_the_readme():
    assert CI_COMMAND in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


# Form ---------------------------------------------------------------------------------------------

def test_readme_is_short_and_has_its_sections_in_order():
    assert len(README.splitlines()) <= 180
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("name", FILES)
def test_lines_are_at_most_100_columns(name):
    """But for tables, where a link leads to, and the command that must stand as in .ci/run."""
    for line in TEXTS[name].splitlines():
        shown = re.sub(r"\]\([^)]*\)", "]", line)
        assert len(shown) <= 100 or line.startswith("|") or line == CI_COMMAND, line


@pytest.mark.parametrize("name", FILES[1:])
def test_first_line_names_the_reader(name):
    assert TEXTS[name].startswith("# For those who ") or TEXTS[name].startswith("# For colleagues ")


def headings(file):
    """The anchors that GitHub makes of a Markdown file's headings."""
    text = FENCE.sub("", file.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\(([^)]+)\)", TEXTS[name])
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        if path.startswith("https://"):
            continue
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def test_git_keeps_the_readme_files_and_the_example_alone():
    def ignored(path):
        command = ["git", "-C", str(ROOT), "check-ignore", "-q", "--no-index", path]
        return subprocess.run(command, capture_output=True).returncode
    if not shutil.which("git") or ignored("README.md") not in (0, 1):
        pytest.skip("needs git and a repository")
    kept = [*FILES, "data/.gitkeep", "results/example/comparison_report.txt"]
    made = ["checkpoints/best_model.pth", "checkpoints/baseline/last.pth", "results/quick/x.png",
            "results/comparison.json", "data/cifar-100-python.tar.gz"]
    assert [ignored(path) for path in kept] == [1] * len(kept)
    assert [ignored(path) for path in made] == [0] * len(made)


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
    tree = next(text for language, text in BLOCKS if language == "text")
    told = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / name).exists() for name in told)
    folders = {"tests/", "checkpoints/", "results/", "data/"}
    recipes = {"search.py", "control.py"}
    assert {"config.py", "requirements.txt", *SCRIPTS, *folders} - recipes <= set(told)


def test_settings_are_those_of_config(capsys):
    """The main ones first; what is said of each is config.py's own comment, or how it begins."""
    table = rows(README, "Configuration")
    with pytest.raises(SystemExit):
        config.parse_args("distillation", "", ["--help"])
    told = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens too
    assert names(table)[:len(MAIN_SETTINGS)] == MAIN_SETTINGS
    for (name,), value, text in ((names([row]), *row[1:]) for row in table):
        assert value == f"`{getattr(config, name)}`"
        assert f"--{name.lower().replace('_', '-')}{name}{''.join(text.split())}" in told


def test_parameter_counts():
    counts = [[sum(p.numel() for p in models.build_model(name, classes).parameters()) / 1e6
               for classes in (1000, 100)] for name in ("efficientnet_b0", "efficientnet_b2")]
    printed = [row[1:3] for row in rows(README, "Model Sizes")]
    assert printed == [[f"{count:.1f} million" for count in row] for row in counts]


def test_numbers_at_the_top_are_the_examples():
    example = json.loads((ROOT / "results/example/comparison.json").read_text(encoding="utf-8"))
    alone, *_, taught = rows(README, "EfficientNet-B0, alone and taught by EfficientNet-B2")
    for row, run in ((alone, "baseline"), (taught, "distilled")):
        scores = example["models"][run]
        assert row[1] == f"{100 * scores['top1']:.2f} ± {100 * scores['sd']['top1']:.2f} %"
    result = example["comparison"]
    gain, low, high = (100 * x for x in (result["difference"], *result["interval_over_both"]))
    assert taught[2] == f"**{gain:+.2f} ({low:+.2f} to {high:+.2f})**"


def test_keys_of_a_checkpoint(folder):
    checkpoint = utils.load_checkpoint(folder / "checkpoints" / "best_model.pth")
    told = names(rows(CHECKPOINTS, "What best_model.pth holds"))
    assert set(told) == set(checkpoint) | {"teacher"} and len(told) == len(set(told))


def test_columns_of_a_history():
    assert names(rows(RESULTS, "What a history holds")) == list(utils.HISTORY_COLUMNS)


def test_sections_of_the_comparison():
    example = json.loads((ROOT / "results/example/comparison.json").read_text(encoding="utf-8"))
    told = {name.split(".")[0] for name in names(rows(RESULTS, "What `comparison.json` holds"))}
    assert told == set(example)
