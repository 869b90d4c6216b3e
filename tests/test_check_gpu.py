"""check_gpu.py without a GPU: its dry run, and that it keeps to its minutes whatever a stage does.

    python -m pytest tests/test_check_gpu.py
"""
import argparse
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import benchmark_training
import check_gpu
import models
import train_baseline
from conftest import ROOT, live_processes, wait_until

HANG = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""


def dry_args(out):
    return argparse.Namespace(out=out, batches=(4, 8))


@pytest.mark.slow
def test_dry_run_ends_every_stage_and_fills_the_table(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tests" / "check_gpu.py", "--dry-run",
                           "--minutes", "20", "--out", tmp_path], capture_output=True, text=True,
                          encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for stage in check_gpu.SHARES:
        assert f"- stage {stage}: ended" in done.stdout

    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert table.strip() in done.stdout
    assert table.count("same bits") == 6
    assert table.count("agrees") == 2
    for sign in ("MISSING", "FAILED", "DIFFER", "CUT OFF", "- failed"):
        assert sign not in table
    assert not (tmp_path / "checkpoints").exists()


def test_cells_that_were_not_measured_are_missing(tmp_path):
    args = dry_args(tmp_path)
    check_gpu.record(args, "baseline, batch 4: images/s", check_gpu.EAGER, "123")
    check_gpu.record(args, "stage speed", check_gpu.ABOVE, "CUT OFF, 60 s")
    lines = check_gpu.table(args).splitlines()
    assert "| baseline, batch 4: images/s | MISSING | 123 | MISSING | MISSING |" in lines
    assert "- stage speed: CUT OFF, 60 s" in lines

    rows = [line for line in lines if line.startswith("|")]
    assert {row.count("|") for row in rows} == {6}


def test_a_failure_costs_its_own_measurement_alone(tmp_path, monkeypatch):
    def fail(args):
        raise RuntimeError("no memory")

    measurements = [check_gpu.Measurement("speed", ["a", "b"], check_gpu.EAGER, fail),
                    check_gpu.Measurement("agreement", ["c"], check_gpu.EAGER, fail),
                    check_gpu.Measurement("speed", ["d"], check_gpu.EAGER, lambda args: ["1"])]
    monkeypatch.setattr(check_gpu, "plan", lambda args: measurements)
    args = argparse.Namespace(out=tmp_path, stage="speed")
    check_gpu.run_measurements(args)
    lines = (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {cell["row"]: cell["text"] for cell in map(json.loads, lines)}
    failure = "FAILED: RuntimeError: no memory"
    assert texts == {"a": failure, "b": failure, "d": "1"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="ps, which lists processes, is not on Windows")
def test_a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    start = time.monotonic()
    with open(tmp_path / "log.txt", "w+", encoding="utf-8") as log:
        assert check_gpu.run_limited([sys.executable, "-c", HANG], 5, log) == "CUT OFF"
        assert time.monotonic() - start < 60
        log.seek(0)
        child = int(log.read())
    wait_until(lambda: child not in [number for number, _, _ in live_processes()], 30)


@pytest.mark.parametrize("code, outcome", [("pass", "ended"), ("raise SystemExit(3)", "FAILED")])
def test_outcome_of_a_stage(tmp_path, code, outcome):
    with open(tmp_path / "log.txt", "w", encoding="utf-8") as log:
        assert check_gpu.run_limited([sys.executable, "-c", code], 60, log) == outcome


def test_shares_use_the_minutes_and_no_more():
    """Whether every stage takes all it may or nothing, none goes beyond the end."""
    remaining = 600
    for stage in check_gpu.SHARES:
        remaining -= check_gpu.share_of(stage, remaining)
        assert remaining >= -1e-6
    assert remaining == pytest.approx(0, abs=1e-6)

    last = list(check_gpu.SHARES)[-1]
    assert check_gpu.share_of(last, 600) == 600


def test_weights_that_are_not_numbers_are_not_the_same_bits():
    states = {"model": {"a": torch.zeros(3)}, "ema": {"a": torch.zeros(3)}}
    broken = {"model": {"a": torch.zeros(3)}, "ema": {"a": torch.full((3,), torch.nan)}}
    assert check_gpu.compare_weights({"states": states}, {"states": states}) == "same bits"
    assert "DIFFER" in check_gpu.compare_weights({"states": states}, {"states": broken})


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_names_the_dry_run(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, ROOT / "tests" / "check_gpu.py", "--out", out],
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert "--dry-run" in done.stderr
    assert not out.exists()


@pytest.mark.slow
def test_benchmark_times_all_four_loops(tmp_path):
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, ROOT / "tests" / "benchmark_training.py", "--model",
               "test_efficientnet", "--teacher", "test_resnet", "--image-size", 32,
               "--batch-size", 8, "--steps", 2, "--rounds", 1, "--workers", 0, "--json", numbers]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {row["what"]: row for row in json.loads(numbers.read_text())["rows"]}
    for what in ("CE", "KD"):
        assert all(rows[what][loop] > 0 for loop in ("plain", "project", "ceiling", "timm"))
        assert rows[what]["project / timm"] == rows[what]["project"] / rows[what]["timm"]


@pytest.mark.parametrize("distill", [False, True])
def test_the_loop_of_timms_parts_trains(distill):
    """So that its speed is that of a training step, and the teacher is not trained."""
    args = argparse.Namespace(model="test_efficientnet", teacher="test_resnet", image_size=32,
                              batch_size=4, amp_dtype="fp32", cuda_graph=False)
    built = []
    build_model = benchmark_training.models.build_model

    def recording_build(name, num_classes):
        built.append(build_model(name, num_classes))
        return built[-1]

    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_training.models, "build_model", recording_build)
        run = benchmark_training.timm_loop(args, torch.device("cpu"), pixels, labels, 0, distill)
    before = [[weight.clone() for weight in model.parameters()] for model in built]
    assert run() > 0
    changed = [any(not torch.equal(old, new)
                   for old, new in zip(weights, model.parameters(), strict=True))
               for weights, model in zip(before, built, strict=True)]
    assert changed == [True, False][:len(built)]
    assert len(built) == 1 + distill


def test_the_loop_of_timms_parts_has_the_projects_learning_rates(arguments):
    args = arguments("baseline", "--num-epochs", "4", "--warmup-epochs", "1.5")
    model = models.build_model("test_efficientnet", 10)
    batches = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))] * 2
    train_epoch, _ = benchmark_training.timm_trainer(model, None, batches, torch.device("cpu"),
                                                     args)
    timm_rates = [train_epoch()[1] for _ in range(4)]

    optimizer = train_baseline.build_optimizer(model, args)
    scheduler = train_baseline.build_scheduler(optimizer, len(batches), args)
    rates = []
    for _ in range(4 * len(batches)):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert timm_rates == pytest.approx(rates[1::2], rel=1e-6)
