"""A method with a classifier head, from one command to the table: the transformers engine serves it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from swift_cl.errors import UserError
from swift_cl.evaluation.grid import EvalOptions, evaluate
from swift_cl.evaluation.plan import GridOptions, load_grid
from tests.support import commands
from tests.support.train import CLASSES, FLAGS, MODEL

pytestmark = pytest.mark.slow
SEEN = {"2022": {"weather", "sport"}, "2023": {"food", "travel", "music"}}


def write_run(folder: Path, **benchmark: object) -> Path:
    """A run file over the two tasks of classes."""
    tasks = [{"name": name, "train": f"{name}.json", "test": f"{name}.json"} for name in SEEN]
    value = {"name": "classes", "data_dir": str(CLASSES), "scorers": ["exact_match"], "tasks": tasks, **benchmark}
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(value))
    train = {key: value for key, value in FLAGS.items() if key != "add_version"}
    config = {
        "benchmark": "benchmark.yaml",
        "model": str(MODEL),
        "output_dir": "runs",
        "method": "seq_star",
        "train": {**train, "max_steps": 20, "learning_rate": 1e-2, "save_steps": 100},
        "method_settings": {"seq_star": {"seq_star_warmup_epochs": 0}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def test_full_workflow(tmp_path: Path) -> None:
    """Class-incremental: the first stage never names a class of the second task for its own, and learns."""
    file = write_run(tmp_path, scenario="class_incremental")
    command = [sys.executable, "-m", "swift_cl.cli.main", "run", str(file)]
    done = subprocess.run(command, env=commands.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = tmp_path / "runs" / "seq_star"
    grid = load_grid(run, GridOptions())
    assert grid.classifies
    said = {
        (target.row, task.name): {row["answer"] for row in grid.store(target, task).rows()}
        for target in grid.targets
        for task in grid.tasks
    }
    assert all(answers <= SEEN["2022"] | SEEN["2023"] for answers in said.values())
    assert said["stage_1_2022", "2022"] <= SEEN["2022"]
    results = json.loads((run / "results.json").read_text())
    em = results["scorers"]["exact_match"]
    assert em["matrix"][0][0] > 60, "two classes, half each: it learned"
    assert len(em["seen"]["rows"]) == 2
    assert results["problems"] == []
    probe = [sys.executable, "-m", "swift_cl.cli.main", "probe", str(run), "--probe_scope", "all"]
    done = subprocess.run(probe, env=commands.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "gap to exact_match" in done.stdout
    probed = json.loads((run / "probing.json").read_text())["kinds"]["mean_cosine"]
    assert probed["matrix"][1] == probed["matrix"][0] == probed["base"], "no warm-up: the features are the base model's"
    assert probed["gap"]["exact_match"][1][0] == probed["matrix"][1][0] - em["matrix"][1][0]
    for flag, options in (("--decoding free", {"decoding": "free"}), ("--merge_stages", {"merge_stages": True})):
        with pytest.raises(UserError, match=f"a classifier answers with its classes; {flag} is not for it"):
            evaluate([run], EvalOptions(**options))


def test_a_benchmark_of_texts_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from swift_cl.cli.main import main

    with pytest.raises(SystemExit) as stopped:
        main(["run", str(write_run(tmp_path))])
    assert stopped.value.code == 2
    assert "method 'seq_star' learns classes, which needs scenario: class_incremental or" in capsys.readouterr().err
