"""An adapter that is not really served is found before anything is scored."""

from dataclasses import replace

import pytest

from swift_cl.errors import RunFailure
from swift_cl.evaluation.client import Endpoint
from swift_cl.evaluation.plan import GridOptions, load_grid
from tests.eval.helpers import go, names, right
from tests.eval.mock_endpoint import MockEndpoint


def with_probes(run, shift=0.0):
    """Let every stage have recorded, after its training, what the mock says in its name (`shift` nats off)."""
    grid = load_grid(run, GridOptions())
    with MockEndpoint(names(run), right) as mock:
        endpoint = Endpoint(mock.base_url)
        for target in grid.stages:
            messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q1"}]
            said = endpoint.first_logprobs(target.served, messages)
            recorded = {"messages": messages, "logprobs": {token: value + shift for token, value in said.items()}}
            replace(target.stage, probe=recorded).save()
        endpoint.close()
    return run


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_adapters_that_answer_as_after_training_pass(make_run, shift):
    """A difference as between two precisions is no suspicion as long as no other adapter is nearer."""
    run = with_probes(make_run(), shift)
    with MockEndpoint(names(run), right) as mock:
        assert go(run, mock).complete


def test_swapped_adapters_are_found_at_the_first_evaluation(make_run):
    run = with_probes(make_run())
    listed = names(run)
    swap = {listed[1]: listed[2], listed[2]: listed[1], listed[0]: listed[0]}
    with MockEndpoint(listed, right, weights=swap.__getitem__) as mock:
        with pytest.raises(RunFailure, match=r"'stage_1_old-.*' does not answer as .* 'stage_2_new-.*' rather does"):
            go(run, mock)
        assert mock.requests == []
        assert go(run, mock, identity_check=False).complete


def test_weights_far_from_all_that_were_trained_stop_the_run(make_run):
    run = with_probes(make_run(), shift=5.0)
    with (
        MockEndpoint(names(run), right) as mock,
        pytest.raises(RunFailure, match=r"does not answer as its stage did after training \(5 nats off\)"),
    ):
        go(run, mock)


def test_recorded_probes_need_logprobs(make_run):
    run = with_probes(make_run())
    with MockEndpoint(names(run), lambda model, m: f"{model} {m[-1]['content']}", logprobs=False) as mock:
        go(run, mock)
    assert mock.requests


@pytest.mark.parametrize("logprobs", [True, False])
def test_base_model_answering_in_an_adapters_place_stops_the_run(make_run, logprobs):
    run = make_run()
    listed = names(run)
    with MockEndpoint(
        listed, weights=lambda name: listed[0] if name.startswith("stage_2") else name, logprobs=logprobs
    ) as mock:
        with pytest.raises(RunFailure, match=r"'stage_2_new-.*' answers exactly as the base model does"):
            go(run, mock)
        assert len(mock.requests) == 0 or not logprobs
        assert not go(run, mock, identity_check=False).scored[0].problems


def test_another_adapters_weights_stop_the_run(make_run):
    run = make_run()
    listed = names(run)
    with (
        MockEndpoint(listed, weights=lambda name: listed[1] if name.startswith("stage_2") else name) as mock,
        pytest.raises(RunFailure, match=r"'stage_2_new-.*' answers exactly as 'stage_1_old-"),
    ):
        go(run, mock)


def test_swapped_adapters_are_found_by_their_earlier_fingerprints(make_run):
    run = make_run()
    listed = names(run)
    with MockEndpoint(listed, right) as mock:
        go(run, mock)
    swap = {listed[1]: listed[2], listed[2]: listed[1], listed[0]: listed[0]}
    with (
        MockEndpoint(listed, right, weights=swap.__getitem__) as mock,
        pytest.raises(RunFailure, match="does not answer as it did when it was evaluated first"),
    ):
        go(run, mock, max_tokens=9)


def test_another_adapters_name_in_the_response_stops_the_run(make_run):
    run = make_run()
    listed = names(run)
    with (
        MockEndpoint(listed, right, reported=lambda name: listed[1] if name != listed[0] else name) as mock,
        pytest.raises(RunFailure, match=r"asked 'stage_2_new-.*', but 'stage_1_old-.*' answered"),
    ):
        go(run, mock)


def test_the_base_models_name_in_every_response_is_what_ms_swift_does(make_run):
    run = make_run()
    listed = names(run)
    with MockEndpoint(listed, right, reported=lambda name: listed[0]) as mock:
        assert go(run, mock).complete
