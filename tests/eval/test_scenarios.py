"""Scenarios: matrices of views under the names of the papers, and general ability before and after."""

import json
from pathlib import Path

import pytest
import yaml

from swift_cl.cli.main import main
from swift_cl.errors import UserError
from swift_cl.evaluation.metrics import Matrix, compute
from swift_cl.evaluation.scenarios import SCENARIOS, general_ability, scenario_metrics
from swift_cl.stream import catalogue
from swift_cl.stream.benchmark import load_benchmark
from swift_cl.stream.benchmark_file import SCENARIO_VIEWS
from swift_cl.workflow.provenance import fingerprints
from tests.eval.conftest import write_rows
from tests.eval.helpers import REFERENCES, go, names
from tests.eval.mock_endpoint import Fault, MockEndpoint

# Learned by q and r; `edit` asks the same, `locality` and the probe ask what no task teaches.
MORE = {"e0": "a0", "e1": "b0", "l0": "x", "l1": "y", "p0": "yes", "p1": "no"}


def part(rows):
    """A scorer's part of results.json."""
    matrix = Matrix(("1", "2", "3"), tuple(map(tuple, rows)))
    return {"em": {"metrics": compute(matrix).values}}


class TestOracles:
    def test_concept_1k(self) -> None:
        """Hand-worked: MA = mean(100, 70, 53.33), MF = mean(90, 50), GA = mean(30, 23, 16), GF = mean(20, 12)."""
        m = part([[100, None, None], [40, 100, None], [10, 50, 100]])
        g = part([[30, None, None], [20, 26, None], [10, 14, 24]])
        found = scenario_metrics("instance_incremental", g, {"memorisation": m})["em"]
        assert found == {
            "ma": pytest.approx(74.4444, abs=1e-3), "ga": pytest.approx(23), "mf": pytest.approx(70),
            "gf": pytest.approx(16),
        }  # fmt: skip

    def test_knowledge_editing(self) -> None:
        rows = ([10, 20, 30], [70, 80, 90], [50, 50, 20])
        main_part, edit, locality = (part([[0] * 3, [0] * 3, row]) for row in rows)
        found = scenario_metrics("knowledge_editing", main_part, {"edit": edit, "locality": locality})["em"]
        assert found == {"edit_success": 80, "generalisation": 20, "locality": 40}

    def test_general_ability(self) -> None:
        found = general_ability([60, 30, 40], [50, 20, 55], True)
        assert found["change"] == [-10, -10, 15]
        assert found["delta_g"] == pytest.approx(-1.6667, abs=1e-4)
        assert general_ability([60], [50], False)["delta_g"] == 10, "a lower score is the better one"
        assert general_ability([60, None], [50, 5], True) == {"change": [-10, None], "delta_g": None}

    def test_every_scenario_has_its_views(self) -> None:
        used = {s: {view for view, _ in metrics.values()} - {""} for s, metrics in SCENARIOS.items()}
        assert used == {name: set(SCENARIO_VIEWS.get(name, ())) for name in SCENARIOS}


@pytest.fixture
def asked(benchmark):
    """The benchmark with views and a probe, as knowledge editing."""
    folder = benchmark.parent
    write_rows(folder / "old-edit.json", [("e", [("e0", "a0")])])
    write_rows(folder / "new-edit.json", [("e", [("e1", "b0")])])
    write_rows(folder / "near.json", [("l0", [("l0", "x")]), ("l1", [("l1", "y")])])
    write_rows(folder / "probe.json", [("p0", [("p0", "yes")]), ("p1", [("p1", "no")])])
    value = yaml.safe_load(benchmark.read_text())
    for task in value["tasks"]:
        task["views"] = {"edit": {"test": f"{task['name']}-edit.json"}}
    value |= {
        "scenario": "knowledge_editing",
        "views": {"locality": {"test": "near.json"}, "edit": {}},
        "probes": [{"name": "general", "test": "probe.json", "system": "Be brief."}],
    }
    benchmark.write_text(yaml.safe_dump(value))
    return benchmark


def answer(model, messages):
    """All is right, but the first stage forgets l1, and the second l0, l1 and p1."""
    question = messages[-1]["content"]
    wrong = {"stage_1": {"l1"}, "stage_2": {"l0", "l1", "p1"}}.get(model[:7], set())
    return "wrong" if question in wrong else {**REFERENCES, **MORE}[question]


