"""An adapter that is not really served is found before anything is scored."""

import pytest

from swift_cl.errors import RunFailure
from tests.eval.helpers import go, names, right
from tests.eval.mock_endpoint import MockEndpoint


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