class TestGrid:
    def test_matrices_and_metrics(self, make_run, asked, capsys) -> None:
        run = make_run()
        with MockEndpoint(names(run), answer) as mock:
            found = go(run, mock)
            asked_first = len(mock.requests)
            assert go(run, mock).results == found.results
            assert len(mock.requests) == asked_first, "views and probes are kept as well"
        results = found.results[0]
        assert results["views"]["edit"]["exact_match"]["matrix"] == [[100, 100], [100, 100]]
        locality = results["views"]["locality"]["exact_match"]
        assert (locality["base"], locality["matrix"]) == ([100, 100], [[50, 50], [0, 0]])
        assert results["scenario"] == {
            "exact_match": {"edit_success": 100, "generalisation": 100, "locality": 0}
        }  # fmt: skip
        probe = results["probes"]["scorers"]["exact_match"]
        assert results["probes"]["tasks"] == ["general"]
        assert probe == {"base": [100], "rows": [[100], [50]], "change": [-50], "delta_g": -50}
        prompts = {b["messages"][0]["content"] for b in mock.requests if b["messages"][-1]["content"] == "p0"}
        assert prompts == {"Be brief.", "sys old", "sys new"}, "the stage's own prompt, the base gets the probe's"
        with pytest.raises(SystemExit):
            main(["report", str(run)])
        out = capsys.readouterr().out
        assert "scenario metrics, exact_match" in out
        assert "probes (asked, never learned), exact_match" in out
        assert "-50.00" in out

    def test_a_missing_answer_is_null_and_told(self, make_run, asked) -> None:
        run = make_run()

        def lost(body, before):
            gone = body["messages"][-1]["content"] in ("p1", "l0") and body["model"].startswith("stage_2")
            return Fault(400, "gone") if gone else None

        with MockEndpoint(names(run), answer, lost) as mock:
            found = go(run, mock)
        results = found.results[0]
        assert results["views"]["locality"]["exact_match"]["matrix"] == [[50, 50], [None, None]]
        assert results["scenario"]["exact_match"]["locality"] is None
        assert results["probes"]["scorers"]["exact_match"]["delta_g"] is None
        assert any("stage_2_new x general: 1 of 2 answers missing" in line for line in results["problems"])
        assert any("stage_2_new x old@locality: 1 of 2 answers missing" in line for line in results["problems"])
        assert found.lost == 3

    def test_an_untrained_stage(self, make_run, asked) -> None:
        run = make_run(stages=1)
        with MockEndpoint(names(run), answer) as mock:
            results = go(run, mock).results[0]
        assert results["probes"]["scorers"]["exact_match"]["rows"] == [[100], [None]]
        assert [line for line in results["problems"] if "not trained" in line] == [
            "stage 2 (new) is not trained yet; its row is null"
        ]

    def test_without_them_nothing_changes(self, make_run) -> None:
        run = make_run()
        with MockEndpoint(names(run), answer) as mock:
            results = go(run, mock).results[0]
        assert results.keys().isdisjoint({"views", "scenario", "probes"})


class TestFile:
    def test_data_of_views_and_probes_is_needed(self, asked) -> None:
        benchmark = load_benchmark(asked)
        kept = {Path(path).name for path in fingerprints(benchmark, benchmark.order(), streaming=False)}
        assert {"old-edit.json", "near.json", "probe.json"} <= kept

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"views": {"edit": {}}}, "scenario knowledge_editing needs the view 'locality'"),
            ({"probes": [{"name": "old", "test": "probe.json"}]}, "a probe has the name of a task"),
            ({"views": {"locality": {"tst": 1}}}, "views.locality.tst is unknown, allowed: test, test_options"),
            ({"scenario": "editing"}, "scenario: Input should be 'knowledge_editing'"),
            ({"probes": [{"name": "g", "test": "p.json", "format": "csv"}]}, "format 'csv' is unknown"),
        ],
    )
    def test_refused(self, asked, change, said) -> None:
        value = yaml.safe_load(asked.read_text())
        asked.write_text(yaml.safe_dump({**value, **change}))
        with pytest.raises(UserError) as caught:
            load_benchmark(asked)
        assert said in str(caught.value)

    def test_a_view_of_one_task_alone(self, asked) -> None:
        value = yaml.safe_load(asked.read_text())
        del value["views"]["edit"], value["tasks"][1]["views"]
        asked.write_text(yaml.safe_dump(value))
        with pytest.raises(UserError, match="task 'new' has no view 'edit', which other tasks have"):
            load_benchmark(asked)

    def test_zsre(self, tmp_path: Path) -> None:
        facts = [
            {"src": f"s{n}", "rephrase": f"r{n}", "alt": f"t{n}", "loc": f"l{n}", "loc_ans": f"o{n}"} for n in range(10)
        ]
        (tmp_path / "zsre_mend_train_10000.json").write_text(json.dumps(facts))
        benchmark = load_benchmark(catalogue.find(Path("ZsRE")), tmp_path)
        (row,) = benchmark.tasks["task_3"].test_rows()
        assert row.turns == [("r2", "t2")]
        assert benchmark.views["edit"]["task_3"].test_rows()[0].turns == [("s2", "t2")]
        assert benchmark.views["locality"]["task_3"].test_rows()[0].turns == [("l2?", "o2")]

    def test_concept_1k(self) -> None:
        benchmark = load_benchmark(catalogue.find(Path("concept_1k")))
        assert benchmark.views["memorisation"]["task_2"].test_options["split"] == "train"
        assert benchmark.tasks["task_2"].test_options["split"] == "test"
